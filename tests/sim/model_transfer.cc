#include "tests/sim/model_transfer.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace millrace::sim {

using std::chrono::microseconds;
using std::chrono::milliseconds;

ModelTransfer::ModelTransfer(TransferWorld* all, Process* process, ModelEngine* engine)
    : all_(all), process_(process), engine_(engine) {
  all_->by_epoch[process->epoch] = this;
}

StatusOr<transfer::RegionId> ModelTransfer::Register(std::span<std::byte> memory, bool writable) {
  return table_.Register(memory, writable);
}

StatusOr<transfer::PeerId> ModelTransfer::Open(const std::string& descriptor) {
  const uint64_t epoch = std::stoull(descriptor);
  const auto known = std::find(peers_.begin(), peers_.end(), epoch);
  if (known == peers_.end()) peers_.push_back(epoch);
  return static_cast<transfer::PeerId>(std::find(peers_.begin(), peers_.end(), epoch) - peers_.begin() + 1);
}

std::string ModelTransfer::Left() const {
  if (!writes_.empty()) return fmt::format("{} writes", writes_.size());
  if (!fences_.empty()) return fmt::format("{} fences", fences_.size());
  return table_.num_open() == 0 ? "" : fmt::format("{} open tickets", table_.num_open());
}

ModelTransfer* ModelTransfer::Peer(uint64_t peer) const {
  const auto found = all_->by_epoch.find(peer);
  return found == all_->by_epoch.end() || found->second->process_->dead ? nullptr : found->second;
}

bool ModelTransfer::Passes(const ModelTransfer* to) const {
  return !to->process_->frozen && all_->network->Passes(*process_, *to->process_);
}

Status ModelTransfer::Submit(transfer::PeerId peer, transfer::Request request, transfer::RequestDone done) {
  auto write = std::make_shared<Write>();  // shared with its slices
  write->peer = peers_.at(peer - 1);
  write->ticket = request.ticket;
  write->done = std::move(done);
  process_->transfer.Post([this, write, intents = std::move(request.intents)] {
    writes_.push_back(write);
    if (process_->dead || Peer(write->peer) == nullptr) return EndWrite(write, Unavailable("peer lost"));
    write->slices_left = static_cast<int>(intents.size());
    for (const transfer::Intent& intent : intents) Launch(write, intent);
  });
  return OkStatus();
}

void ModelTransfer::Launch(const std::shared_ptr<Write>& write, const transfer::Intent& intent) {
  auto slice = std::make_shared<Slice>();
  slice->write = write;
  slice->intent = intent;
  slice->sent_at = all_->world->Now();
  in_flight_.push_back(slice);
  all_->world->After(all_->network->Delay(), [this, slice] { Arrive(slice); });
  process_->transfer.PostAt(all_->world->Now() + milliseconds(2000 + all_->random->Below(1000)),
                            [this, slice] { Look(slice); });
}

// A slice that is not answered for so long has its connection broken. Then it goes again, or the peer is
// lost.
void ModelTransfer::Look(const SlicePtr& slice) {
  if (slice->terminal) return;
  const uint64_t peer = slice->write->peer;
  const ModelTransfer* const to = Peer(peer);
  if (to == nullptr || !Passes(to)) return Lose(peer);
  BreakConnection(peer);
}

// At the receiver. What its link holds back comes later, or never, when nobody sends it again.
void ModelTransfer::Arrive(const SlicePtr& slice) {
  ModelTransfer* const to = Peer(slice->write->peer);
  const bool torn = slice->terminal;
  if (torn && all_->random->Below(2) == 0) return;
  if (to == nullptr) {  // its host answers with a reset
    if (!torn) process_->transfer.Post([this, peer = slice->write->peer] { Lose(peer); });
    return;
  }
  if (!Passes(to)) {
    all_->world->After(milliseconds(5 + all_->random->Below(40)), [this, slice] { Arrive(slice); });
    return;
  }
  const auto target = to->table_.Admit(process_->epoch, slice->write->ticket, transfer::Operation::kWrite,
                                       slice->intent.remote_region, slice->intent.remote_offset,
                                       static_cast<uint32_t>(slice->intent.local.bytes));
  if (!target.ok()) return Answer(slice, target.status());
  slice->to = to;
  slice->target = *target;
  slice->landing_since = all_->world->Now();
  Copy(slice, to, 0, slice->intent.local.bytes / 2);
  all_->world->After(all_->network->Delay(), [this, slice] { Land(slice); });
}

void ModelTransfer::Land(const SlicePtr& slice) {
  ModelTransfer* const to = slice->to;
  if (!to->process_->dead && !Passes(to)) {
    // The receiver gives up a connection that is stuck.
    if (to->process_->frozen || all_->world->Now() - slice->landing_since < milliseconds(1500)) {
      all_->world->After(milliseconds(5 + all_->random->Below(40)), [this, slice] { Land(slice); });
      return;
    }
    return to->table_.Unpin(slice->write->ticket);
  }
  if (!to->process_->dead) {
    Copy(slice, to, slice->intent.local.bytes / 2, slice->intent.local.bytes);
    if (all_->bugs.damage && all_->random->Below(20) == 0) slice->target[3] ^= std::byte{16};
    Answer(slice, OkStatus());
  }
  to->table_.Unpin(slice->write->ticket);
}

