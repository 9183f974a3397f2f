#pragma once
// What the prefix cache holds, as a log that others can follow: a router that wants to know who has which
// text.

#include <cstdint>
#include <deque>
#include <mutex>
#include <unordered_set>
#include <vector>

#include "engine/kv/prefix_cache.h"

namespace millrace::engine {

struct CacheChanges {
  uint64_t next = 0;   // where to go on from
  bool reset = false;  // `added` is all there is: forget what was known before
  std::vector<uint64_t> added;
  std::vector<uint64_t> removed;
};

// Written by the engine thread, read by any. The lock is held for one change or one read.
class CacheLog final : public CacheObserver {
 public:
  // Changes kept; who is further behind gets everything.
  explicit CacheLog(size_t changes_max = 1 << 16) : changes_max_(changes_max) {}

  void OnCached(uint64_t key) override { Add(key, true); }
  void OnForgotten(uint64_t key) override { Add(key, false); }

  // What happened from `position` on; 0, or a position that the log does not have any more, gives a reset.
  // The order of changes to different keys is lost, their sum is not.
  CacheChanges Since(uint64_t position) const;

 private:
  struct Change {
    uint64_t key;
    bool added;
  };
  void Add(uint64_t key, bool added);

  const size_t changes_max_;
  mutable std::mutex mutex_;
  std::deque<Change> changes_;
  uint64_t next_ = 1;  // position of the next change
  std::unordered_set<uint64_t> present_;
};

}  // namespace millrace::engine
