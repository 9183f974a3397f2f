#pragma once
// How the ranks of a group come to see each other's memory and agree on who is a member: shared memory on one
// host (shm_group.h), messages and the transfer engine between hosts (server/group). The protocol of passes
// on top of it is the same (rank_group.h).

#include <memory>

#include "base/status.h"
#include "engine/moe/rank_memory.h"

namespace millrace::engine {

// What an exchange shows to the others.
enum class Shown {
  kWish,      // the pass that this rank wants, and what it holds
  kRows,      // num_rows rows, their experts and owners
  kProducts,  // for the rows of every other rank
  kNothing,   // only that this rank has come so far
};

class GroupFabric {
 public:
  virtual ~GroupFabric() = default;

  virtual RankMemory& own() = 0;
  virtual ControlHeader& control() = 0;

  // Becomes a member, or asks to. Once, before all else.
  virtual Status Enter() = 0;
  // True once the group has been complete and this rank is in it; an error when that cannot be.
  virtual StatusOr<bool> Formed() = 0;
  // Those that have been heard of. Any thread.
  virtual RankMask present() = 0;

  // Engine thread. The memory of a living rank, of the incarnation that control() names.
  virtual StatusOr<std::shared_ptr<const RankMemory>> Open(int32_t rank) = 0;
  // Engine thread. Returns when nothing that this rank has shown is under way any more.
  virtual void Settle() = 0;
  // Engine thread. Lets `peers` see what own() has, and then own().header().at.
  virtual void Show(RankMask peers, Shown what) = 0;

  // Any thread. Ends a rank's membership, if it is a member in that epoch. Whoever is first says it.
  virtual void Remove(int32_t rank, uint32_t epoch, const char* reason) = 0;
  // Any thread. Wakes those that wait on control().bell.
  virtual void Ring() = 0;
};

}  // namespace millrace::engine
