#pragma once
// Copies slices from other processes' memory on threads of its own: the kernel's copy between two processes
// pays for finding pages beside moving bytes, and two of them at once make up for that. Small copies are done
// in place. Transfer thread only, but for the copying itself.

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "transfer/event_loop.h"
#include "transfer/shm/shm_socket.h"

namespace millrace::transfer {

class Copier {
 public:
  struct Job {
    pid_t process = 0;
    uint64_t from = 0;
    std::byte* to = nullptr;
    size_t bytes = 0;
    std::function<void(const Status&)> done;  // transfer thread

   private:
    friend class Copier;
    enum class State { kQueued, kCopying, kCopied };
    State state = State::kQueued;  // under the copier's mutex
    bool cancelled = false;        // transfer thread
    Status status;                 // written before kCopied
  };

  Copier(EventLoop* loop, int threads) : loop_(loop), num_threads_(threads) {}
  ~Copier();  // every job has ended or was cancelled

  // `done` runs once, from here for a small copy, unless the job is cancelled before.
  void Start(const std::shared_ptr<Job>& job);
  // When this returns nothing of the job is copied any more, and `done` will not run. May wait for a copy
  // that is going on: at most one slice.
  void Cancel(const std::shared_ptr<Job>& job);

 private:
  void Run();

  EventLoop* const loop_;
  const int num_threads_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable copied_;
  std::deque<std::shared_ptr<Job>> queue_;  // shared: a job outlives whoever finishes with it first
  bool stopping_ = false;
  std::vector<std::thread> threads_;  // started with the first large copy
};

}  // namespace millrace::transfer
