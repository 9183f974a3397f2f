#include "engine/kv/prefix_cache.h"

#include <algorithm>

#include "base/check.h"

namespace millrace::engine {

PrefixCache::PrefixCache(int32_t num_pages, CacheObserver* observer)
    : pool_(num_pages), observer_(observer), node_of_page_(static_cast<size_t>(num_pages)) {}

bool PrefixCache::Allocate(int32_t count, PageHolder holder, std::vector<PageId>* pages) {
  if (count > num_available()) return false;
  while (pool_.num_free() < count) EvictOldest();
  return pool_.Allocate(count, holder, pages);
}

void PrefixCache::Hold(PageId page, PageHolder holder) {
  pool_.Hold(page, holder);
  CachedPage* const node = node_of_page_[static_cast<size_t>(page)];
  if (node == nullptr || node->idle_since == 0) return;
  idle_.erase(node->idle_since);
  node->idle_since = 0;
}

void PrefixCache::Release(PageId page, PageHolder holder) {
  pool_.Release(page, holder);
  if (!pool_.holds(page).cache_only()) return;
  CachedPage* const node = node_of_page_[static_cast<size_t>(page)];
  node->idle_since = ++clock_;
  idle_.emplace(node->idle_since, node);
}

std::vector<CachedPage*> PrefixCache::Match(uint64_t root, std::span<const int32_t> tokens,
                                            std::span<const uint64_t> keys) const {
  std::vector<CachedPage*> found;
  for (size_t i = 0; i < keys.size(); ++i) {
    const auto node = nodes_.find(keys[i]);
    if (node == nodes_.end()) break;
    const CachedPage& cached = *node->second;
    const CachedPage* const parent = found.empty() ? nullptr : found.back();
    const auto page_tokens = tokens.subspan(i * kPageTokens, kPageTokens);
    if (cached.root != root || cached.parent != parent ||
        !std::equal(page_tokens.begin(), page_tokens.end(), cached.tokens.begin())) {
      break;
    }
    found.push_back(node->second.get());
  }
  return found;
}

CachedPage* PrefixCache::Insert(CachedPage* parent, uint64_t root, uint64_t key,
                                std::span<const int32_t> tokens, PageId page) {
  MR_CHECK(tokens.size() == kPageTokens && pool_.holds(page).request > 0);
  std::unique_ptr<CachedPage>& slot = nodes_[key];
  if (slot != nullptr) {
    const bool same = slot->root == root && slot->parent == parent &&
                      std::equal(tokens.begin(), tokens.end(), slot->tokens.begin());
    return same ? slot.get() : nullptr;
  }
  slot = std::make_unique<CachedPage>();
  slot->parent = parent;
  slot->root = root;
  slot->key = key;
  std::copy(tokens.begin(), tokens.end(), slot->tokens.begin());
  slot->page = page;
  pool_.Hold(page, PageHolder::kCache);
  node_of_page_[static_cast<size_t>(page)] = slot.get();
  if (parent != nullptr) parent->children.push_back(slot.get());
  if (observer_ != nullptr) observer_->OnCached(key);
  return slot.get();
}

void PrefixCache::EvictOldest() {
  MR_CHECK(!idle_.empty(), "no idle page");
  CachedPage* const oldest = idle_.begin()->second;
  if (oldest->parent != nullptr) std::erase(oldest->parent->children, oldest);
  Forget(oldest);
}

// Of a subtree the leaves have been idle longest, so there is rarely anything below. What is there and held
// by a ticket leaves the cache and is freed by its holder.
void PrefixCache::Forget(CachedPage* node) {
  std::vector<CachedPage*> below = {node};
  for (size_t i = 0; i < below.size(); ++i) {
    below.insert(below.end(), below[i]->children.begin(), below[i]->children.end());
  }
  for (CachedPage* const each : below) {
    MR_CHECK(pool_.holds(each->page).request == 0, "page {} is in use below an idle one", each->page);
    if (each->idle_since != 0) idle_.erase(each->idle_since);
    node_of_page_[static_cast<size_t>(each->page)] = nullptr;
    pool_.Release(each->page, PageHolder::kCache);
    if (observer_ != nullptr) observer_->OnForgotten(each->key);
    nodes_.erase(each->key);
  }
}

void PrefixCache::CheckInvariants() const {
  size_t idle = 0;
  for (const auto& [key, node] : nodes_) {
    const PageHolds& holds = pool_.holds(node->page);
    MR_CHECK(node->key == key && node_of_page_[static_cast<size_t>(node->page)] == node.get());
    MR_CHECK(holds.cache == 1 && holds.cache_only() == (node->idle_since != 0), "page {}", node->page);
    idle += node->idle_since != 0 ? 1 : 0;
    if (node->parent == nullptr) continue;
    MR_CHECK(nodes_.contains(node->parent->key) && node->parent->root == node->root);
    MR_CHECK(holds.request == 0 || pool_.holds(node->parent->page).request > 0,
             "page {} is in use, the one before it is not", node->page);
  }
  int32_t cached = 0;
  for (PageId page = 0; page < pool_.num_pages(); ++page) cached += pool_.holds(page).cache;
  MR_CHECK(cached == num_cached() && idle == idle_.size());
  MR_CHECK(static_cast<int32_t>(idle) == pool_.num_cache_only());
}

}  // namespace millrace::engine
