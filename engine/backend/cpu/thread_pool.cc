#include "engine/backend/cpu/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <chrono>
#include <string>

#include "base/thread.h"

namespace millrace::engine {
namespace {

constexpr int64_t kSmallWork = 60'000;  // a few microseconds on one core
constexpr auto kSpinTime = std::chrono::microseconds(50);
constexpr int kSpinsPerLook = 64;  // at the clock

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Spins until `done`, for kSpinTime at most.
template <typename Done>
bool Spin(Done done) {
  const auto until = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < kSpinsPerLook; ++i) {
      if (done()) return true;
      Pause();
    }
  } while (std::chrono::steady_clock::now() < until);
  return done();
}

// A failure to pin costs speed, nothing else.
void PinTo(int index) {
  cpu_set_t usable;
  CPU_ZERO(&usable);
  if (sched_getaffinity(0, sizeof(usable), &usable) != 0) return;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &usable) || index-- > 0) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    pthread_setaffinity_np(pthread_self(), sizeof(one), &one);
    return;
  }
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) {
  for (int i = 1; i < num_threads; ++i) {
    threads_.emplace_back([this, i] {
      SetThreadName("compute-" + std::to_string(i));
      PinTo(i);
      WorkerLoop(i);
    });
  }
}

ThreadPool::~ThreadPool() {
  stopping_ = true;
  generation_.fetch_add(1);
  generation_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::RunTasks(int64_t num_tasks, int64_t work, Call call, void* self) {
  if (threads_.empty() || num_tasks <= 1 || work < kSmallWork) {
    for (int64_t i = 0; i < num_tasks; ++i) call(self, i, 0);
    return;
  }
  call_ = call;
  self_ = self;
  num_tasks_ = num_tasks;
  next_.store(0, std::memory_order_relaxed);
  running_.store(static_cast<int32_t>(threads_.size()), std::memory_order_relaxed);
  // Release: a worker that sees the new generation sees the job.
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();  // no system call unless one sleeps
  Work(0);
  // Acquire pairs with the workers' release: their results are visible, and none still reads the job.
  if (Spin([this] { return running_.load(std::memory_order_acquire) == 0; })) return;
  for (int32_t left = running_.load(std::memory_order_acquire); left != 0;
       left = running_.load(std::memory_order_acquire)) {
    running_.wait(left, std::memory_order_acquire);
  }
}

void ThreadPool::Work(int thread) {
  for (int64_t i = next_.fetch_add(1, std::memory_order_relaxed); i < num_tasks_;
       i = next_.fetch_add(1, std::memory_order_relaxed)) {
    call_(self_, i, thread);
  }
}

void ThreadPool::WorkerLoop(int thread) {
  uint32_t seen = 0;
  while (true) {
    if (!Spin([&] { return generation_.load(std::memory_order_acquire) != seen; })) {
      generation_.wait(seen, std::memory_order_acquire);
    }
    // Every job is seen by every worker: RunTasks does not begin another before all have finished this one.
    ++seen;
    if (stopping_) return;
    Work(thread);
    if (running_.fetch_sub(1, std::memory_order_release) == 1) running_.notify_one();
  }
}

}  // namespace millrace::engine
