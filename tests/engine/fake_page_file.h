#pragma once
// A file in memory whose operations complete late, out of order, fail, or come back with wrong bytes: as
// told.

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/random.h"
#include "engine/kv/page_file.h"

namespace millrace::engine {

struct FileFaults {
  uint64_t late_percent = 0;     // of polls, in which an operation does not complete
  uint64_t fail_percent = 0;     // of operations
  uint64_t corrupt_percent = 0;  // of reads
};

class FakePageFile final : public PageFile {
 public:
  FakePageFile(size_t slot_bytes, int32_t num_slots, uint64_t seed, FileFaults* faults)
      : slots_(static_cast<size_t>(num_slots), std::vector<std::byte>(slot_bytes)),
        random_(seed),
        faults_(faults) {}

  int32_t num_slots() const override { return static_cast<int32_t>(slots_.size()); }
  bool Read(int32_t slot, std::span<std::byte> into, uint64_t tag) override {
    if (running_.size() == 4) return false;
    running_.push_back({slot, into, {}, tag});
    return true;
  }
  bool Write(int32_t slot, std::span<const std::byte> from, uint64_t tag) override {
    if (running_.size() == 4) return false;
    running_.push_back({slot, {}, from, tag});
    return true;
  }
  void Poll(std::vector<Done>* done) override {
    for (size_t i = 0; i < running_.size();) {
      if (random_.Below(100) < faults_->late_percent) {
        ++i;
        continue;
      }
      const bool ok = random_.Below(100) >= faults_->fail_percent;
      if (ok) Execute(running_[i]);
      done->push_back({running_[i].tag, ok});
      running_.erase(running_.begin() + static_cast<ptrdiff_t>(i));
    }
  }

 private:
  struct Operation {
    int32_t slot;
    std::span<std::byte> into;
    std::span<const std::byte> from;
    uint64_t tag;
  };
  void Execute(const Operation& operation) {
    std::vector<std::byte>& slot = slots_[static_cast<size_t>(operation.slot)];
    if (operation.into.empty()) {
      std::memcpy(slot.data(), operation.from.data(), slot.size());
      return;
    }
    std::memcpy(operation.into.data(), slot.data(), slot.size());
    if (random_.Below(100) < faults_->corrupt_percent)
      operation.into[random_.Below(slot.size())] ^= std::byte{4};
  }

  std::vector<std::vector<std::byte>> slots_;
  std::vector<Operation> running_;
  Random random_;
  FileFaults* const faults_;
};

}  // namespace millrace::engine
