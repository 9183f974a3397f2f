// A peer's scheduler over paths that do what the test says, on a clock that moves when the test says. What it
// does over many rails and faults is the simulator's business (tests/sim).
#include "transfer/peer.h"

#include <gtest/gtest.h>

#include <array>
#include <map>

#include "transfer/landing.h"

namespace millrace::transfer {
namespace {

using std::chrono::milliseconds;

class ScriptedPath : public Path {
 public:
  ScriptedPath(std::string name, bool overtakes) {
    traits_.kind = "scripted";
    traits_.local_rail = traits_.remote_rail = std::move(name);
    traits_.overtakes = overtakes;
  }
  const PathTraits& traits() const override { return traits_; }
  void Connect() override { owner_->OnConnected(this); }
  void Disconnect() override {
    for (const auto& [id, slice] : std::exchange(in_flight, {}))
      owner_->OnSliceDone(this, id, SliceOutcome::kUnknown);
  }
  void Send(const Slice& slice) override { in_flight.emplace(slice.id, slice); }
  void Probe(uint64_t probe) override { owner_->OnProbeDone(this, probe); }

  void Land(uint64_t slice) {
    ASSERT_EQ(in_flight.erase(slice), 1U);
    owner_->OnSliceDone(this, slice, SliceOutcome::kLanded);
  }
  void LandAll() {
    while (!in_flight.empty()) Land(in_flight.begin()->first);
  }
  void MeetAnotherEpoch() { owner_->OnRefused(Unavailable("the process has restarted")); }
  uint64_t bytes() const {
    uint64_t sum = 0;
    for (const auto& [id, slice] : in_flight) sum += slice.local.size();
    return sum;
  }

  std::map<uint64_t, Slice> in_flight;

 private:
  PathTraits traits_;
};

class PeerTest : public testing::Test {
 protected:
  ScriptedPath* AddPath(const char* name, bool overtakes = true) {
    auto path = std::make_unique<ScriptedPath>(name, overtakes);
    ScriptedPath* const raw = path.get();
    peer_.AddPath(std::move(path));
    peer_.Tick(clock_.Now());  // connects
    return raw;
  }
  void Submit(uint64_t bytes, absl::StatusCode ends_as = absl::StatusCode::kOk) {
    auto list =
        IntentList::Create(memory_, {{.local = {region_, 0, bytes}, .remote_region = 1, .remote_offset = 0}});
    ASSERT_TRUE(list.ok()) << list.status();
    Request request;
    request.ticket = 1;
    peer_.Add(request, *std::move(list), [this, ends_as](Status status) {
      EXPECT_EQ(status.code(), ends_as) << status;
      ++done_;
    });
  }
  void Advance(Duration by) {
    clock_.Advance(by);
    peer_.Tick(clock_.Now());
  }

