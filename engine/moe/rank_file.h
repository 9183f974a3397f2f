#pragma once
// The memory through which the ranks of a group on one host see each other: one file per rank, written by
// that rank alone and mapped read-only by the others, so that no rank, however broken, can spoil what another
// one computes; and one control file with the membership. Files lie in a directory on tmpfs, which containers
// of one pod can share.

#include <atomic>
#include <memory>
#include <string>

#include "base/file.h"
#include "base/status.h"
#include "engine/moe/expert_group.h"
#include "engine/moe/shm_group.h"

namespace millrace::engine {

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

struct ControlHeader {
  std::atomic<uint64_t> layout;
  std::atomic<uint64_t> state;   // epoch << 32 | living ranks
  std::atomic<uint32_t> formed;  // all ranks have been there at once
  std::atomic<uint32_t> bell;    // changes when a rank wants the idle ones to join a pass
  std::atomic<uint64_t> incarnations[kShmRanksMax];
};

inline uint64_t MakeState(uint32_t epoch, RankMask alive) { return uint64_t{epoch} << 32 | alive; }
inline uint32_t EpochOf(uint64_t state) { return static_cast<uint32_t>(state >> 32); }
inline RankMask LowOf(uint64_t state) { return static_cast<uint32_t>(state); }

// Of the same epoch, more is later. 2^44 exchanges are years; 2^20 epochs come round long after anybody
// remembers.
inline constexpr int kStepBits = 44;
inline uint64_t MakeAt(uint32_t epoch, uint64_t step) { return uint64_t{epoch} << kStepBits | step; }
inline bool SameEpoch(uint64_t a, uint64_t b) { return a >> kStepBits == b >> kStepBits; }

uint64_t LayoutOf(const GroupShape& shape);
// A process holds the file of that rank.
bool RankLives(const std::string& directory, int32_t rank);

// One mapped rank file. Its write lock is held by the process that owns it, and by nobody once that is gone.
class RankFile {
 public:
  // Makes the file of this process: memory reserved (ResourceExhausted names bytes and directory), locked,
  // zeroed, put in its place by a rename, over what a former process has left.
  static StatusOr<std::unique_ptr<RankFile>> Make(const std::string& directory, int32_t rank,
                                                  const GroupShape& shape, uint64_t incarnation);
  // Maps another rank's. FailedPrecondition if its layout differs.
  static StatusOr<std::unique_ptr<RankFile>> Open(const std::string& directory, int32_t rank,
                                                  const GroupShape& shape);
  ~RankFile();
  RankFile(const RankFile&) = delete;
  RankFile& operator=(const RankFile&) = delete;

  bool OwnerLives() const;  // of another rank's file

  RankHeader& header() const { return *reinterpret_cast<RankHeader*>(data_); }
  uint8_t* held() const { return reinterpret_cast<uint8_t*>(data_ + held_); }        // [layers, experts]
  uint64_t* loads() const { return reinterpret_cast<uint64_t*>(data_ + loads_); }    // [layers, experts]
  RankMask* target() const { return reinterpret_cast<RankMask*>(data_ + target_); }  // [layers, experts]
  int32_t* experts() const { return reinterpret_cast<int32_t*>(data_ + experts_); }  // [rows_max, top k]
  uint8_t* owners() const { return reinterpret_cast<uint8_t*>(data_ + owners_); }    // [rows_max, top k]
  std::byte* rows() const { return data_ + rows_; }  // [rows_max] of row_bytes
  float* products(int32_t home) const {              // [rows_max * top k, hidden_size]
    return reinterpret_cast<float*>(data_ + products_ + static_cast<size_t>(home) * products_bytes_);
  }

 private:
  explicit RankFile(const GroupShape& shape);
  Status Map(const std::string& path, bool writable);

  UniqueFd fd_;
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
  size_t held_ = 0, loads_ = 0, target_ = 0, experts_ = 0, owners_ = 0, rows_ = 0, products_ = 0;
  size_t products_bytes_ = 0;
};

// The control file, mapped for writing; made if it is not there. One process at a time joins: Lock waits.
class ControlFile {
 public:
  static StatusOr<std::unique_ptr<ControlFile>> Open(const std::string& directory);
  ~ControlFile();
  ControlFile(const ControlFile&) = delete;
  ControlFile& operator=(const ControlFile&) = delete;
  ControlHeader& header() const { return *header_; }
  Status Lock();
  void Unlock();

 private:
  ControlFile() = default;
  UniqueFd fd_;
  ControlHeader* header_ = nullptr;
};

// Shared between processes. Returns when woken, when `word` is not `seen`, or after `timeout_us`; also
// without a cause.
void WaitOnWord(const void* word, uint32_t seen, int64_t timeout_us);
void WakeAllOnWord(const void* word);

}  // namespace millrace::engine
