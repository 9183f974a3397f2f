#include "engine/kv/page_pool.h"

#include "base/check.h"

namespace millrace::engine {

PagePool::PagePool(int32_t num_pages) {
  MR_CHECK(num_pages > 0, "a pool of {} pages", num_pages);
  holds_.resize(static_cast<size_t>(num_pages));
  free_.reserve(holds_.size());
  // Taken from the back: page 0 first.
  for (PageId page = num_pages - 1; page >= 0; --page) free_.push_back(page);
}

bool PagePool::Allocate(int32_t count, PageHolder holder, std::vector<PageId>* pages) {
  MR_CHECK(count >= 0, "{} pages asked for", count);
  if (count > num_free()) return false;
  for (int32_t i = 0; i < count; ++i) {
    const PageId page = free_.back();
    free_.pop_back();
    Holds& holds = holds_[static_cast<size_t>(page)];
    if (holder == PageHolder::kRequest) {
      holds.request = 1;
    } else {
      holds.ticket = 1;
      ++num_ticket_only_;
    }
    pages->push_back(page);
  }
  return true;
}

void PagePool::Hold(PageId page, PageHolder holder) {
  MR_CHECK(page >= 0 && page < num_pages(), "no page {}", page);
  Holds& holds = holds_[static_cast<size_t>(page)];
  MR_CHECK(holds.request + holds.ticket > 0, "page {} is free", page);
  if (holder == PageHolder::kRequest) {
    if (holds.request == 0) --num_ticket_only_;
    ++holds.request;
  } else {
    ++holds.ticket;
  }
}

void PagePool::Release(PageId page, PageHolder holder) {
  MR_CHECK(page >= 0 && page < num_pages(), "no page {}", page);
  Holds& holds = holds_[static_cast<size_t>(page)];
  const bool was_ticket_only = holds.request == 0 && holds.ticket > 0;
  int32_t& count = holder == PageHolder::kRequest ? holds.request : holds.ticket;
  MR_CHECK(count > 0, "page {} is not held by a {}", page,
           holder == PageHolder::kRequest ? "request" : "ticket");
  --count;
  const bool is_ticket_only = holds.request == 0 && holds.ticket > 0;
  num_ticket_only_ += static_cast<int32_t>(is_ticket_only) - static_cast<int32_t>(was_ticket_only);
  if (holds.request == 0 && holds.ticket == 0) free_.push_back(page);
}

}  // namespace millrace::engine
