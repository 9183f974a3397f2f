// The public face: checks what callers say on their threads, and keeps peers on the transfer thread.
#include "transfer/transfer.h"

#include <future>
#include <map>
#include <mutex>
#include <thread>

#include "base/check.h"
#include "base/digest.h"
#include "base/log.h"
#include "base/random.h"
#include "base/thread.h"
#include "proto/transfer.pb.h"
#include "transfer/peer.h"
#include "transfer/rail.h"
#include "transfer/telemetry.h"
#include "transfer/wire.h"

namespace millrace::transfer {
namespace {

// What callers may know of a peer without asking the transfer thread.
struct PeerEntry {
  uint64_t epoch = 0;
  std::atomic<uint64_t> queued_bytes{0};
  std::atomic<uint64_t> queued_requests{0};
};

Options Checked(Options options) {
  options.slice_bytes_max = std::clamp<uint32_t>(options.slice_bytes_max, 1, kSliceBytesLimit);
  options.slice_bytes_min = std::clamp<uint32_t>(options.slice_bytes_min, 1, options.slice_bytes_max);
  return options;
}

class TransferEngine : public Transfer {
  // Runs `work` on the transfer thread and gives its result; at once when this is that thread.
  template <typename Work>
  auto OnLoop(Work work) const {
    using Result = decltype(work());
    if (std::this_thread::get_id() == thread_.get_id()) return work();
    std::promise<Result> promise;
    auto future = promise.get_future();
    loop_->Post([&] { promise.set_value(work()); });
    return future.get();
  }

 public:
  TransferEngine(const Options& options, std::unique_ptr<EventLoop> loop)
      : options_(Checked(options)),
        epoch_(RandomId()),
        memory_(std::make_shared<MemoryTable>()),
        loop_(std::move(loop)),
        telemetry_(options_.metrics) {}

  ~TransferEngine() override {
    if (!thread_.joinable()) return;
    loop_->Stop();
    thread_.join();
  }

  Status Start() {
    RailEnvironment environment;
    environment.loop = loop_.get();
    environment.clock = &Clock::System();
    environment.memory = memory_.get();
    environment.landing = &landing_;
    environment.options = &options_;
    environment.epoch = epoch_;
    environment.on_control = [this](ControlChannel* channel, const std::string& kind,
                                    const std::string& body) {
      for (const auto& rails : kinds_) {
        if (rails->name() == kind) rails->OnControl(channel, body);
      }
    };
    environment.on_control_closed = [this](ControlChannel* channel) {
      for (const auto& rails : kinds_) rails->OnControlClosed(channel);
    };
    kinds_ = MakeRailKinds(environment);
    for (const auto& rails : kinds_) MR_RETURN_IF_ERROR(rails->Start());
    thread_ = std::thread([this] { Run(); });
    return OkStatus();
  }

  StatusOr<RegionId> Register(std::span<std::byte> memory, bool writable) override {
    if (memory.empty()) return InvalidArgument("a region of 0 bytes");
    const RegionId region = memory_->Register(memory, writable);
    for (const auto& rails : kinds_) {
      if (const Status status = rails->RegisterRegion(region, memory, writable); !status.ok())
        LogWarning("transfer: region {} of {} bytes cannot be used over {}: {}", region, memory.size(),
                   rails->name(), Message(status));
    }
    return region;
  }
  Status Deregister(RegionId region) override {
    MR_RETURN_IF_ERROR(memory_->Deregister(region));
    for (const auto& rails : kinds_) rails->DeregisterRegion(region);
    return OkStatus();
  }

  std::string Descriptor() const override {
    v1::PeerDescriptor descriptor;
    descriptor.set_protocol_version(kProtocolVersion);
    descriptor.set_epoch(epoch_);
    descriptor.set_name(options_.name);
    for (const auto& rails : kinds_) {
      for (const RailAddress& address : rails->Addresses()) {
        v1::Rail& rail = *descriptor.add_rails();
        rail.set_kind(address.kind);
        rail.set_address(address.address);
      }
    }
    return descriptor.SerializeAsString();
  }
  uint64_t epoch() const override { return epoch_; }

