#include <algorithm>

#include "server/group/net_fabric.h"

namespace millrace::server {

using engine::RankBit;
using engine::RankMask;
using engine::RankMemory;
using engine::Shown;

StatusOr<std::shared_ptr<const RankMemory>> NetFabric::Open(int32_t rank) {
  const std::lock_guard lock(mutex_);
  const Peer& peer = PeerOf(rank);
  if (!peer.granted || peer.incarnation != control_.incarnations[rank].load())
    return Unavailable("rank {} has just been lost", rank);
  return std::shared_ptr<const RankMemory>(peer.copy);
}

// What is on its way to a rank that was lost does not count: nobody will be told that it is there.
void NetFabric::Settle() {
  std::unique_lock lock(mutex_);
  ForEach(Linked(), [&](int32_t rank) {
    Peer& peer = PeerOf(rank);
    if (peer.under_way > 0) transfer_->Cancel(peer.transfer, peer.their_ticket, [] {});
    peer.telling.clear();
  });
  landed_.wait(lock, [&] {
    return std::all_of(peers_.begin(), peers_.end(), [](const Peer& peer) { return peer.under_way == 0; });
  });
}

group::GroupMessage NetFabric::Saying(Peer& peer, Shown what) {
  const engine::RankHeader& header = own_->header();
  const uint64_t position = header.at.load();
  group::GroupMessage message;
  group::GroupAt& at = *message.mutable_at();
  at.set_epoch(belief_.now().epoch);
  at.set_alive(static_cast<uint32_t>(belief_.now().alive));
  at.set_step(position & ((uint64_t{1} << engine::kStepBits) - 1));
  if (what == Shown::kWish) {
    group::GroupAt::Wish& wish = *at.mutable_wish();
    wish.set_kind(static_cast<uint32_t>(header.wanted.load()));
    wish.set_mtp(header.wanted_mtp.load() != 0);
    const uint64_t version = header.held_version.load();
    if (peer.held_told != version) {
      wish.set_held_version(version);
      wish.set_held(own_->held(), Cells());
      peer.held_told = version;
    }
  } else if (what == Shown::kRows) {
    at.set_num_rows(static_cast<uint32_t>(header.num_rows.load()));
  }
  return message;
}

// What that rank needs of this exchange: the rows that it computes, once each, or its products.
std::vector<transfer::Intent> NetFabric::Pieces(int32_t rank, Shown what) const {
  std::vector<transfer::Intent> pieces;
  const transfer::RegionId there = peers_[static_cast<size_t>(rank)].their_region;
  const auto add = [&](const void* from, size_t to, size_t bytes) {
    pieces.push_back(
        {.local = {own_region_, own_->OffsetOf(from), bytes}, .remote_region = there, .remote_offset = to});
  };
  const auto top_k = static_cast<size_t>(shape_.experts_per_token);
  if (what == Shown::kProducts) {
    const RankMemory& copy = *peers_[static_cast<size_t>(rank)].copy;
    const auto rows = static_cast<size_t>(std::clamp(copy.header().num_rows.load(), 0, shape_.rows_max));
    const auto mine = static_cast<size_t>(
        std::count(copy.owners(), copy.owners() + rows * top_k, static_cast<uint8_t>(rank_)));
    const size_t bytes = mine * static_cast<size_t>(shape_.hidden_size) * sizeof(float);
    if (bytes > 0) add(own_->products(rank), copy.OffsetOf(copy.products(rank_)), bytes);
    return pieces;
  }
  if (what != Shown::kRows) return pieces;
  const auto rows = static_cast<size_t>(own_->header().num_rows.load());
  const auto wants = [&](size_t row) {
    const uint8_t* const owners = own_->owners() + row * top_k;
    return std::find(owners, owners + top_k, static_cast<uint8_t>(rank)) != owners + top_k;
  };
  for (size_t row = 0; row < rows; ++row) {
    if (!wants(row)) continue;
    const size_t first = row;
    while (row + 1 < rows && wants(row + 1)) ++row;
    const std::byte* const from = own_->rows() + first * shape_.row_bytes;
    add(from, own_->OffsetOf(from), (row + 1 - first) * shape_.row_bytes);
  }
  if (pieces.empty()) return pieces;
  add(own_->experts(), own_->OffsetOf(own_->experts()), rows * top_k * sizeof(int32_t));
  add(own_->owners(), own_->OffsetOf(own_->owners()), rows * top_k);
  return pieces;
}

void NetFabric::Show(RankMask ranks, Shown what) {
  const std::lock_guard lock(mutex_);
  const uint32_t epoch = belief_.now().epoch;
  // The belief has changed under this pass: every wait of it ends.
  if (!engine::SameEpoch(own_->header().at.load(), engine::MakeAt(epoch, 0))) return;
  ForEach(ranks & belief_.now().alive & Linked(), [&](int32_t rank) {
    Peer& peer = PeerOf(rank);
    auto telling = std::make_shared<Telling>();
    telling->message = Saying(peer, what);
    transfer::Request request;
    request.intents = Pieces(rank, what);
    request.ticket = peer.their_ticket;
    request.deadline = Clock::System().Now() + stall_max_;
    if (request.intents.empty()) {
      // Nothing for that rank: as if there were no rows.
      if (what == Shown::kRows) telling->message.mutable_at()->set_num_rows(0);
      telling->landed = true;
    }
    peer.telling.push_back(telling);
    if (telling->landed) return Flush(peer);
    ++peer.under_way;
    const Status status = transfer_->Submit(
        peer.transfer, std::move(request),
        [this, rank, epoch, telling, link = std::weak_ptr(peer.link)](const Status& landed) {
          {
            const std::lock_guard done(mutex_);
            Peer& to = PeerOf(rank);
            if (to.link == nullptr || to.link != link.lock()) return;  // lost meanwhile
            --to.under_way;
            landed_.notify_all();
            if (landed.ok()) {
              telling->landed = true;
              return Flush(to);
            }
          }
          if (!landed.ok() && !absl::IsCancelled(landed))
            Remove(rank, epoch, fmt::format("rows did not get there: {}", Message(landed)).c_str());
        });
    if (!status.ok()) {
      --peer.under_way;
      peer.link->Close(fmt::format("rows cannot be sent: {}", Message(status)));
    }
  });
}

void NetFabric::Flush(Peer& peer) {
  for (; !peer.telling.empty() && peer.telling.front()->landed; peer.telling.pop_front()) {
    peer.link->Send(peer.telling.front()->message);
  }
}

}  // namespace millrace::server
