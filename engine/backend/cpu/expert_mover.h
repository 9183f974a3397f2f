#pragma once
// The routed experts that one rank of a group holds, as they come and go while it serves. A thread of its own
// loads what the group's target wants here, one expert at a time and at the lowest priority; or, when an
// expert has lost its last holder, all that is missing at once. On the leading rank it makes the target:
// after each change of membership what covers every expert, and from time to time, layer by layer, what evens
// the load.
//
// What is loaded is used from the next pass on, which tells the others; what has to go is not used from the
// next pass on, and its memory is given up once that has begun. So whatever a rank was promised in a pass
// stays for that pass.

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "engine/backend/cpu/cpu_weights.h"

namespace millrace::engine {

class ExpertMover {
 public:
  // Reuses the memory of experts that leave: nobody else may use these weights.
  ExpertMover(std::shared_ptr<const CpuWeights> weights, const CpuGroupOptions& options, int num_threads);
  ~ExpertMover();

  // Engine thread. `index` counts MoE layers, the MTP layer last.
  std::span<const FfnWeights> experts(int32_t index) const { return experts_[static_cast<size_t>(index)]; }
  void BeforePass();  // takes what was loaded, lets go of what shall leave
  void PassBegun();   // and here its memory

  bool has_changes() const { return has_changes_.load(); }  // BeforePass has something to do. Any thread
  // `wake` is called from the mover's thread when there is.
  void OnChanges(std::function<void()> wake);
  Status status() const;  // of the first load that failed: none follows it. Any thread

 private:
  enum class State : uint8_t { kAbsent, kComing, kHeld, kLeaving };
  struct Change {
    int32_t layer = 0;
    int32_t expert = 0;
    FfnWeights ffn;  // that comes; width 0: it leaves
  };
  struct Wanted {
    int32_t layer = 0;
    int32_t expert = 0;
  };

  void Loop();
  void Lead();
  void Rebalance();
  std::vector<LayerPlacement> CoverAll(const std::vector<LayerPlacement>& held) const;
  void Follow();
  Status Load(const Wanted& wanted);
  void Drop(const Wanted& wanted);
  StatusOr<std::span<std::byte>> TakeSlot();
  void Wake();

  const std::shared_ptr<const CpuWeights> weights_;
  const CpuGroupOptions options_;
  ExpertGroup& group_;
  const int num_threads_;
  const size_t expert_bytes_;

  std::vector<std::vector<FfnWeights>> experts_;  // engine thread
  std::vector<std::byte*> retired_;               // engine thread: memory that goes when the pass has begun

  // Mover thread.
  uint32_t target_epoch_ = 0;
  std::vector<LayerPlacement> target_;
  std::vector<uint64_t> loads_before_;
  TimePoint looked_;
  struct Plan {
    int32_t layer = 0;
    LayerPlacement placement;
  };
  std::vector<Plan> plans_;  // the best last

  mutable std::mutex mutex_;  // what follows
  std::condition_variable stop_;
  bool stopping_ = false;
  std::vector<std::vector<State>> states_;  // [layers][experts]
  std::vector<Change> changes_;
  std::vector<std::byte*> free_;  // slots of expert_bytes_
  std::vector<HugeMemory> slabs_;
  std::function<void()> wake_;
  Status status_;
  std::atomic<bool> has_changes_{false};
  std::thread thread_;
};

}  // namespace millrace::engine
