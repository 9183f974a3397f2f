#include "engine/kv/page_pool.h"

#include "base/check.h"

namespace millrace::engine {
namespace {

int32_t& CountOf(PageHolds* holds, PageHolder holder) {
  switch (holder) {
    case PageHolder::kRequest:
      return holds->request;
    case PageHolder::kTicket:
      return holds->ticket;
    case PageHolder::kCache:
      break;
  }
  return holds->cache;
}

const char* Name(PageHolder holder) {
  return holder == PageHolder::kRequest ? "request" : holder == PageHolder::kTicket ? "ticket" : "cache";
}

}  // namespace

PagePool::PagePool(int32_t num_pages) {
  MR_CHECK(num_pages > 0, "a pool of {} pages", num_pages);
  holds_.resize(static_cast<size_t>(num_pages));
  free_.reserve(holds_.size());
  // Taken from the back: page 0 first.
  for (PageId page = num_pages - 1; page >= 0; --page) free_.push_back(page);
}

void PagePool::Add(PageId page, PageHolder holder, int32_t by) {
  PageHolds& holds = holds_[static_cast<size_t>(page)];
  num_ticket_only_ -= static_cast<int32_t>(holds.ticket_only());
  num_cache_only_ -= static_cast<int32_t>(holds.cache_only());
  CountOf(&holds, holder) += by;
  MR_CHECK(holds.cache <= 1, "page {} is in the cache twice", page);
  num_ticket_only_ += static_cast<int32_t>(holds.ticket_only());
  num_cache_only_ += static_cast<int32_t>(holds.cache_only());
}

bool PagePool::Allocate(int32_t count, PageHolder holder, std::vector<PageId>* pages) {
  MR_CHECK(count >= 0, "{} pages asked for", count);
  if (count > num_free()) return false;
  for (int32_t i = 0; i < count; ++i) {
    const PageId page = free_.back();
    free_.pop_back();
    Add(page, holder, 1);
    pages->push_back(page);
  }
  return true;
}

void PagePool::Hold(PageId page, PageHolder holder) {
  MR_CHECK(page >= 0 && page < num_pages(), "no page {}", page);
  MR_CHECK(!holds(page).none(), "page {} is free", page);
  Add(page, holder, 1);
}

void PagePool::Release(PageId page, PageHolder holder) {
  MR_CHECK(page >= 0 && page < num_pages(), "no page {}", page);
  MR_CHECK(CountOf(&holds_[static_cast<size_t>(page)], holder) > 0, "page {} is not held by a {}", page,
           Name(holder));
  Add(page, holder, -1);
  if (holds(page).none()) free_.push_back(page);
}

}  // namespace millrace::engine
