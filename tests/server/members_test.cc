// How ranks agree on who is a member: random losses, crashes, cuts and returns, messages in order on each
// connection but late; in the end those that can reach each other believe the same.
#include "server/group/members.h"

#include <gtest/gtest.h>

#include <deque>
#include <memory>
#include <vector>

#include "base/random.h"
#include "base/status.h"

namespace millrace::server {
namespace {

using engine::RankBit;
using engine::RankMask;

// As NetFabric does it: a connection is lost for both ends, at different times; who is no member any more is
// disconnected; a rank that was cast out ends, and comes back as a new process.
class World {
 public:
  World(int ranks, uint64_t seed) : ranks_(ranks), random_(seed), cut_(Cells(), false) {
    for (int r = 0; r < ranks; ++r) Start(r);
  }

  void Start(int rank) {
    for (int other = 0; other < ranks_; ++other) Unlink(rank, other);
    nodes_[rank] = std::make_unique<MembersBelief>(rank, ranks_);
  }
  void Cut(int a, int b, bool cut) { cut_[Cell(a, b)] = cut_[Cell(b, a)] = cut; }
  void HealAll() { std::fill(cut_.begin(), cut_.end(), false); }

  // Anything that could happen next.
  void Step() {
    const int a = static_cast<int>(random_.Below(static_cast<uint64_t>(ranks_)));
    const int b = static_cast<int>(random_.Below(static_cast<uint64_t>(ranks_)));
    if (a == b) return;
    if (nodes_[a]->cast_out()) return Start(a);
    if (link_[Cell(a, b)]) {
      if (!link_[Cell(b, a)] || cut_[Cell(a, b)]) return LostAt(a, b);
      return Deliver(a, b);
    }
    if (!link_[Cell(b, a)] && !cut_[Cell(a, b)]) Connect(a, b);
  }
  void Crash() { Start(static_cast<int>(random_.Below(static_cast<uint64_t>(ranks_)))); }
  Random& random() { return random_; }

  bool Settled() const {
    for (int r = 0; r < ranks_; ++r) {
      if (!nodes_[r]->member() || nodes_[r]->now() != nodes_[0]->now()) return false;
    }
    return nodes_[0]->now().alive == RankBit(ranks_) - 1;
  }
  // Two ranks that believe the same of the members are members to each other.
  void Check() const {
    for (int r = 0; r < ranks_; ++r) {
      const RankMask alive = nodes_[r]->now().alive;
      ASSERT_TRUE(!nodes_[r]->member() || (alive & RankBit(r)) != 0);
    }
  }
  std::string Describe() const {
    std::string text;
    for (int r = 0; r < ranks_; ++r) {
      text += fmt::format("rank {}: epoch {}, {:b}{}\n", r, nodes_[r]->now().epoch, nodes_[r]->now().alive,
                          nodes_[r]->cast_out() ? ", cast out" : "");
    }
    return text;
  }

