#pragma once
// How ranks without common memory agree on who is a member. Pure; one per rank.
//
// There is no leader whose loss would need an election, and no majority: a group of two must survive one.
// Each rank says what it believes, an epoch and the members, and whoever hears a later belief of a member
// takes it over. A rank that loses another one says so in the next epoch. Beliefs of the same epoch that
// differ are settled by a rule that all follow (Better), in the next epoch. Where a network is cut, both
// sides go on; when it heals, the side that is worse by the same rule ends. That is harmless because ranks
// that do not believe the same take nothing from each other (GroupAt names the whole belief), and because
// what a rank computes does not depend on who the members are.

#include <cstdint>

#include "engine/moe/expert_placement.h"

namespace millrace::server {

struct Members {
  uint32_t epoch = 0;
  engine::RankMask alive = 0;  // 0: this rank has not become a member yet
  bool operator==(const Members&) const = default;
};

// More members are better, then the lowest rank, then any order.
bool Better(engine::RankMask a, engine::RankMask b);

class MembersBelief {
 public:
  MembersBelief(int32_t rank, int32_t num_ranks) : rank_(rank), num_ranks_(num_ranks) {}

  const Members& now() const { return now_; }
  bool member() const { return now_.alive != 0 && !cast_out_; }
  bool cast_out() const { return cast_out_; }
  bool Has(int32_t rank) const { return (now_.alive & engine::RankBit(rank)) != 0; }

  // `linked`: the ranks that this one has a connection to. Each returns true when the belief has changed, so
  // that the others are to hear it.

  // A rank that this one cannot reach, or that has given up its membership.
  bool Lost(int32_t rank);
  // What `from` believes.
  bool Heard(int32_t from, const Members& theirs, engine::RankMask linked);
  // Another rank that is no member, and the ranks that it is connected to: the lowest member lets it in once
  // these are all of the members.
  bool Asked(int32_t from, engine::RankMask its_links);
  // The same before there is a group: rank 0 makes one when it and every other rank are connected to all.
  // `unformed`: ranks that have said that they are connected to all others and know no group.
  bool Form(engine::RankMask unformed);
  // Another part of the same group, after a cut: true when this rank must give way.
  bool GivesWayTo(const Members& theirs) const;
  void CastOut();

 private:
  void DropUnlinked(engine::RankMask linked);

  const int32_t rank_;
  const int32_t num_ranks_;
  Members now_;
  bool cast_out_ = false;
};

}  // namespace millrace::server
