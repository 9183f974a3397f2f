#pragma once
// The pages of the pool, and which of them hold the KV of a known beginning of text. A tree: each node is one
// full page of tokens after its parent's. Part-full pages are never shared.
//
// A cached page is immutable: its tokens are a full page and its KV is final. The cache's hold keeps it while
// neither request nor ticket does; such pages count as available and go, least recently used first, when
// somebody needs a page: to a lower tier if there is one with room, else they are forgotten.
//
// Whoever holds a node's page for a request holds the pages of all nodes before it too: the caller takes
// chains from Match whole and replaces its own page by an equal one that Insert finds. So what is evicted has
// nothing below it that a request uses.

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "engine/kv/page_pool.h"

namespace millrace::engine {

struct CachedPage {
  CachedPage* parent = nullptr;  // null for the first page of a text
  uint64_t root = 0;             // model and salt
  uint64_t key = 0;
  std::array<int32_t, kPageTokens> tokens;
  PageId page = -1;                   // in the pool; -1: only in a lower tier
  uint64_t idle_since = 0;            // its place in line for eviction; 0 while a request or ticket holds it
  std::vector<CachedPage*> children;  // what follows it; few

  // Of PageTiers.
  int32_t host_slot = -1;
  int32_t disk_slot = -1;
  uint64_t host_use = 0;  // its place in line there
  uint64_t disk_use = 0;
  uint64_t operation = 0;  // of the file, that runs; 0 = none
  uint64_t checksum = 0;   // of what was written to the file
  bool pinned = false;     // stays in host memory
};

class PageTiers;

// Hears of every node that comes or goes. Engine thread.
class CacheObserver {
 public:
  virtual ~CacheObserver() = default;
  virtual void OnCached(uint64_t key) = 0;
  virtual void OnForgotten(uint64_t key) = 0;
};

// Engine thread only. O(1) per page, O(log n) where a page becomes idle or stops being so.
class PrefixCache {
 public:
  // `observer` and `tiers` may be null; they outlive the cache.
  PrefixCache(int32_t num_pages, CacheObserver* observer, PageTiers* tiers = nullptr);

  // Takes `count` pages with one hold of `holder` on each, evicting idle ones as needed; false (and nothing
  // done) when fewer are available.
  bool Allocate(int32_t count, PageHolder holder, std::vector<PageId>* pages);
  void Hold(PageId page, PageHolder holder);
  void Release(PageId page, PageHolder holder);
  int32_t num_available() const { return pool_.num_free() + pool_.num_cache_only(); }
  const PagePool& pool() const { return pool_; }

  // The longest cached beginning of `tokens`, in order, at most keys.size() pages, in whatever tier. `keys`
  // are those of the tokens' full pages. Every token is compared: equal keys alone prove nothing.
  std::vector<CachedPage*> Match(uint64_t root, std::span<const int32_t> tokens,
                                 std::span<const uint64_t> keys) const;
  // `page`, which a request holds, has the final KV of `tokens` (a full page of them) after `parent`'s.
  // Returns the node of that content, whose page may be another one with the same KV; null when another
  // content has this key.
  CachedPage* Insert(CachedPage* parent, uint64_t root, uint64_t key, std::span<const int32_t> tokens,
                     PageId page);

  // Brings pinned nodes from host memory into the pool, each with a request hold. Needs as many available
  // pages. False: the backend has failed.
  bool Load(CachedPage* node);
  // A lower tier lost the node's content: it and what follows it are forgotten.
  void Lose(CachedPage* node);

  int32_t num_cached() const { return static_cast<int32_t>(nodes_.size()); }
  // The tree against the pool. For tests; ends the process at the first mismatch.
  void CheckInvariants() const;

 private:
  void EvictOldest();
  void JoinPool(CachedPage* node, PageId page);
  void LeavePool(CachedPage* node);

  PagePool pool_;
  CacheObserver* const observer_;
  PageTiers* const tiers_;
  std::unordered_map<uint64_t, std::unique_ptr<CachedPage>> nodes_;  // by key
  std::vector<CachedPage*> node_of_page_;                            // null for pages that are not cached
  std::map<uint64_t, CachedPage*> idle_;                             // by idle_since
  uint64_t clock_ = 0;
};

}  // namespace millrace::engine