 private:
  struct Said {
    Members members;
  };
  size_t Cells() const { return static_cast<size_t>(ranks_) * static_cast<size_t>(ranks_); }
  size_t Cell(int a, int b) const { return static_cast<size_t>(a * ranks_ + b); }
  RankMask Linked(int a) const {
    RankMask linked = 0;
    for (int b = 0; b < ranks_; ++b) {
      if (b != a && link_[Cell(a, b)]) linked |= RankBit(b);
    }
    return linked;
  }
  void Unlink(int a, int b) {
    link_[Cell(a, b)] = false;
    queue_[Cell(b, a)].clear();
  }
  // At `a`: the connection to `b` has ended.
  void LostAt(int a, int b) {
    Unlink(a, b);
    const Members before = nodes_[a]->now();
    if (nodes_[a]->Lost(b)) Tell(a, before);
  }
  void Tell(int a, const Members& before) {
    for (int b = 0; b < ranks_; ++b) {
      if (b != a && link_[Cell(a, b)]) queue_[Cell(a, b)].push_back({nodes_[a]->now()});
    }
    for (int b = 0; b < ranks_; ++b) {
      if (b != a && (before.alive & ~nodes_[a]->now().alive & RankBit(b)) != 0) link_[Cell(a, b)] = false;
    }
  }
  void Connect(int a, int b) {
    MembersBelief& left = *nodes_[a];
    MembersBelief& right = *nodes_[b];
    if (left.cast_out() || right.cast_out()) return;
    if (left.member() && right.member()) {
      if ((left.now().alive & RankBit(b)) != 0 || (right.now().alive & RankBit(a)) != 0) return;
      MembersBelief& loser = left.GivesWayTo(right.now()) ? left : right;
      ASSERT_NE(left.GivesWayTo(right.now()), right.GivesWayTo(left.now()));
      const Members before = loser.now();
      loser.CastOut();
      return Tell(&loser == &left ? a : b, before);
    }
    link_[Cell(a, b)] = link_[Cell(b, a)] = true;
    queue_[Cell(a, b)].clear();
    queue_[Cell(b, a)].clear();
    for (const auto& [from, to] : {std::pair(a, b), std::pair(b, a)}) {
      if (nodes_[from]->member()) queue_[Cell(from, to)].push_back({nodes_[from]->now()});
    }
  }
  // The next message from b, or b's beat.
  void Deliver(int a, int b) {
    auto& queue = queue_[Cell(b, a)];
    MembersBelief& node = *nodes_[a];
    const Members before = node.now();
    bool changed = false;
    if (!queue.empty()) {
      changed = node.Heard(b, queue.front().members, Linked(a));
      queue.pop_front();
    } else if (!nodes_[b]->member() && !nodes_[b]->cast_out()) {
      RankMask unformed = 0;
      const RankMask all = RankBit(ranks_) - 1;
      for (int r = 0; r < ranks_; ++r) {
        if (r != a && link_[Cell(a, r)] && !nodes_[r]->member() && (Linked(r) | RankBit(r)) == all)
          unformed |= RankBit(r);
      }
      changed = node.Asked(b, Linked(b) | RankBit(b)) || node.Form(unformed);
    } else if (nodes_[b]->member() && node.member() && !node.Has(b) && random_.Below(20) == 0) {
      return LostAt(a, b);
    }
    if (changed) Tell(a, before);
  }

  const int ranks_;
  Random random_;
  std::vector<bool> cut_;
  std::unique_ptr<MembersBelief> nodes_[8];
  bool link_[64] = {};          // as the first of the two sees it
  std::deque<Said> queue_[64];  // from the first to the second
};

TEST(Members, ComeToAgree) {
  for (uint64_t seed = 0; seed < 20000; ++seed) {
    const int ranks = 2 + static_cast<int>(seed % 4);
    World world(ranks, seed);
    for (int i = 0; i < 20000 && !world.Settled(); ++i) world.Step();
    ASSERT_TRUE(world.Settled()) << "seed " << seed << " at the start:\n" << world.Describe();
    for (int fault = 0; fault < 6; ++fault) {
      const uint64_t steps = world.random().Below(120);
      if (world.random().Below(2) == 0) {
        world.Crash();
      } else {
        const int a = static_cast<int>(world.random().Below(static_cast<uint64_t>(ranks)));
        for (int b = 0; b < ranks; ++b) {
          if (b != a) world.Cut(a, b, world.random().Below(3) != 0);
        }
      }
      for (uint64_t i = 0; i < steps; ++i) world.Step();
      world.Check();
      if (world.random().Below(2) == 0) world.HealAll();
    }
    world.HealAll();
    for (int i = 0; i < 50000 && !world.Settled(); ++i) world.Step();
    ASSERT_TRUE(world.Settled()) << "seed " << seed << " in the end:\n" << world.Describe();
  }
}

TEST(Members, TheBetterPartGoesOn) {
  EXPECT_TRUE(Better(0b0111, 0b1100));  // more
  EXPECT_TRUE(Better(0b0011, 0b1100));  // the lowest rank
  EXPECT_TRUE(Better(0b0101, 0b1001));
  EXPECT_FALSE(Better(0b1100, 0b0011));
}

}  // namespace
}  // namespace millrace::server