  StatusOr<PeerId> Open(const std::string& descriptor) override {
    v1::PeerDescriptor message;
    if (!message.ParseFromString(descriptor) || message.epoch() == 0)
      return InvalidArgument("a damaged peer descriptor");
    if (message.protocol_version() != kProtocolVersion) {
      return InvalidArgument("the peer speaks transfer protocol {}, this process {}",
                             message.protocol_version(), kProtocolVersion);
    }
    RemotePeer remote;
    remote.epoch = message.epoch();
    remote.name = fmt::format("{} ({:08x})", message.name(), message.epoch() >> 32);
    for (const v1::Rail& rail : message.rails()) remote.rails.push_back({rail.kind(), rail.address()});

    return OnLoop([this, &remote] { return FindOrAddPeer(remote); });
  }

  StatusOr<std::shared_ptr<IntentList>> Prepare(std::vector<Intent> intents) override {
    return IntentList::Create(memory_, intents);
  }

  Status Submit(PeerId peer, Request request, RequestDone done) override {
    const std::shared_ptr<PeerEntry> entry = FindEntry(peer);
    if (entry == nullptr) return NotFound("peer {} is not open", peer);
    std::shared_ptr<IntentList> intents = std::move(request.prepared);
    if (intents == nullptr) {
      MR_ASSIGN_OR_RETURN(intents, IntentList::Create(memory_, request.intents));
    } else if (!request.intents.empty()) {
      return InvalidArgument("a request has prepared intents or its own, not both");
    }
    if (request.operation == Operation::kRead && !intents->writable())
      return InvalidArgument("a read into a region that is not writable");
    const uint64_t bytes = intents->bytes();
    if (entry->queued_bytes.fetch_add(bytes) + bytes > options_.queued_bytes_max) {
      entry->queued_bytes -= bytes;
      return ResourceExhausted("more than {} bytes are queued for peer {}", options_.queued_bytes_max, peer);
    }
    if (entry->queued_requests.fetch_add(1) >= options_.queued_requests_max) {
      entry->queued_bytes -= bytes;
      --entry->queued_requests;
      return ResourceExhausted("more than {} requests are queued for peer {}", options_.queued_requests_max,
                               peer);
    }
    ++pending_requests_;
    RequestDone counted = [this, entry, bytes, done = std::move(done)](Status result) mutable {
      entry->queued_bytes -= bytes;
      --entry->queued_requests;
      --pending_requests_;
      std::move(done)(std::move(result));
    };
    loop_->Post([this, peer, request = std::move(request), intents = std::move(intents),
                 counted = std::move(counted)]() mutable {
      AddRequest(peer, request, std::move(intents), std::move(counted));
    });
    return OkStatus();
  }

  void Cancel(PeerId peer, TicketId ticket, TicketDone done) override {
    loop_->Post([this, peer, ticket, done = std::move(done)]() mutable {
      const auto found = peers_.find(peer);
      if (found == peers_.end()) return std::move(done)();
      found->second->queue().Cancel(ticket, std::move(done));
    });
  }

  StatusOr<TicketId> OpenTicket(uint64_t peer_epoch, std::vector<Range> ranges,
                                Operation operation) override {
    return memory_->Open(peer_epoch, std::move(ranges), operation);
  }
  Status ExtendTicket(TicketId ticket, std::vector<Range> ranges) override {
    return memory_->Extend(ticket, std::move(ranges));
  }
  void CloseTicket(TicketId ticket, TicketDone done) override {
    // Drained may be noticed on another engine's thread (a local copy); `done` still runs on this one's.
    const bool pinned =
        memory_->Close(ticket, [this, done = std::move(done)]() mutable { loop_->Post(std::move(done)); });
    if (pinned) loop_->Post([this, ticket] { TicketClosing(ticket); });
  }

  Snapshot TakeSnapshot() const override {
    return OnLoop([this] { return Look(); });
  }

 private:
  std::shared_ptr<PeerEntry> FindEntry(PeerId peer) {
    const std::lock_guard lock(mutex_);
    const auto found = entries_.find(peer);
    return found == entries_.end() ? nullptr : found->second;
  }

  StatusOr<PeerId> FindOrAddPeer(const RemotePeer& remote) {
    for (const auto& [id, entry] : entries_) {
      if (entry->epoch == remote.epoch) return id;
    }
    const PeerId id = next_peer_;
    MR_RETURN_IF_ERROR(AddPeer(id, remote));
    ++next_peer_;
    auto entry = std::make_shared<PeerEntry>();
    entry->epoch = remote.epoch;
    const std::lock_guard lock(mutex_);
    entries_.emplace(id, std::move(entry));
    return id;
  }

