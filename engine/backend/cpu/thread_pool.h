#pragma once
// The compute threads of one backend. The engine thread takes part in every job.

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

namespace millrace::engine {

// One caller at a time. Which thread runs which task changes nothing in the results of a step.
//
// Between two jobs of a step a worker spins for some tens of microseconds, so that a step costs no system
// calls; then it sleeps, so that an idle engine costs no processor. The caller waits in the same way.
class ThreadPool {
 public:
  // Worker i is pinned to the i-th processor that this process may use, where there are that many. The
  // caller's thread is left alone.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  int num_threads() const { return static_cast<int>(threads_.size()) + 1; }

  // Runs task(i, thread) for i in [0, num_tasks), each once, handed out in ascending order, and returns when
  // all are done; thread in [0, num_threads) tells scratch memory apart. `work` is a rough count of multiply
  // and add operations: small jobs stay on the calling thread, since even a spinning worker costs a
  // microsecond. Allocates nothing.
  template <typename Task>
  void Run(int64_t num_tasks, int64_t work, Task&& task) {
    const auto call = [](void* self, int64_t i, int thread) {
      (*static_cast<std::remove_reference_t<Task>*>(self))(i, thread);
    };
    RunTasks(num_tasks, work, call, const_cast<void*>(static_cast<const void*>(&task)));
  }

 private:
  using Call = void (*)(void* self, int64_t i, int thread);
  void RunTasks(int64_t num_tasks, int64_t work, Call call, void* self);
  void Work(int thread);
  void WorkerLoop(int thread);

  std::vector<std::thread> threads_;
  // The job; written by the caller before `generation_` changes.
  Call call_ = nullptr;
  void* self_ = nullptr;
  int64_t num_tasks_ = 0;
  std::atomic<bool> stopping_{false};
  // Each on a cache line of its own: they are written from different threads all the time.
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int32_t> running_{0};      // workers that have not finished the current job
  alignas(64) std::atomic<uint32_t> generation_{0};  // of the job; its value says nothing, only change
};

}  // namespace millrace::engine
