#pragma once
// The TCP kind of rail: one rail for each local address, persistent connections bound to it.

#include <memory>
#include <vector>

#include "transfer/tcp/tcp_path.h"
#include "transfer/tcp/tcp_receiver.h"

namespace millrace::transfer {

class TcpRails : public RailKind {
 public:
  // `carries_slices` false: the rails are there for the control session alone.
  TcpRails(const RailEnvironment& environment, bool carries_slices)
      : environment_(environment), carries_slices_(carries_slices), receiver_(&environment_) {}

  const char* name() const override { return "tcp"; }
  Status Start() override;
  std::vector<RailAddress> Addresses() const override;
  Control MakeControl(const RemotePeer& peer) override;
  StatusOr<std::vector<std::unique_ptr<Path>>> MakePaths(const RemotePeer& peer,
                                                         ControlChannel* control) override;
  TimePoint Tick(TimePoint now) override { return receiver_.Tick(now); }
  void CloseAll() override { receiver_.CloseAll(); }
  ReceiverCounters counters() const override { return receiver_.counters(); }

 private:
  const RailEnvironment environment_;
  const bool carries_slices_;
  TcpReceiver receiver_;
  std::vector<HostPort> rails_;  // as bound; fixed after Start
};

}  // namespace millrace::transfer
