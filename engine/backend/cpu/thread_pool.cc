#include "engine/backend/cpu/thread_pool.h"

#include "base/thread.h"

namespace millrace::engine {
namespace {

constexpr int64_t kSmallWork = 200'000;  // about 10 us on one core
constexpr int kSpins = 2000;             // some microseconds, then the kernel waits for us

}  // namespace

ThreadPool::ThreadPool(int num_threads) {
  for (int i = 1; i < num_threads; ++i) {
    threads_.emplace_back([this, i] {
      SetThreadName("compute-" + std::to_string(i));
      WorkerLoop();
    });
  }
}

ThreadPool::~ThreadPool() {
  stopping_ = true;
  generation_.fetch_add(1);
  generation_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::Run(int64_t num_tasks, int64_t work, const std::function<void(int64_t)>& task) {
  if (threads_.empty() || num_tasks <= 1 || work < kSmallWork) {
    for (int64_t i = 0; i < num_tasks; ++i) task(i);
    return;
  }
  task_ = &task;
  num_tasks_ = num_tasks;
  next_.store(0, std::memory_order_relaxed);
  running_.store(static_cast<int32_t>(threads_.size()), std::memory_order_relaxed);
  // Release: a worker that sees the new generation sees the job.
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  Work();
  // Acquire pairs with the workers' release: their results are visible, and none still reads the job.
  for (int spins = 0; running_.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins > kSpins) std::this_thread::yield();
  }
}

void ThreadPool::Work() {
  for (int64_t i = next_.fetch_add(1, std::memory_order_relaxed); i < num_tasks_;
       i = next_.fetch_add(1, std::memory_order_relaxed)) {
    (*task_)(i);
  }
}

void ThreadPool::WorkerLoop() {
  uint32_t seen = 0;
  while (true) {
    for (int spins = 0; generation_.load(std::memory_order_acquire) == seen && spins < kSpins; ++spins) {
      std::atomic_signal_fence(std::memory_order_seq_cst);
    }
    generation_.wait(seen, std::memory_order_acquire);
    // Every job is seen by every worker: Run does not begin another before all have finished this one.
    ++seen;
    if (stopping_) return;
    Work();
    running_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace millrace::engine
