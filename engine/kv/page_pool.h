#pragma once
// Which pages are free, and who holds the others.

#include <cstdint>
#include <vector>

#include "engine/kv/layout.h"

namespace millrace::engine {

enum class PageHolder { kRequest, kTicket };

// Engine thread only. O(1) per page. A page is free exactly when neither kind of holder counts on it.
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
  int32_t num_ticket_only() const { return num_ticket_only_; }

 private:
  struct Holds {
    int32_t request = 0;
    int32_t ticket = 0;
  };
  std::vector<Holds> holds_;
  std::vector<PageId> free_;  // a stack: recently freed pages are warm
  int32_t num_ticket_only_ = 0;
};

}  // namespace millrace::engine