void ModelTransfer::Copy(const SlicePtr& slice, ModelTransfer* to, size_t from, size_t until) {
  CheckHeld(*to->engine_, slice->intent.remote_offset, slice->intent.local.bytes, "bytes land in");
  const std::byte* source = slice->copy.data();
  if (slice->copy.empty()) {
    CheckHeld(*engine_, slice->intent.local.offset, slice->intent.local.bytes, "bytes are read from");
    source = engine_->kv_memory().data() + slice->intent.local.offset;
  }
  std::memcpy(slice->target + from, source + from, until - from);
}

void ModelTransfer::CheckHeld(const ModelEngine& engine, uint64_t offset, uint64_t bytes, const char* what) {
  const size_t piece = engine.kv_layout().piece_bytes();
  for (uint64_t at = offset / piece; at * piece < offset + bytes; ++at) {
    const auto page = static_cast<engine::PageId>(at % static_cast<uint64_t>(engine.kv_layout().num_pages));
    if (!engine.TicketHolds(page))
      all_->violation(fmt::format("{} page {}, which no ticket holds", what, page));
  }
}

void ModelTransfer::Answer(const SlicePtr& slice, const Status& status) {
  all_->world->After(all_->network->Delay(), [this, slice, status] {
    if (slice->terminal) return;
    const ModelTransfer* const to = Peer(slice->write->peer);
    if (to != nullptr && !all_->network->Passes(*process_, *to->process_)) return Answer(slice, status);
    process_->transfer.Post([this, slice, status] { EndSlice(slice, status); });
  });
}

void ModelTransfer::EndSlice(const SlicePtr& slice, const Status& status) {
  if (std::exchange(slice->terminal, true)) return;
  std::erase(in_flight_, slice);
  const auto write = slice->write;
  if (!status.ok()) {
    EndWrite(write, status);
  } else if (--write->slices_left == 0) {
    EndWrite(write, OkStatus());
  }
  AnswerFences();
}

void ModelTransfer::EndWrite(const std::shared_ptr<Write>& write, const Status& status) {
  if (std::exchange(write->over, true)) return;
  std::erase(writes_, write);
  std::move(write->done)(status);
}

// Nothing of what is on its way is heard of again; its bytes may be.
void ModelTransfer::BreakConnection(uint64_t peer) {
  for (const SlicePtr& slice : std::vector<SlicePtr>(in_flight_)) {
    if (slice->write->peer != peer) continue;
    const transfer::Range& local = slice->intent.local;
    const std::byte* const from = engine_->kv_memory().data() + local.offset;
    slice->copy.assign(from, from + local.bytes);
    slice->terminal = true;
    std::erase(in_flight_, slice);
    if (slice->write->over) continue;
    if (all_->bugs.flush_is_success) {
      if (--slice->write->slices_left == 0) EndWrite(slice->write, OkStatus());
    } else {
      Launch(slice->write, slice->intent);
    }
  }
  AnswerFences();
}

void ModelTransfer::Lose(uint64_t peer) {
  for (const auto& write : std::vector<std::shared_ptr<Write>>(writes_)) {
    if (write->peer == peer) EndWrite(write, Unavailable("peer lost"));
  }
  BreakConnection(peer);
}

void ModelTransfer::OnDeath() {
  for (const uint64_t peer : peers_) Lose(peer);
}

void ModelTransfer::Cancel(transfer::PeerId peer, transfer::TicketId ticket, transfer::TicketDone done) {
  process_->transfer.Post([this, epoch = peers_.at(peer - 1), ticket, done = std::move(done)]() mutable {
    for (const auto& write : std::vector<std::shared_ptr<Write>>(writes_)) {
      if (write->peer == epoch && write->ticket == ticket) EndWrite(write, Cancelled("cancelled"));
    }
    if (all_->bugs.cancel_at_once) return std::move(done)();
    fences_.push_back({epoch, ticket, std::move(done)});
    AnswerFences();
  });
}

bool ModelTransfer::InFlight(uint64_t peer, transfer::TicketId ticket) const {
  return std::any_of(in_flight_.begin(), in_flight_.end(), [&](const SlicePtr& slice) {
    return slice->write->peer == peer && slice->write->ticket == ticket;
  });
}

void ModelTransfer::AnswerFences() {
  for (size_t i = 0; i < fences_.size();) {
    if (InFlight(fences_[i].peer, fences_[i].ticket)) {
      ++i;
      continue;
    }
    transfer::TicketDone done = std::move(fences_[i].done);
    fences_.erase(fences_.begin() + static_cast<std::ptrdiff_t>(i));
    std::move(done)();
  }
}

void ModelTransfer::CloseTicket(transfer::TicketId ticket, transfer::TicketDone done) {
  process_->transfer.Post([this, ticket, done = std::move(done)]() mutable {
    if (all_->bugs.close_forgotten && all_->random->Below(4) == 0) {
      table_.Close(ticket, [] {});
    } else if (all_->bugs.close_at_once) {
      std::move(done)();
      table_.Close(ticket, [] {});
    } else {
      table_.Close(ticket, std::move(done));
    }
  });
}

}  // namespace millrace::sim
