#pragma once
// The initiating end of one connection to a rail of a peer: says Hello, sends slices from user memory and
// takes answers, asks for reads and lands them. Also the control session, which carries probes and the
// messages of other kinds of rail. Transfer thread only.

#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "base/net.h"
#include "transfer/rail.h"
#include "transfer/tcp/frame_stream.h"

namespace millrace::transfer {

// A data path has two connections: what small requests send does not queue behind bulk.
class TcpPath : public Path {
 public:
  struct Target {
    std::string local_host;         // numeric; empty: any
    std::vector<HostPort> remotes;  // not empty; the control session tries one after the other
    uint64_t expected_epoch = 0;
    PathTraits traits;
  };
  // `environment` outlives the path.
  TcpPath(const RailEnvironment* environment, Target target);
  ~TcpPath() override { Drop(); }

  const PathTraits& traits() const override { return target_.traits; }
  void Connect() override;
  void Disconnect() override;
  void Send(const Slice& slice) override;
  void Probe(uint64_t probe) override;

 protected:
  // A control message came; control sessions only.
  virtual void OnControlMessage(std::string_view body);
  bool SendControl(const std::string& body);

 private:
  // One connection.
  struct Lane : FrameStream::Handler {
    explicit Lane(TcpPath* p) : path(p) {}
    void OnConnected() override { stream->SendHello(path->Hello()); }
    bool OnHello(std::string_view message) override { return path->OnHello(*this, message); }
    std::byte* OnHeader(const Frame& frame) override { return path->OnHeader(frame); }
    void OnFrame(const Frame& frame, bool right) override { path->OnFrame(frame, right); }
    void OnMessage(std::string_view body) override { path->OnMessage(body); }
    void OnSent(const Frame&) override {}
    void OnProgress(size_t) override {}
    void OnClosed(const Status& why) override { path->OnClosed(why); }

    TcpPath* const path;
    bool ready = false;  // Hellos were exchanged
    std::unique_ptr<FrameStream> stream;
  };
  struct Reading {  // where a read lands
    std::byte* local;
    uint64_t bytes;
  };
  bool IsControl() const { return !target_.traits.carries_slices; }
  std::string Hello() const;
  bool OnHello(Lane& lane, std::string_view message);
  std::byte* OnHeader(const Frame& frame);
  void OnFrame(const Frame& frame, bool right);
  void OnMessage(std::string_view body);
  void OnClosed(const Status& why);
  void OnAnswer(uint64_t slice, SliceOutcome outcome);
  void Break(const Status& why);
  void Drop();           // the connections, silently
  void ReportUnknown();  // of everything in flight

  const RailEnvironment* const environment_;
  const Target target_;
  size_t next_remote_ = 0;
  Lane bulk_{this}, express_{this};  // a control session has `bulk_` only
  bool ready_ = false;               // every lane is
  // In flight: slices that were sent; for reads, where they land.
  absl::flat_hash_map<uint64_t, Reading> in_flight_;
};

// The control session to a peer: a path that carries no slices, and the initiating side's ControlChannel.
class TcpControl : public TcpPath, public ControlChannel {
 public:
  TcpControl(const RailEnvironment* environment, const Target& target)
      : TcpPath(environment, target), environment_(environment), peer_epoch_(target.expected_epoch) {}
  bool SendMessage(const std::string& kind, const std::string& body) override;
  uint64_t peer_epoch() const override { return peer_epoch_; }

 private:
  void OnControlMessage(std::string_view body) override;
  const RailEnvironment* const environment_;
  const uint64_t peer_epoch_;
};

}  // namespace millrace::transfer