  Status AddPeer(PeerId id, const RemotePeer& remote) {
    auto peer =
        std::make_unique<Peer>(id, remote.epoch, remote.name, &options_, &Clock::System(), RandomId());
    ControlChannel* channel = nullptr;
    for (const auto& rails : kinds_) {
      RailKind::Control control = rails->MakeControl(remote);
      if (control.path == nullptr) continue;
      channel = control.channel;
      peer->AddPath(std::move(control.path));
      break;
    }
    size_t count = 0;
    for (const auto& rails : kinds_) {
      MR_ASSIGN_OR_RETURN(auto paths, rails->MakePaths(remote, channel));
      count += paths.size();
      for (auto& path : paths) peer->AddPath(std::move(path));
    }
    if (count == 0) return InvalidArgument("the peer has no rail that this process can reach");
    peers_.emplace(id, std::move(peer));
    return OkStatus();
  }

  void AddRequest(PeerId id, const Request& request, std::shared_ptr<IntentList> intents, RequestDone done) {
    const auto found = peers_.find(id);
    if (found == peers_.end() || found->second->lost() || stopping_) {
      intents.reset();
      return std::move(done)(stopping_ ? Cancelled("the transfer engine is shutting down")
                                       : Unavailable("the peer is lost"));
    }
    found->second->Add(request, std::move(intents), std::move(done));
  }

  void TicketClosing(TicketId ticket) {
    for (const auto& rails : kinds_) rails->OnTicketClosing(ticket);
  }

  void Run() {
    SetThreadName(options_.name);
    loop_->Run([this] { return Tick(); });
    // Nothing lands and nothing is read after this; what is posted from here on is still carried out.
    stopping_ = true;
    peers_.clear();
    for (const auto& rails : kinds_) rails->CloseAll();
    for (const TicketId ticket : memory_->CloseAll()) TicketClosing(ticket);
    loop_->RunRemaining();
  }

  TimePoint Tick() {
    const TimePoint now = Clock::System().Now();
    TimePoint next = kNoDeadline;
    for (const auto& rails : kinds_) next = std::min(next, rails->Tick(now));
    for (auto it = peers_.begin(); it != peers_.end();) {
      Peer& peer = *it->second;
      const bool was_lost = peer.lost();
      next = std::min(next, peer.Tick(now));
      if (peer.lost() && !was_lost) {
        const std::lock_guard lock(mutex_);
        entries_.erase(it->first);
      }
      it = peer.drained() ? peers_.erase(it) : std::next(it);
    }
    return std::min(next, telemetry_.Update(now, [this] { return Look(); }));
  }

  Snapshot Look() const {
    Snapshot snapshot;
    for (const auto& [id, peer] : peers_) {
      peer->Describe(&snapshot.paths);
      snapshot.peers += !peer->lost();
    }
    snapshot.open_tickets = memory_->num_open();
    snapshot.draining_tickets = memory_->num_draining();
    snapshot.pending_requests = pending_requests_;
    for (const auto& rails : kinds_) {
      const ReceiverCounters counters = rails->counters();
      snapshot.bytes_received += counters.bytes_received;
      snapshot.slices_refused += counters.slices_refused;
    }
    snapshot.slices_superseded = landing_.num_superseded();
    return snapshot;
  }

  const Options options_;
  const uint64_t epoch_;
  const std::shared_ptr<MemoryTable> memory_;  // shared with intent lists, which callers may keep longer
  const std::unique_ptr<EventLoop> loop_;
  std::atomic<int32_t> pending_requests_{0};

  // Transfer thread.
  LandingTable landing_;
  std::vector<std::unique_ptr<RailKind>> kinds_;  // the list itself is fixed once the thread runs
  std::map<PeerId, std::unique_ptr<Peer>> peers_;
  PeerId next_peer_ = 1;
  Telemetry telemetry_;
  bool stopping_ = false;

  std::mutex mutex_;
  std::map<PeerId, std::shared_ptr<PeerEntry>>
      entries_;  // open peers, changed on the transfer thread; shared with the requests that count on them
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
