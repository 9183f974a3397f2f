// The public face: checks what callers say on their threads, and keeps peers on the transfer thread.
#include "transfer/transfer.h"

#include <future>
#include <map>
#include <mutex>
#include <thread>

#include "base/check.h"
#include "base/digest.h"
#include "base/log.h"
#include "base/net.h"
#include "base/random.h"
#include "base/thread.h"
#include "proto/transfer.pb.h"
#include "transfer/event_loop.h"
#include "transfer/local/local_path.h"
#include "transfer/peer.h"
#include "transfer/tcp/tcp_path.h"
#include "transfer/tcp/tcp_receiver.h"

namespace millrace::transfer {
namespace {

// What callers may know of a peer without asking the transfer thread.
struct PeerEntry {
  uint64_t epoch = 0;
  std::atomic<uint64_t> queued_bytes{0};
};

class TransferEngine : public Transfer {
 public:
  TransferEngine(const Options& options, std::unique_ptr<EventLoop> loop)
      : options_(options),
        epoch_(RandomId()),
        loop_(std::move(loop)),
        receiver_(loop_.get(), &memory_, epoch_),
        local_(std::make_shared<LocalProcess>(&memory_)) {}

  ~TransferEngine() override {
    LocalProcess::Withdraw(epoch_);
    if (thread_.joinable()) {
      loop_->Stop();
      thread_.join();
    }
    local_->Leave();
  }

  Status Start() {
    for (const std::string& text : options_.listen) {
      MR_ASSIGN_OR_RETURN(const HostPort wanted, ParseHostPort(text));
      MR_ASSIGN_OR_RETURN(const std::vector<HostPort> addresses, Resolve(wanted));
      HostPort bound;
      MR_RETURN_IF_ERROR(receiver_.Listen(addresses.front(), &bound));
      rails_.push_back(bound);
    }
    LocalProcess::Announce(epoch_, local_);
    thread_ = std::thread([this] { Run(); });
    return OkStatus();
  }

  StatusOr<RegionId> Register(std::span<std::byte> memory, bool writable) override {
    if (memory.empty()) return InvalidArgument("a region of 0 bytes");
    return memory_.Register(memory, writable);
  }
  Status Deregister(RegionId region) override { return memory_.Deregister(region); }

  std::string Descriptor() const override {
    v1::PeerDescriptor descriptor;
    descriptor.set_protocol_version(kProtocolVersion);
    descriptor.set_epoch(epoch_);
    descriptor.set_name(options_.name);
    for (const HostPort& rail : rails_) descriptor.add_rails(rail.ToString());
    return descriptor.SerializeAsString();
  }
  uint64_t epoch() const override { return epoch_; }

  StatusOr<PeerId> Open(const std::string& descriptor) override {
    v1::PeerDescriptor peer;
    if (!peer.ParseFromString(descriptor) || peer.epoch() == 0)
      return InvalidArgument("a damaged peer descriptor");
    if (peer.protocol_version() != kProtocolVersion) {
      return InvalidArgument("the peer speaks transfer protocol {}, this process {}", peer.protocol_version(),
                             kProtocolVersion);
    }
    std::vector<HostPort> remotes;
    for (const std::string& rail : peer.rails()) {
      MR_ASSIGN_OR_RETURN(HostPort remote, ParseHostPort(rail));
      remotes.push_back(std::move(remote));
    }
    // Within the process a copy is the shortest way, unless both sides were given rails to use.
    auto process = rails_.empty() || remotes.empty() ? LocalProcess::Find(peer.epoch()) : nullptr;
    if (process == nullptr && remotes.empty())
      return InvalidArgument("the peer has no rail and is not in this process");

    const std::lock_guard lock(mutex_);
    for (const auto& [id, entry] : entries_) {
      if (entry->epoch == peer.epoch()) return id;
    }
    const PeerId id = next_peer_++;
    auto entry = std::make_shared<PeerEntry>();
    entry->epoch = peer.epoch();
    entries_.emplace(id, entry);
    loop_->Post(
        [this, id, epoch = peer.epoch(), remotes = std::move(remotes),
         process = std::move(process)]() mutable { AddPeer(id, epoch, remotes, std::move(process)); });
    return id;
  }

