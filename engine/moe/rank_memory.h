#pragma once
// What a rank shows to the others of its group: memory that it alone writes, laid out the same everywhere. On
// one host the others map it; beyond, each has a copy that follows.

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "engine/moe/expert_group.h"

namespace millrace::engine {

inline constexpr int32_t kGroupRanksMax = 32;  // fit into one word beside the epoch

// Ordering of everything else hangs on `at`: what is written before it is stored is seen after it is loaded.
struct RankHeader {
  uint64_t layout = 0;                         // LayoutOf(shape)
  uint64_t incarnation = 0;                    // of the process
  alignas(64) std::atomic<uint64_t> at;        // MakeAt: the exchanges that this rank has reached in an epoch
  alignas(64) std::atomic<uint32_t> sleeping;  // its engine thread waits on somebody's `at`
  std::atomic<uint32_t> idle;                  // it takes part in no pass, and must be woken for one
  alignas(64) std::atomic<uint64_t> beat;      // grows while the process lives and runs
  std::atomic<uint64_t> held_version;
  std::atomic<int32_t> wanted;  // PassKind
  std::atomic<int32_t> wanted_mtp;
  std::atomic<int32_t> num_rows;
  std::atomic<uint32_t> announced;
  std::atomic<uint64_t> target_version;  // odd while it is written
  std::atomic<uint32_t> target_epoch;
};

// Membership: one for all ranks of a host, or this process's copy of what the ranks have agreed on.
struct ControlHeader {
  std::atomic<uint64_t> layout;
  std::atomic<uint64_t> state;   // epoch << 32 | living ranks
  std::atomic<uint32_t> formed;  // all ranks have been there at once
  std::atomic<uint32_t> bell;    // changes when a rank wants the idle ones to join a pass
  std::atomic<uint64_t> incarnations[kGroupRanksMax];
};

inline uint64_t MakeState(uint32_t epoch, RankMask alive) { return uint64_t{epoch} << 32 | alive; }
inline uint32_t EpochOf(uint64_t state) { return static_cast<uint32_t>(state >> 32); }
inline RankMask LowOf(uint64_t state) { return static_cast<uint32_t>(state); }

// Of the same epoch, more is later. 2^44 exchanges are years; 2^20 epochs come round long after anybody
// remembers.
inline constexpr int kStepBits = 44;
inline uint64_t MakeAt(uint32_t epoch, uint64_t step) { return uint64_t{epoch} << kStepBits | step; }
inline bool SameEpoch(uint64_t a, uint64_t b) { return a >> kStepBits == b >> kStepBits; }

// For numbers in shared memory that are not atomic by type.
template <typename T>
T Get(const T& value) {
  return std::atomic_ref<T>(const_cast<T&>(value)).load(std::memory_order_acquire);
}
template <typename T>
void Put(T& place, T value) {
  std::atomic_ref<T>(place).store(value, std::memory_order_release);
}

uint64_t LayoutOf(const GroupShape& shape);

// One rank's memory; where it comes from is a matter of those that derive.
class RankMemory {
 public:
  virtual ~RankMemory() = default;
  RankMemory(const RankMemory&) = delete;
  RankMemory& operator=(const RankMemory&) = delete;

  virtual bool OwnerLives() const = 0;  // as far as can be seen at once; any thread

  RankHeader& header() const { return *reinterpret_cast<RankHeader*>(data_); }
  uint8_t* held() const { return reinterpret_cast<uint8_t*>(data_ + held_); }        // [layers, experts]
  uint64_t* loads() const { return reinterpret_cast<uint64_t*>(data_ + loads_); }    // [layers, experts]
  RankMask* target() const { return reinterpret_cast<RankMask*>(data_ + target_); }  // [layers, experts]
  int32_t* experts() const { return reinterpret_cast<int32_t*>(data_ + experts_); }  // [rows_max, top k]
  uint8_t* owners() const { return reinterpret_cast<uint8_t*>(data_ + owners_); }    // [rows_max, top k]
  std::byte* rows() const { return data_ + rows_; }  // [rows_max] of row_bytes
  float* products(int32_t home) const {              // [rows_max * top k, hidden_size]
    return reinterpret_cast<float*>(data_ + products_ + (homes_ == 1 ? 0 : products_bytes_ * size_t(home)));
  }
  // From the beginning of the memory; the same in every rank's, and in copies.
  size_t OffsetOf(const void* place) const {
    return static_cast<size_t>(static_cast<const std::byte*>(place) - data_);
  }
  size_t bytes() const { return bytes_; }
  std::byte* data() const { return data_; }

 protected:
  // `homes`: 1 for a copy at one rank, that has the products for that rank only; else the number of ranks.
  RankMemory(const GroupShape& shape, int32_t homes);

  std::byte* data_ = nullptr;  // bytes(), at a page's beginning

 private:
  const int32_t homes_;
  size_t bytes_ = 0;
  size_t held_ = 0, loads_ = 0, target_ = 0, experts_ = 0, owners_ = 0, rows_ = 0, products_ = 0;
  size_t products_bytes_ = 0;
};

// Also between processes. Returns when woken, when `word` is not `seen`, or after `timeout_us`; also without
// a cause.
void WaitOnWord(const void* word, uint32_t seen, int64_t timeout_us);
void WakeAllOnWord(const void* word);

}  // namespace millrace::engine
