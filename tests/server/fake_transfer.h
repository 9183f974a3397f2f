#pragma once
// A transfer engine that copies within the process, checks tickets as the real one does, and can be told to
// misbehave.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "base/random.h"
#include "server/rpc/task_thread.h"
#include "transfer/transfer.h"

namespace millrace::server {

class FakeTransfer final : public transfer::Transfer {
 public:
  FakeTransfer() : epoch_(RandomId()) {
    std::lock_guard lock(Everybody().mutex);
    Everybody().by_epoch[epoch_] = this;
  }
  ~FakeTransfer() override {
    {
      std::lock_guard lock(Everybody().mutex);
      Everybody().by_epoch.erase(epoch_);
    }
    thread_.Stop();
  }

  // Test controls; any thread.
  std::atomic<bool> writes_paused = false;  // as a sender: they wait, like on a black hole
  std::atomic<bool> corrupt_at_close =
      false;                         // as a receiver: one bit of the first range flips before the fence
  std::atomic<int> fail_writes = 0;  // as a sender: so many writes fail
  std::atomic<int> bytes_received = 0;

  StatusOr<transfer::RegionId> Register(std::span<std::byte> memory, bool) override {
    std::lock_guard lock(Everybody().mutex);
    regions_[++next_region_] = memory;
    return next_region_;
  }
  Status Deregister(transfer::RegionId region) override {
    std::lock_guard lock(Everybody().mutex);
    if (!tickets_.empty()) return FailedPrecondition("tickets are open");
    regions_.erase(region);
    return OkStatus();
  }
  std::string Descriptor() const override { return std::to_string(epoch_); }
  uint64_t epoch() const override { return epoch_; }

  StatusOr<transfer::PeerId> Open(const std::string& descriptor) override {
    std::lock_guard lock(Everybody().mutex);
    const transfer::PeerId id = ++next_peer_;
    peers_[id] = std::stoull(descriptor);
    return id;
  }
  StatusOr<std::shared_ptr<transfer::IntentList>> Prepare(std::vector<transfer::Intent>) override {
    return Unimplemented("nobody prepares here");
  }
  Status Submit(transfer::PeerId peer, transfer::Request request, transfer::RequestDone done) override {
    auto write = std::make_shared<Pending>(Pending{peer, std::move(request), std::move(done)});
    thread_.Post([this, write] { TryWrite(write); });
    return OkStatus();
  }
  void Cancel(transfer::PeerId, transfer::TicketId ticket, transfer::TicketDone done) override {
    auto shared = std::make_shared<transfer::TicketDone>(std::move(done));
    thread_.Post([this, ticket, shared] {
      cancelled_.push_back(ticket);
      std::move (*shared)();
    });
  }
  StatusOr<transfer::TicketId> OpenTicket(uint64_t peer_epoch, std::vector<transfer::Range> ranges,
                                          transfer::Operation) override {
    std::lock_guard lock(Everybody().mutex);
    const transfer::TicketId id = RandomId();
    tickets_[id] = {peer_epoch, std::move(ranges)};
    return id;
  }
  Status ExtendTicket(transfer::TicketId ticket, std::vector<transfer::Range> ranges) override {
    std::lock_guard lock(Everybody().mutex);
    auto& all = tickets_.at(ticket).ranges;
    all.insert(all.end(), ranges.begin(), ranges.end());
    return OkStatus();
  }
  void CloseTicket(transfer::TicketId ticket, transfer::TicketDone done) override {
    auto shared = std::make_shared<transfer::TicketDone>(std::move(done));
    thread_.Post([this, ticket, shared] {
      {
        std::lock_guard lock(Everybody().mutex);
        if (corrupt_at_close && tickets_.contains(ticket)) {
          const transfer::Range& range = tickets_[ticket].ranges.front();
          regions_.at(range.region)[range.offset + range.bytes / 2] ^= std::byte{1};
        }
        tickets_.erase(ticket);
      }
      std::move (*shared)();
    });
  }
  transfer::Snapshot TakeSnapshot() const override {
    std::lock_guard lock(Everybody().mutex);
    transfer::Snapshot snapshot;
    snapshot.open_tickets = static_cast<int32_t>(tickets_.size());
    return snapshot;
  }

 private:
  struct Pending {
    transfer::PeerId peer;
    transfer::Request request;
    transfer::RequestDone done;
  };
  struct OpenedTicket {
    uint64_t epoch = 0;
    std::vector<transfer::Range> ranges;
  };
  struct Registry {
    std::mutex mutex;  // guards every instance's tables
    std::map<uint64_t, FakeTransfer*> by_epoch;
  };
  static Registry& Everybody() {
    static Registry registry;
    return registry;
  }

  void TryWrite(const std::shared_ptr<Pending>& write) {
    const transfer::TicketId ticket = write->request.ticket;
    if (std::find(cancelled_.begin(), cancelled_.end(), ticket) != cancelled_.end()) {
      return std::move(write->done)(Cancelled("writes cancelled"));
    }
    if (writes_paused) {
      thread_.PostAt(std::chrono::steady_clock::now() + std::chrono::milliseconds(1),
                     [this, write] { TryWrite(write); });
      return;
    }
    if (fail_writes > 0) {
      --fail_writes;
      return std::move(write->done)(Unavailable("peer lost"));
    }
    std::move(write->done)(Copy(*write));
  }

  Status Copy(const Pending& write) {
    std::lock_guard lock(Everybody().mutex);
    const auto peer = Everybody().by_epoch.find(peers_.at(write.peer));
    if (peer == Everybody().by_epoch.end()) return Unavailable("peer lost");
    FakeTransfer& to = *peer->second;
    const auto ticket = to.tickets_.find(write.request.ticket);
    if (ticket == to.tickets_.end()) return PermissionDenied("no such ticket");
    if (ticket->second.epoch != epoch_) return PermissionDenied("ticket of another epoch");
    for (const transfer::Intent& intent : write.request.intents) {
      if (!Granted(ticket->second, intent)) return PermissionDenied("range not granted");
      std::memcpy(to.regions_.at(intent.remote_region).data() + intent.remote_offset,
                  regions_.at(intent.local.region).data() + intent.local.offset, intent.local.bytes);
      to.bytes_received += static_cast<int>(intent.local.bytes);
    }
    return OkStatus();
  }
  // Every byte of the intent lies in some granted range; ranges are small here, so byte runs are walked.
  static bool Granted(const OpenedTicket& ticket, const transfer::Intent& intent) {
    uint64_t at = intent.remote_offset;
    const uint64_t end = at + intent.local.bytes;
    while (at < end) {
      const auto found =
          std::find_if(ticket.ranges.begin(), ticket.ranges.end(), [&](const transfer::Range& range) {
            return range.region == intent.remote_region && range.offset <= at &&
                   at < range.offset + range.bytes;
          });
      if (found == ticket.ranges.end()) return false;
      at = found->offset + found->bytes;
    }
    return true;
  }

  const uint64_t epoch_;
  // Under Everybody().mutex.
  std::map<transfer::RegionId, std::span<std::byte>> regions_;
  transfer::RegionId next_region_ = 0;
  std::map<transfer::PeerId, uint64_t> peers_;
  transfer::PeerId next_peer_ = 0;
  std::map<transfer::TicketId, OpenedTicket> tickets_;
  std::vector<transfer::TicketId> cancelled_;  // thread_ only
  TaskThread thread_{"fake transfer"};
};

}  // namespace millrace::server