  Status Write(PeerId peer, WriteRequest request, WriteDone done) override {
    if (request.intents.empty()) return InvalidArgument("a write without intents");
    const std::shared_ptr<PeerEntry> entry = FindEntry(peer);
    if (entry == nullptr) return NotFound("peer {} is not open", peer);
    std::vector<std::span<const std::byte>> sources;
    uint64_t bytes = 0;
    Status status;
    for (const Intent& intent : request.intents) {
      auto source = memory_.UseSource(intent.source);
      if (!source.ok()) {
        status = source.status();
        break;
      }
      sources.push_back(*source);
      bytes += source->size();
    }
    if (status.ok() && entry->queued_bytes.fetch_add(bytes) + bytes > options_.queued_bytes_max) {
      entry->queued_bytes -= bytes;
      status =
          ResourceExhausted("more than {} bytes are queued for peer {}", options_.queued_bytes_max, peer);
    }
    if (!status.ok()) {
      for (size_t i = 0; i < sources.size(); ++i) memory_.ReleaseSource(request.intents[i].source.region);
      return status;
    }
    ++pending_writes_;
    WriteDone counted = [this, entry, bytes, done = std::move(done)](Status result) mutable {
      entry->queued_bytes -= bytes;
      --pending_writes_;
      std::move(done)(std::move(result));
    };
    loop_->Post([this, peer, request = std::move(request), sources = std::move(sources),
                 counted = std::move(counted)]() mutable {
      AddWrite(peer, std::move(request), std::move(sources), std::move(counted));
    });
    return OkStatus();
  }

  void CancelWrites(PeerId peer, TicketId ticket, TicketDone done) override {
    loop_->Post([this, peer, ticket, done = std::move(done)]() mutable {
      const auto found = peers_.find(peer);
      if (found == peers_.end()) return std::move(done)();
      found->second->queue().Cancel(ticket, std::move(done));
    });
  }

  StatusOr<TicketId> OpenTicket(uint64_t peer_epoch, std::vector<Range> ranges) override {
    return memory_.Open(peer_epoch, std::move(ranges));
  }
  Status ExtendTicket(TicketId ticket, std::vector<Range> ranges) override {
    return memory_.Extend(ticket, std::move(ranges));
  }
  void CloseTicket(TicketId ticket, TicketDone done) override {
    // Drained may be noticed on another engine's thread (a local copy); `done` still runs on this one's.
    memory_.Close(ticket, [this, done = std::move(done)]() mutable { loop_->Post(std::move(done)); });
    loop_->Post([] {});  // the next tick looks for connections that are stuck in this ticket
  }

  Snapshot TakeSnapshot() const override {
    if (std::this_thread::get_id() == thread_.get_id()) return Look();
    auto promise =
        std::make_shared<std::promise<Snapshot>>();  // shared: posted work must be movable and may be late
    auto future = promise->get_future();
    loop_->Post([this, promise] { promise->set_value(Look()); });
    return future.get();
  }

 private:
  std::shared_ptr<PeerEntry> FindEntry(PeerId peer) {
    const std::lock_guard lock(mutex_);
    const auto found = entries_.find(peer);
    return found == entries_.end() ? nullptr : found->second;
  }

  // Every rail of both sides is used: rail i of one is joined to rail i of the other, the shorter list going
  // round again.
  void AddPeer(PeerId id, uint64_t epoch, const std::vector<HostPort>& remotes,
               std::shared_ptr<LocalProcess> process) {
    auto peer = std::make_unique<Peer>(id, epoch, SliceQueue(&memory_, SliceBytes()), options_.peer_timeout);
    if (process != nullptr) {
      peer->AddPath(std::make_unique<LocalPath>(std::move(process), epoch_, peer->Events()));
    } else {
      const size_t count = std::max(rails_.size(), remotes.size());
      for (size_t i = 0; i < count; ++i) {
        TcpPath::Target target;
        target.local_host = LocalHost(i);
        target.remote = remotes[i % remotes.size()];
        target.own_epoch = epoch_;
        target.expected_epoch = epoch;
        for (uint32_t c = 0; c < options_.connections_per_path; ++c) {
          peer->AddPath(std::make_unique<TcpPath>(loop_.get(), &options_, target, peer->Events()));
        }
        if (i > 0) continue;
        target.purpose = TcpPath::Purpose::kControl;
        peer->AddPath(std::make_unique<TcpPath>(loop_.get(), &options_, target, peer->Events()));
      }
    }
    peers_.emplace(id, std::move(peer));
  }

  uint32_t SliceBytes() const { return std::clamp<uint32_t>(options_.slice_bytes_max, 1, kSliceBytesLimit); }

  // A wildcard listens everywhere and so says nothing about where to send from.
  std::string LocalHost(size_t rail) const {
    if (rails_.empty()) return "";
    const std::string& host = rails_[rail % rails_.size()].host;
    return host == "0.0.0.0" || host == "::" ? "" : host;
  }

