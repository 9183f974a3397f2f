#pragma once
// Where cached pages go when the pool needs their room: host memory, and from there a file. Both bounded;
// what neither can keep is forgotten.
//
// A node may be in several places at once, with the same bytes. Host memory is used most recently used first;
// what would have to go next is written to the file ahead of time, so that room can be had at once. What
// comes back from the file goes through host memory and is compared with the checksum that it was written
// with.

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "base/clock.h"
#include "engine/kv/page_file.h"
#include "engine/kv/prefix_cache.h"

namespace millrace::engine {

// Moves the bytes of one page, all layers, between the pool and a buffer. False: the backend has failed.
class PageCopier {
 public:
  virtual ~PageCopier() = default;
  virtual bool CopyOut(PageId page, std::span<std::byte> into) = 0;
  virtual bool CopyIn(PageId page, std::span<const std::byte> from) = 0;
};

struct TierStats {
  int32_t host_pages = 0;
  int32_t disk_pages = 0;
  uint64_t spilled = 0;        // pages that went to host memory
  uint64_t written = 0;        // to the file
  uint64_t loaded = 0;         // back from host memory
  uint64_t fetched = 0;        // from the file to host memory
  uint64_t disk_failures = 0;  // operations that failed and checksums that were wrong
};

// Engine thread only.
class PageTiers {
 public:
  // `copier` and `clock` outlive it; `file` may be null.
  PageTiers(size_t page_bytes, int32_t host_slots, std::unique_ptr<PageFile> file, PageCopier* copier,
            const Clock* clock);
  ~PageTiers();
  // `cache` forgets what is lost; set before use.
  void set_cache(PrefixCache* cache) { cache_ = cache; }

  // Keeps a copy of the node's page. False when there is no room for it.
  bool Put(CachedPage* node);
  // The node's page, which it has just got, gets the content back from host memory.
  bool Take(CachedPage* node);
  // The node has its content in the pool: host memory need not keep it.
  void FreeHost(CachedPage* node);
  // Nothing of the node is kept any more.
  void Drop(CachedPage* node);
  // Pinned nodes keep their place in host memory.
  void Pin(CachedPage* node, bool pinned);

  // Begins to read a node that is only in the file. False when that cannot begin now.
  bool Fetch(CachedPage* node);
  // Takes note of what the file has done. Never waits.
  void Poll();
  bool busy() const { return !operations_.empty(); }

  // Measured, smoothed seconds for one page; 0 = not yet.
  double take_seconds() const { return take_seconds_; }
  double fetch_seconds() const { return fetch_seconds_; }
  // The file was not asked because it seemed slow: an estimate that is never tried again is never corrected.
  void Discount() { fetch_seconds_ *= 0.95; }
  TierStats Stats() const;
  void CheckInvariants() const;

 private:
  struct Operation {
    CachedPage* node = nullptr;  // null: forgotten meanwhile
    bool write = false;
    int32_t host_slot = -1;
    int32_t disk_slot = -1;
    TimePoint begun;
  };
  using Order = std::map<uint64_t, CachedPage*>;  // by last use

  std::span<std::byte> Slot(int32_t host_slot);
  int32_t TakeHostSlot();
  int32_t TakeDiskSlot();
  void WriteAhead();
  void Finish(const Operation& operation, bool ok);
  void FinishRead(const Operation& operation, bool ok);
  void FinishWrite(const Operation& operation, bool ok);
  void Touch(CachedPage* node);
  void ReleaseHost(CachedPage* node);
  void ReleaseDisk(CachedPage* node);

  const size_t page_bytes_;
  const int32_t host_slots_;
  PageCopier* const copier_;
  const Clock* const clock_;
  PrefixCache* cache_ = nullptr;
  std::vector<std::byte> memory_;
  std::vector<int32_t> free_host_;
  std::vector<int32_t> free_disk_;
  Order host_;
  Order disk_;
  uint64_t last_use_ = 0;
  std::unordered_map<uint64_t, Operation> operations_;  // by tag
  uint64_t next_tag_ = 1;
  TimePoint last_fetch_end_;
  double take_seconds_ = 0;
  double fetch_seconds_ = 0;
  TierStats stats_;
  std::unique_ptr<PageFile> file_;  // last: waits for what is in flight while the memory is there
};

}  // namespace millrace::engine
