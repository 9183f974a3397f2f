#include "engine/kv/prefix_cache.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "engine/kv/page_tiers.h"

namespace millrace::engine {

PrefixCache::PrefixCache(int32_t num_pages, CacheObserver* observer, PageTiers* tiers)
    : pool_(num_pages), observer_(observer), tiers_(tiers), node_of_page_(static_cast<size_t>(num_pages)) {
  if (tiers_ != nullptr) tiers_->set_cache(this);
}

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
    if (!same) return nullptr;
    if (slot->page < 0) {  // computed again, although a lower tier has it
      JoinPool(slot.get(), page);
      tiers_->FreeHost(slot.get());
    }
    return slot.get();
  }
  slot = std::make_unique<CachedPage>();
  slot->parent = parent;
  slot->root = root;
  slot->key = key;
  std::copy(tokens.begin(), tokens.end(), slot->tokens.begin());
  JoinPool(slot.get(), page);
  if (parent != nullptr) parent->children.push_back(slot.get());
  if (observer_ != nullptr) observer_->OnCached(key);
  return slot.get();
}

void PrefixCache::JoinPool(CachedPage* node, PageId page) {
  node->page = page;
  pool_.Hold(page, PageHolder::kCache);
  node_of_page_[static_cast<size_t>(page)] = node;
}

void PrefixCache::LeavePool(CachedPage* node) {
  MR_CHECK(pool_.holds(node->page).request == 0, "page {} is in use", node->page);
  if (node->idle_since != 0) idle_.erase(std::exchange(node->idle_since, 0));
  node_of_page_[static_cast<size_t>(node->page)] = nullptr;
  pool_.Release(std::exchange(node->page, -1), PageHolder::kCache);
}

bool PrefixCache::Load(CachedPage* node) {
  std::vector<PageId> page;
  MR_CHECK(Allocate(1, PageHolder::kRequest, &page), "no page to load into");
  JoinPool(node, page[0]);
  return tiers_->Take(node);
}

void PrefixCache::EvictOldest() {
  MR_CHECK(!idle_.empty(), "no idle page");
  CachedPage* const oldest = idle_.begin()->second;
  if (tiers_ != nullptr && tiers_->Put(oldest)) return LeavePool(oldest);
  Lose(oldest);
}

// Of a subtree the leaves have been idle longest, so there is rarely anything below. What is there and held
// by a ticket leaves the cache and is freed by its holder.
void PrefixCache::Lose(CachedPage* node) {
  if (node->parent != nullptr) std::erase(node->parent->children, node);
  std::vector<CachedPage*> below = {node};
  for (size_t i = 0; i < below.size(); ++i) {
    below.insert(below.end(), below[i]->children.begin(), below[i]->children.end());
  }
  for (CachedPage* const each : below) {
    if (each->page >= 0) LeavePool(each);
    if (tiers_ != nullptr) tiers_->Drop(each);
    if (observer_ != nullptr) observer_->OnForgotten(each->key);
    nodes_.erase(each->key);
  }
}

void PrefixCache::CheckInvariants() const {
  size_t idle = 0, in_pool = 0;
  for (const auto& [key, node] : nodes_) {
    MR_CHECK(node->key == key && !node->pinned);
    MR_CHECK(node->parent == nullptr ||
             (nodes_.contains(node->parent->key) && node->parent->root == node->root));
    if (node->page < 0) {
      MR_CHECK(node->host_slot >= 0 || node->disk_slot >= 0, "a page is nowhere");
      MR_CHECK(node->idle_since == 0);
      continue;
    }
    ++in_pool;
    const PageHolds& holds = pool_.holds(node->page);
    MR_CHECK(node_of_page_[static_cast<size_t>(node->page)] == node.get());
    MR_CHECK(holds.cache == 1 && holds.cache_only() == (node->idle_since != 0), "page {}", node->page);
    idle += node->idle_since != 0 ? 1 : 0;
    MR_CHECK(node->parent == nullptr || holds.request == 0 ||
                 (node->parent->page >= 0 && pool_.holds(node->parent->page).request > 0),
             "page {} is in use, the one before it is not", node->page);
  }
  size_t cached = 0;
  for (PageId page = 0; page < pool_.num_pages(); ++page)
    cached += static_cast<size_t>(pool_.holds(page).cache);
  MR_CHECK(cached == in_pool && idle == idle_.size());
  MR_CHECK(static_cast<int32_t>(idle) == pool_.num_cache_only());
  if (tiers_ != nullptr) tiers_->CheckInvariants();
}

}  // namespace millrace::engine
