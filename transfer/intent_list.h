#pragma once
// Intents whose local ranges are known to lie in registered regions, and a cursor that cuts slices from them.

#include <memory>
#include <span>
#include <vector>

#include "transfer/memory_table.h"
#include "transfer/slice.h"

namespace millrace::transfer {

// Immutable; any thread. Its regions cannot be deregistered while it lives.
class IntentList {
 public:
  // InvalidArgument for an empty list, an empty range, or one outside its region or (for_read) one in a
  // region that may not be written. One lock, linear in the number of intents; strides are not expanded.
  // Neighbours that continue each other on both sides are joined.
  static StatusOr<std::shared_ptr<IntentList>> Create(std::shared_ptr<MemoryTable> memory,
                                                      const std::vector<Intent>& intents);
  ~IntentList();
  IntentList(const IntentList&) = delete;
  IntentList& operator=(const IntentList&) = delete;

  uint64_t bytes() const { return bytes_; }
  bool writable() const { return writable_; }  // every local region may be written to
  size_t size() const { return intents_.size(); }

 private:
  friend class IntentCursor;
  explicit IntentList(std::shared_ptr<MemoryTable> memory) : memory_(std::move(memory)) {}

  const std::shared_ptr<MemoryTable> memory_;  // shared: a list may be let go of after its Transfer
  std::vector<Intent> intents_;
  std::vector<std::byte*> bases_;  // of intents_[i].local
  std::vector<RegionId> regions_;  // used, once each
  uint64_t bytes_ = 0;
  bool writable_ = true;
};

// A place in a list; slices are cut from there on.
class IntentCursor {
 public:
  explicit IntentCursor(const IntentList* list) : list_(list) {}
  bool AtEnd() const { return intent_ == list_->intents_.size(); }
  // The next run of at most bytes_max contiguous bytes: sets local, local_region, remote_region,
  // remote_offset.
  void Cut(uint64_t bytes_max, Slice* slice);

 private:
  const IntentList* list_;
  size_t intent_ = 0;
  uint32_t piece_ = 0;
  uint64_t offset_ = 0;  // within the piece
};

}  // namespace millrace::transfer