  Options options_;
  FakeClock clock_;
  std::vector<std::byte> bytes_ = std::vector<std::byte>(16 << 20);
  std::shared_ptr<MemoryTable> memory_ = std::make_shared<MemoryTable>();
  RegionId region_ = memory_->Register(bytes_, true);
  Peer peer_{1, 7, "peer", &options_, &clock_, 1};
  int done_ = 0;
};

TEST_F(PeerTest, ALateSliceIsSentAgainOnAnotherPath) {
  ScriptedPath* const slow = AddPath("slow");
  Submit(4096);
  ASSERT_EQ(slow->in_flight.size(), 1U);
  const uint64_t slice = slow->in_flight.begin()->first;
  ScriptedPath* const other = AddPath("other");
  Advance(options_.late_min / 2);
  EXPECT_TRUE(other->in_flight.empty()) << "not late yet";
  Advance(options_.late_min);
  ASSERT_TRUE(other->in_flight.contains(slice));
  EXPECT_EQ(other->in_flight.at(slice).attempt, 2U);
  other->Land(slice);
  EXPECT_EQ(done_, 0) << "the first copy may still be read from memory";
  slow->Land(slice);
  EXPECT_EQ(done_, 1);
}

// After an outage in which only this side lost the other one, that side still knows of the slices before it.
TEST_F(PeerTest, APeerThatIsOpenedAgainNumbersItsSlicesAboveAllBefore) {
  ScriptedPath* const path = AddPath("path");
  for (int i = 0; i < 3; ++i) Submit(4096);
  const Slice last = path->in_flight.rbegin()->second;
  path->LandAll();
  Peer again(2, 7, "peer", &options_, &clock_, 1);
  auto owned = std::make_unique<ScriptedPath>("path", true);
  ScriptedPath* const next = owned.get();
  again.AddPath(std::move(owned));
  again.Tick(clock_.Now());
  auto list =
      IntentList::Create(memory_, {{.local = {region_, 0, 4096}, .remote_region = 1, .remote_offset = 0}});
  ASSERT_TRUE(list.ok()) << list.status();
  Request request;
  request.ticket = 1;
  again.Add(std::move(request), *std::move(list), [this](Status) { ++done_; });
  ASSERT_EQ(next->in_flight.size(), 1U);
  const Slice first = next->in_flight.begin()->second;
  EXPECT_GT(first.id, last.id);

  struct Ignored : Lander {
    void Supersede() override {}
  } lander;
  LandingTable table;
  table.Join(5);  // a connection of the time before, which this side has not seen end
  EXPECT_TRUE(table.Begin(5, last.id, last.attempt, last.id, &lander));
  table.End(5, last.id);
  table.Join(5);
  EXPECT_TRUE(table.Begin(5, first.id, first.attempt, first.retired_below, &lander))
      << "taken for a leftover";
  table.End(5, first.id);
  next->LandAll();
}

// One copy of the first slice has landed at the old process, the other is under way; of the second both are.
TEST_F(PeerTest, ARestartEndsRequestsWithTwoCopiesOnceAndLetsGoOfTheirMemory) {
  ScriptedPath* const slow = AddPath("slow");
  Submit(4096, absl::StatusCode::kUnavailable);
  Submit(4096, absl::StatusCode::kUnavailable);
  ASSERT_EQ(slow->in_flight.size(), 2U);
  ScriptedPath* const other = AddPath("other");
  Advance(2 * options_.late_min);
  ASSERT_EQ(other->in_flight.size(), 2U);
  other->Land(other->in_flight.begin()->first);
  EXPECT_FALSE(memory_->Deregister(region_).ok());
  other->MeetAnotherEpoch();
  Advance(milliseconds(1));
  EXPECT_TRUE(peer_.lost());
  EXPECT_EQ(done_, 2);
  EXPECT_TRUE(peer_.drained());
  EXPECT_TRUE(slow->in_flight.empty() && other->in_flight.empty());
  EXPECT_TRUE(memory_->Deregister(region_).ok());
}

TEST_F(PeerTest, TheFloorOfLatenessIsAnOption) {
  options_.late_min = milliseconds(100);
  ScriptedPath* const slow = AddPath("slow");
  Submit(4096);
  ScriptedPath* const other = AddPath("other");
  Advance(milliseconds(99));
  EXPECT_TRUE(other->in_flight.empty());
  Advance(milliseconds(2));
  EXPECT_EQ(other->in_flight.size(), 1U);
  other->LandAll();
  slow->LandAll();
}

// The copy on such a path could only be overtaken by breaking its connection.
TEST_F(PeerTest, ASliceOnAPathThatCannotBeOvertakenIsNotSentAgainWhileThePathLives) {
  ScriptedPath* const slow = AddPath("slow", false);
  Submit(4096);
  const uint64_t slice = slow->in_flight.begin()->first;
  ScriptedPath* const other = AddPath("other");
  Advance(2 * options_.late_min);
  EXPECT_TRUE(other->in_flight.empty());
  ASSERT_TRUE(slow->in_flight.contains(slice));
  // It says nothing while the other is heard: it is given up, and then the slice goes over the other.
  for (int i = 0; i < 20 && !slow->in_flight.empty(); ++i) {
    Submit(4096);
    Advance(options_.late_min / 4);
    for (auto it = other->in_flight.begin(); it != other->in_flight.end();) other->Land((it++)->first);
    Advance(options_.late_min / 4);
  }
  EXPECT_TRUE(slow->in_flight.empty());
  other->LandAll();
  EXPECT_EQ(peer_.queue().num_requests(), 0U);
}

// Two paths, and requests enough that the fast one is always busy but never so long that a slow one is worth
// it.
class TwoPaths : public PeerTest {
 protected:
  void SetUp() override { paths_ = {AddPath("first"), AddPath("second")}; }
  void TearDown() override {
    while (peer_.queue().num_requests() > 0) {
      for (ScriptedPath* const path : paths_) path->LandAll();
      Advance(milliseconds(1));
    }
  }
  // Each path takes so many ms for 64 KiB. How many bytes the second was given.
  uint64_t Run(int first_ms, int second_ms, Duration length) {
    uint64_t given = 0;
    const TimePoint end = clock_.Now() + length;
    while (clock_.Now() < end) {
      while (peer_.queue().num_requests() < 8) Submit(64 << 10);
      for (const size_t i : {0, 1}) {
        busy_[i] = paths_[i]->in_flight.empty() ? 0 : busy_[i] + 1;
        if (busy_[i] < (i == 0 ? first_ms : second_ms)) continue;
        busy_[i] = 0;
        if (i == 1) given += paths_[i]->in_flight.begin()->second.local.size();
        paths_[i]->Land(paths_[i]->in_flight.begin()->first);
      }
      Advance(milliseconds(1));
    }
    return given;
  }

  std::array<ScriptedPath*, 2> paths_{};
  std::array<int, 2> busy_{};
};

TEST_F(TwoPaths, OneThatWasSlowForAWhileIsUsedAgain) {
  options_.late_min = std::chrono::seconds(10);  // nothing is late here: it only becomes slow
  EXPECT_GT(Run(1, 1, milliseconds(200)), 4U << 20);
  Run(1, 500, std::chrono::seconds(2));
  EXPECT_EQ(Run(1, 500, milliseconds(300)), 0U) << "not worth its while";
  Run(1, 1, milliseconds(1500));
  EXPECT_GT(Run(1, 1, milliseconds(200)), 4U << 20);
}

TEST_F(TwoPaths, OneThatWasNeverFasterIsNotTriedAgain) {
  options_.late_min = std::chrono::seconds(10);
  Run(1, 500, std::chrono::seconds(8));  // what it was given before it was known
  EXPECT_EQ(Run(1, 500, std::chrono::seconds(5)), 0U);
}

TEST_F(PeerTest, ASmallRequestPassesBulkThatFillsTheWindow) {
  ScriptedPath* const path = AddPath("path");
  Submit(8 << 20);
  const size_t bulk = path->in_flight.size();
  ASSERT_LT(path->bytes(), 8U << 20) << "the window is full";
  Submit(4096);
  ASSERT_EQ(path->in_flight.size(), bulk + 1);
  EXPECT_TRUE(path->in_flight.rbegin()->second.express);
  // But only so many: what is small and plenty is bulk as well.
  for (int i = 0; i < 1000; ++i) Submit(4096);
  EXPECT_LE(path->in_flight.size(), bulk + kExpressBytesMax / 4096);
  while (done_ < 1002) {
    ASSERT_FALSE(path->in_flight.empty());
    clock_.Advance(milliseconds(1));
    path->LandAll();
  }
}

}  // namespace
}  // namespace millrace::transfer
