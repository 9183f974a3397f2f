#pragma once
// Copies of the same slice at the receiver. A slice may be sent again on another connection or another kind
// of rail (its path failed, or it was late); then the earlier copy must not land after the later one, or
// bytes that are long reported as written could change again. Transfer thread only.
//
// A sender counts copies (attempt) and says with every slice which ids are behind it (retired_below: every
// smaller id is terminal in every copy, so whatever still arrives of it is a leftover of a dead connection).
// An entry is needed only for slices that are landing now or were sent more than once, and goes when its id
// is retired.

#include <cstddef>
#include <cstdint>

#include "absl/container/btree_map.h"
#include "absl/container/flat_hash_map.h"

namespace millrace::transfer {

// Somebody in the middle of landing a copy.
class Lander {
 public:
  virtual ~Lander() = default;
  // A later copy of the slice takes over: when this returns nothing of this copy lands any more, and its
  // ticket's pin is given back. End() must not be called for it.
  virtual void Supersede() = 0;
};

class LandingTable {
 public:
  // A connection of that peer exists: as long as one does, leftovers may arrive. Leave with the last one
  // forgets the peer.
  void Join(uint64_t peer_epoch) { ++peers_[peer_epoch].connections; }
  void Leave(uint64_t peer_epoch);

  // Before a copy lands; between Join and Leave. False: a later copy came already, or the slice is retired;
  // nothing of this may land. `lander` is kept until End.
  bool Begin(uint64_t peer_epoch, uint64_t slice, uint32_t attempt, uint64_t retired_below, Lander* lander);
  // The copy has landed, or its connection is gone. Only after Begin gave true.
  void End(uint64_t peer_epoch, uint64_t slice);

  uint64_t num_superseded() const { return num_superseded_; }
  size_t num_entries() const;

 private:
  struct Entry {
    uint32_t attempt = 0;
    Lander* lander = nullptr;
  };
  struct PeerLanding {
    int32_t connections = 0;
    uint64_t retired_below = 0;
    absl::btree_map<uint64_t, Entry> slices;
  };
  absl::flat_hash_map<uint64_t, PeerLanding> peers_;
  uint64_t num_superseded_ = 0;
};

}  // namespace millrace::transfer
