#include "transfer/landing.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace millrace::transfer {

void LandingTable::Leave(uint64_t peer_epoch) {
  const auto found = peers_.find(peer_epoch);
  MR_CHECK(found != peers_.end() && found->second.connections > 0);
  if (--found->second.connections == 0) peers_.erase(found);
}

bool LandingTable::Begin(uint64_t peer_epoch, uint64_t slice, uint32_t attempt, uint64_t retired_below,
                         Lander* lander) {
  PeerLanding& peer = peers_.at(peer_epoch);
  if (retired_below > peer.retired_below) {
    peer.retired_below = retired_below;
    // A copy of a retired slice that is still landing is a leftover of a connection that its sender gave up.
    // Superseding may end other copies as well, and so change the table: from its front every time.
    while (!peer.slices.empty() && peer.slices.begin()->first < retired_below) {
      Lander* const old = peer.slices.begin()->second.lander;
      peer.slices.erase(peer.slices.begin());
      if (old == nullptr) continue;
      ++num_superseded_;
      old->Supersede();
    }
  }
  if (slice < peer.retired_below) {
    ++num_superseded_;
    return false;
  }
  Entry& entry = peer.slices[slice];
  if (attempt <= entry.attempt) {
    ++num_superseded_;
    return false;
  }
  entry.attempt = attempt;
  if (Lander* const old = std::exchange(entry.lander, nullptr)) {
    ++num_superseded_;
    old->Supersede();
  }
  peer.slices[slice].lander = lander;  // looked up anew: superseding may have changed the table
  return true;
}

void LandingTable::End(uint64_t peer_epoch, uint64_t slice) {
  PeerLanding& peer = peers_.at(peer_epoch);
  const auto found = peer.slices.find(slice);
  MR_CHECK(found != peer.slices.end());
  // A first copy that has ended leaves nothing behind: nothing earlier can come.
  if (found->second.attempt == 1) {
    peer.slices.erase(found);
  } else {
    found->second.lander = nullptr;
  }
}

size_t LandingTable::num_entries() const {
  size_t count = 0;
  for (const auto& [epoch, peer] : peers_) count += peer.slices.size();
  return count;
}

}  // namespace millrace::transfer
