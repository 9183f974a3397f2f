#include "server/group/rank_link.h"

#include <algorithm>
#include <utility>

namespace millrace::server {
namespace {

// Some seconds of a busy group; acknowledgements come ten times a second.
constexpr size_t kUnacknowledgedBytesMax = size_t{16} << 20;

}  // namespace

void RankLink::Send(const group::GroupMessage& message) {
  const std::lock_guard lock(mutex_);
  if (over_) return;
  unacknowledged_.push_back({RankConnection::Frame(message), Clock::System().Now()});
  const std::string& bytes = unacknowledged_.back().bytes;
  unacknowledged_bytes_ += bytes.size();
  if (unacknowledged_bytes_ > kUnacknowledgedBytesMax) {
    over_ = true;
    why_ = "it does not take what it is sent";
    if (connection_ != nullptr) connection_->Close(why_);
    DropBefore();
    return;
  }
  if (connection_ != nullptr) connection_->Send(bytes);
}

void RankLink::Close(const std::string& why) {
  const std::lock_guard lock(mutex_);
  if (over_) return;
  over_ = true;
  why_ = why;
  if (connection_ != nullptr) connection_->Close(why);
  DropBefore();
}

bool RankLink::Attach(std::shared_ptr<RankConnection> connection, uint64_t next, uint64_t heard, bool sure,
                      TimePoint now) {
  if (next > taken_ || !Acknowledge(heard)) return false;
  skip_ = taken_ - next;
  sure_ = sure;
  heard_ = attached_ = now;
  const std::lock_guard lock(mutex_);
  if (over_) return false;
  if (connection_ != nullptr) before_.push_back(std::move(connection_));
  connection_ = std::move(connection);
  if (sure) DropBefore();
  for (const Frame& frame : unacknowledged_) connection_->Send(frame.bytes);
  return true;
}

void RankLink::DropBefore() {
  for (const auto& connection : before_) connection->Close("another connection goes on");
  before_.clear();
}

bool RankLink::Uses(const RankConnection* connection) const {
  const std::lock_guard lock(mutex_);
  return connection_.get() == connection;
}

bool RankLink::Take(TimePoint now) {
  heard_ = now;
  if (!std::exchange(sure_, true)) {
    const std::lock_guard lock(mutex_);
    DropBefore();
  }
  if (skip_ > 0) {
    --skip_;
    return false;
  }
  ++taken_;
  return true;
}

bool RankLink::Ended(const RankConnection* connection, const std::string& why, bool by_peer) {
  const std::lock_guard lock(mutex_);
  std::erase_if(before_, [&](const auto& other) { return other.get() == connection; });
  if (connection_.get() != connection) return false;
  connection_ = nullptr;
  if (by_peer && sure_ && !over_) {
    over_ = true;
    why_ = why;
  }
  return over_;
}

uint64_t RankLink::acknowledged() const {
  const std::lock_guard lock(mutex_);
  return acknowledged_;
}

bool RankLink::Acknowledge(uint64_t heard) {
  const std::lock_guard lock(mutex_);
  if (heard > acknowledged_ + unacknowledged_.size()) return false;
  for (; acknowledged_ < heard; ++acknowledged_) {
    unacknowledged_bytes_ -= unacknowledged_.front().bytes.size();
    unacknowledged_.pop_front();
  }
  return true;
}

bool RankLink::Quiet(TimePoint now, Duration max) const {
  if (now - heard_ > max) return true;
  const std::lock_guard lock(mutex_);
  if (connection_ == nullptr) return true;
  return !unacknowledged_.empty() && now - std::max(unacknowledged_.front().since, attached_) > max;
}

bool RankLink::over() const {
  const std::lock_guard lock(mutex_);
  return over_;
}

std::string RankLink::why() const {
  const std::lock_guard lock(mutex_);
  return why_;
}

}  // namespace millrace::server