  void AddWrite(PeerId id, WriteRequest request, std::vector<std::span<const std::byte>> sources,
                WriteDone done) {
    const auto found = peers_.find(id);
    if (found == peers_.end() || stopping_) {
      for (const Intent& intent : request.intents) memory_.ReleaseSource(intent.source.region);
      return std::move(done)(stopping_ ? Cancelled("the transfer engine is shutting down")
                                       : Unavailable("the peer is lost"));
    }
    found->second->queue().Add(std::move(request), std::move(sources), std::move(done));
    found->second->Pump();
  }

  void Run() {
    SetThreadName(options_.name);
    loop_->Run([this] { return Tick(); });
    // Nothing lands and nothing is read after this; what is posted from here on is still carried out.
    stopping_ = true;
    peers_.clear();
    local_->Leave();
    receiver_.CloseAll();
    memory_.CloseAll();
    loop_->RunRemaining();
  }

  TimePoint Tick() {
    const TimePoint now = Clock::System().Now();
    TimePoint next = receiver_.Tick(now);
    for (auto it = peers_.begin(); it != peers_.end();) {
      next = std::min(next, it->second->Tick(now));
      if (!it->second->lost()) {
        ++it;
        continue;
      }
      LogWarning("transfer: peer {} is lost", it->first);
      {
        const std::lock_guard lock(mutex_);
        entries_.erase(it->first);
      }
      it = peers_.erase(it);
    }
    UpdateMetrics();
    return next;
  }

  Snapshot Look() const {
    Snapshot snapshot;
    for (const auto& [id, peer] : peers_) peer->Describe(&snapshot.paths);
    snapshot.peers = static_cast<int32_t>(peers_.size());
    snapshot.open_tickets = memory_.num_open();
    snapshot.pending_writes = pending_writes_;
    snapshot.bytes_received = receiver_.counters().bytes_received;
    snapshot.slices_refused = receiver_.counters().slices_refused;
    return snapshot;
  }

  void UpdateMetrics() {
    if (options_.metrics == nullptr) return;
    Metrics& metrics = *options_.metrics;
    if (gauges_.empty()) {
      gauges_ = {&metrics.Gauge("millrace_transfer_open_tickets",
                                "Tickets that peers may write under, or that drain."),
                 &metrics.Gauge("millrace_transfer_pending_writes", "Writes to peers that have not ended."),
                 &metrics.Gauge("millrace_transfer_peers",
                                "Remote processes that are connected or being connected.")};
      counters_ = {&metrics.Counter("millrace_transfer_bytes_received_total",
                                    "Payload bytes received over TCP rails."),
                   &metrics.Counter("millrace_transfer_slices_refused_total",
                                    "Slices refused or with a wrong checksum.")};
    }
    gauges_[0]->Set(memory_.num_open());
    gauges_[1]->Set(pending_writes_);
    gauges_[2]->Set(static_cast<double>(peers_.size()));
    const ReceiverCounters& counters = receiver_.counters();
    counters_[0]->Increment(static_cast<double>(counters.bytes_received) - counters_[0]->Value());
    counters_[1]->Increment(static_cast<double>(counters.slices_refused) - counters_[1]->Value());
  }

  const Options options_;
  const uint64_t epoch_;
  MemoryTable memory_;
  const std::unique_ptr<EventLoop> loop_;
  std::vector<HostPort> rails_;  // as bound; fixed once the thread runs
  std::atomic<int32_t> pending_writes_{0};

  // Transfer thread.
  TcpReceiver receiver_;
  std::map<PeerId, std::unique_ptr<Peer>> peers_;
  std::vector<prometheus::Gauge*> gauges_;
  std::vector<prometheus::Counter*> counters_;
  bool stopping_ = false;

  const std::shared_ptr<LocalProcess> local_;  // shared with the process's list and with paths to this engine
  std::mutex mutex_;
  std::map<PeerId, std::shared_ptr<PeerEntry>>
      entries_;  // open peers; shared with the writes that count on them
  PeerId next_peer_ = 1;
  std::thread thread_;
};

}  // namespace

StatusOr<std::unique_ptr<Transfer>> Transfer::Create(const Options& options) {
  MR_ASSIGN_OR_RETURN(std::unique_ptr<EventLoop> loop, EventLoop::Create());
  auto engine = std::make_unique<TransferEngine>(options, std::move(loop));
  MR_RETURN_IF_ERROR(engine->Start());
  return StatusOr<std::unique_ptr<Transfer>>(std::move(engine));
}

uint64_t PieceDigest(std::span<const std::byte> bytes, uint64_t piece) { return Xxh3(bytes, Mix64(piece)); }

}  // namespace millrace::transfer
