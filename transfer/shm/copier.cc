#include "transfer/shm/copier.h"

#include <algorithm>

#include "base/thread.h"

namespace millrace::transfer {
namespace {

constexpr size_t kInPlaceBytesMax = 32 << 10;  // about what waking a thread costs

}  // namespace

Copier::~Copier() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    work_.notify_all();
  }
  for (std::thread& thread : threads_) thread.join();
}

void Copier::Start(const std::shared_ptr<Job>& job) {
  if (job->bytes <= kInPlaceBytesMax) {
    const Status status = ShmCopy(job->process, job->from, job->to, job->bytes);
    job->state = Job::State::kCopied;  // no other thread knows the job
    return job->done(status);
  }
  if (threads_.empty()) {
    for (int i = 0; i < num_threads_; ++i) threads_.emplace_back([this] { Run(); });
  }
  const std::lock_guard lock(mutex_);
  queue_.push_back(job);
  work_.notify_one();
}

void Copier::Cancel(const std::shared_ptr<Job>& job) {
  job->cancelled = true;
  std::unique_lock lock(mutex_);
  std::erase(queue_, job);
  copied_.wait(lock, [&job] { return job->state != Job::State::kCopying; });
}

void Copier::Run() {
  SetThreadName("transfer-copy");
  std::unique_lock lock(mutex_);
  while (true) {
    work_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (queue_.empty()) return;
    const std::shared_ptr<Job> job = std::move(queue_.front());
    queue_.pop_front();
    job->state = Job::State::kCopying;
    lock.unlock();
    Status status = ShmCopy(job->process, job->from, job->to, job->bytes);
    lock.lock();
    job->status = std::move(status);
    job->state = Job::State::kCopied;
    copied_.notify_all();
    lock.unlock();
    loop_->Post([job] {
      if (!job->cancelled) job->done(job->status);
    });
    lock.lock();
  }
}

}  // namespace millrace::transfer
