#include "engine/kv/cache_log.h"

#include <unordered_map>
#include <utility>

namespace millrace::engine {

void CacheLog::Add(uint64_t key, bool added) {
  std::lock_guard lock(mutex_);
  if (added) {
    present_.insert(key);
  } else {
    present_.erase(key);
  }
  changes_.push_back({key, added});
  ++next_;
  if (changes_.size() > changes_max_) changes_.pop_front();
}

CacheChanges CacheLog::Since(uint64_t position) const {
  CacheChanges result;
  std::lock_guard lock(mutex_);
  result.next = next_;
  const uint64_t first = next_ - changes_.size();
  if (position == 0 || position < first || position > next_) {
    result.reset = true;
    result.added.assign(present_.begin(), present_.end());
    return result;
  }
  std::unordered_map<uint64_t, bool> last;  // by key: whether it is there in the end
  for (size_t i = position - first; i < changes_.size(); ++i) last[changes_[i].key] = changes_[i].added;
  for (const auto& [key, added] : last) (added ? result.added : result.removed).push_back(key);
  return result;
}

}  // namespace millrace::engine
