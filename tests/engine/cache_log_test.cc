#include "engine/kv/cache_log.h"

#include <gtest/gtest.h>

#include <set>

#include "base/random.h"

namespace millrace::engine {
namespace {

// Who follows the log.
struct Follower {
  void Read(const CacheLog& log) {
    const CacheChanges changes = log.Since(position);
    if (changes.reset) keys.clear();
    for (const uint64_t key : changes.removed) keys.erase(key);
    for (const uint64_t key : changes.added) keys.insert(key);
    resets += changes.reset;
    position = changes.next;
  }
  std::set<uint64_t> keys;
  uint64_t position = 0;
  int resets = 0;
};

TEST(CacheLog, FollowersKnowWhatIsThereHoweverOftenTheyLook) {
  CacheLog log(50);
  Random random(1);
  std::set<uint64_t> truth;
  Follower often, seldom, late;
  for (int i = 0; i < 5000; ++i) {
    const uint64_t key = random.Below(40);
    if (truth.insert(key).second) {
      log.OnCached(key);
    } else {
      truth.erase(key);
      log.OnForgotten(key);
    }
    if (i % 7 == 0) {
      often.Read(log);
      EXPECT_EQ(often.keys, truth);
    }
    if (i % 300 == 0) {
      seldom.Read(log);
      EXPECT_EQ(seldom.keys, truth);
    }
  }
  late.Read(log);
  EXPECT_EQ(late.keys, truth);
  EXPECT_EQ(often.resets, 1);
  EXPECT_GT(seldom.resets, 10) << "50 changes are kept";
}

TEST(CacheLog, SaysNothingWhenNothingChanged) {
  CacheLog log;
  log.OnCached(5);
  const CacheChanges first = log.Since(0);
  EXPECT_TRUE(first.reset);
  const CacheChanges second = log.Since(first.next);
  EXPECT_FALSE(second.reset);
  EXPECT_TRUE(second.added.empty() && second.removed.empty());
}

}  // namespace
}  // namespace millrace::engine
