#pragma once
// The compute threads of one backend. The engine thread takes part in every job.

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace millrace::engine {

// One caller at a time. Which thread runs which task changes nothing in the results of a step.
class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  int num_threads() const { return static_cast<int>(threads_.size()) + 1; }

  // Runs task(0) ... task(num_tasks - 1), each once, and returns when all are done. `work` is a rough count
  // of multiply and add operations: small jobs stay on the calling thread, since waking another costs more
  // than they do.
  void Run(int64_t num_tasks, int64_t work, const std::function<void(int64_t)>& task);

 private:
  void Work();
  void WorkerLoop();

  std::vector<std::thread> threads_;
  const std::function<void(int64_t)>* task_ = nullptr;
  int64_t num_tasks_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<int32_t> running_{0};      // workers that have not finished the current job
  std::atomic<uint32_t> generation_{0};  // of the job; odd or even says nothing, only change
  std::atomic<bool> stopping_{false};
};

}  // namespace millrace::engine
