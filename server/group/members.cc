#include "server/group/members.h"

#include <bit>

namespace millrace::server {

using engine::RankBit;
using engine::RankMask;

bool Better(RankMask a, RankMask b) {
  if (std::popcount(a) != std::popcount(b)) return std::popcount(a) > std::popcount(b);
  if (std::countr_zero(a) != std::countr_zero(b)) return std::countr_zero(a) < std::countr_zero(b);
  return a < b;
}

bool MembersBelief::Lost(int32_t rank) {
  if (!member() || !Has(rank)) return false;
  now_ = {now_.epoch + 1, now_.alive & ~RankBit(rank)};
  return true;
}

bool MembersBelief::Heard(int32_t from, const Members& theirs, RankMask linked) {
  if (cast_out_) return false;
  const bool has_me = (theirs.alive & RankBit(rank_)) != 0;
  if (now_.alive == 0) {
    if (!has_me) return false;
    now_ = theirs;
    DropUnlinked(linked);
    return true;
  }
  // What it said before this rank was let in, or after it was let go.
  if (!Has(from) || theirs.epoch < now_.epoch || theirs == now_) return false;
  Members next = theirs;
  if (theirs.epoch == now_.epoch) {
    next = {now_.epoch + 1, Better(theirs.alive, now_.alive) ? theirs.alive : now_.alive};
  }
  if ((next.alive & RankBit(rank_)) == 0) {
    CastOut();
    return true;
  }
  now_ = next;
  DropUnlinked(linked);
  return true;
}

// A belief with members that cannot be reached from here is one that has lost them.
void MembersBelief::DropUnlinked(RankMask linked) {
  const RankMask reachable = now_.alive & (linked | RankBit(rank_));
  if (reachable != now_.alive) now_ = {now_.epoch + 1, reachable};
}

bool MembersBelief::Asked(int32_t from, RankMask its_links) {
  if (!member() || Has(from) || std::countr_zero(now_.alive) != rank_) return false;
  if ((now_.alive & ~its_links) != 0) return false;
  now_ = {now_.epoch + 1, now_.alive | RankBit(from)};
  return true;
}

bool MembersBelief::Form(RankMask unformed) {
  const RankMask all = RankBit(num_ranks_) - 1;
  if (rank_ != 0 || now_.alive != 0 || cast_out_ || (unformed | RankBit(0)) != all) return false;
  now_ = {1, all};
  return true;
}

bool MembersBelief::GivesWayTo(const Members& theirs) const {
  return member() && Better(theirs.alive, now_.alive);
}

void MembersBelief::CastOut() {
  cast_out_ = true;
  now_ = {now_.epoch + 1, now_.alive & ~RankBit(rank_)};
}

}  // namespace millrace::server
