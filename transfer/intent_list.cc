#include "transfer/intent_list.h"

#include <algorithm>

namespace millrace::transfer {
namespace {

// Whether `next` continues `last` on both sides, so that the two are one.
bool Continues(const Intent& last, const Intent& next) {
  return last.count == 1 && next.count == 1 && last.local.region == next.local.region &&
         last.remote_region == next.remote_region &&
         last.local.offset + last.local.bytes == next.local.offset &&
         last.remote_offset + last.local.bytes == next.remote_offset;
}

}  // namespace

StatusOr<std::shared_ptr<IntentList>> IntentList::Create(std::shared_ptr<MemoryTable> memory,
                                                         const std::vector<Intent>& intents) {
  if (intents.empty()) return InvalidArgument("a request without intents");
  std::shared_ptr<IntentList> list(new IntentList(std::move(memory)));
  auto& joined = list->intents_;
  joined.reserve(intents.size());
  for (const Intent& intent : intents) {
    if (!joined.empty() && Continues(joined.back(), intent)) {
      joined.back().local.bytes += intent.local.bytes;
    } else {
      joined.push_back(intent);
    }
  }
  MR_RETURN_IF_ERROR(list->memory_->UseLocal(joined, &list->bases_, &list->regions_, &list->writable_));
  for (const Intent& intent : joined) list->bytes_ += intent.local.bytes * intent.count;
  return list;
}

IntentList::~IntentList() { memory_->ReleaseLocal(regions_); }

void IntentCursor::Cut(uint64_t bytes_max, Slice* slice) {
  const Intent& intent = list_->intents_[intent_];
  const uint64_t bytes = std::min(bytes_max, intent.local.bytes - offset_);
  slice->local = {list_->bases_[intent_] + piece_ * intent.local_stride + offset_, bytes};
  slice->local_region = intent.local.region;
  slice->remote_region = intent.remote_region;
  slice->remote_offset = intent.remote_offset + piece_ * intent.remote_stride + offset_;
  offset_ += bytes;
  if (offset_ < intent.local.bytes) return;
  offset_ = 0;
  if (++piece_ < intent.count) return;
  piece_ = 0;
  ++intent_;
}

}  // namespace millrace::transfer
