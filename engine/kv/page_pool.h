#pragma once
// Which pages are free, and who holds the others.

#include <cstdint>
#include <vector>

#include "engine/kv/layout.h"

namespace millrace::engine {

enum class PageHolder { kRequest, kTicket, kCache };

// How many holds of each kind a page has.
struct PageHolds {
  int32_t request = 0;
  int32_t ticket = 0;
  int32_t cache = 0;  // 0 or 1
  bool none() const { return request + ticket + cache == 0; }
  bool ticket_only() const { return request == 0 && ticket > 0; }  // but for the cache
  bool cache_only() const { return request + ticket == 0 && cache > 0; }
};

// Engine thread only. O(1) per page. A page is free exactly when no kind of holder counts on it.
class PagePool {
 public:
  explicit PagePool(int32_t num_pages);
  // Takes `count` free pages with one hold of `holder` on each and appends them to *pages; false (and nothing
  // taken) when fewer are free.
  bool Allocate(int32_t count, PageHolder holder, std::vector<PageId>* pages);
  void Hold(PageId page, PageHolder holder);     // page must be held already
  void Release(PageId page, PageHolder holder);  // CHECKs that such a hold exists
  int32_t num_free() const { return static_cast<int32_t>(free_.size()); }
  int32_t num_pages() const { return static_cast<int32_t>(holds_.size()); }
  int32_t num_ticket_only() const { return num_ticket_only_; }  // held by tickets and no request
  int32_t num_cache_only() const { return num_cache_only_; }
  const PageHolds& holds(PageId page) const { return holds_[static_cast<size_t>(page)]; }

 private:
  void Add(PageId page, PageHolder holder, int32_t by);

  std::vector<PageHolds> holds_;
  std::vector<PageId> free_;  // a stack: recently freed pages are warm
  int32_t num_ticket_only_ = 0;
  int32_t num_cache_only_ = 0;
};

}  // namespace millrace::engine
