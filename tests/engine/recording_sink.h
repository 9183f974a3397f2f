#pragma once
// A sink that keeps what it hears and checks the order of it.

#include <gtest/gtest.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "engine/core/engine.h"

namespace millrace::engine {

struct LayerEvent {
  int32_t layer = 0;
  int32_t first_page = 0;
  std::vector<PageId> pages;
};

// What one request's sink heard. Any thread; shared by the test and the sink, which the engine destroys.
class Recording {
 public:
  explicit Recording(int32_t first_index = 0, bool is_prefill = false)
      : next_index_(first_index), is_prefill_(is_prefill) {}

  void OnToken(const TokenEvent& event) {
    std::lock_guard lock(mutex_);
    EXPECT_FALSE(ended_) << "a token after the end";
    EXPECT_EQ(event.index, next_index_);
    ++next_index_;
    if (tokens_.empty()) {
      cached_tokens_ = event.cached_tokens;
      prompt_ = event.prompt;
    } else {
      EXPECT_TRUE(event.prompt.empty());
    }
    mtp_hidden_ = event.mtp_hidden;
    tokens_.push_back(event.token.token);
    finish_ = event.finish;
    ended_ = is_prefill_ || event.finish != FinishReason::kNone;
    changed_.notify_all();
  }
  void OnError(const Status& status) {
    std::lock_guard lock(mutex_);
    EXPECT_FALSE(ended_) << "an error after the end: " << status;
    status_ = status;
    ended_ = true;
    changed_.notify_all();
  }
  void OnLayer(LayerEvent event) {
    std::lock_guard lock(mutex_);
    EXPECT_FALSE(ended_) << "a layer after the end";
    layers_.push_back(std::move(event));
    changed_.notify_all();
  }
  void OnDestroyed() {
    std::lock_guard lock(mutex_);
    destroyed_ = true;
    changed_.notify_all();
  }

  Status AwaitEnd() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return destroyed_; });
    return ended_ ? status_ : Internal("destroyed uncalled");
  }
  void AwaitTokens(size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return tokens_.size() >= count || ended_; });
  }
  void SkipIndex() { ++next_index_; }  // before submission: a token that the engine will not say
  std::vector<int32_t> tokens() const { return Locked(tokens_); }
  std::vector<LayerEvent> layers() const { return Locked(layers_); }
  std::vector<float> mtp_hidden() const { return Locked(mtp_hidden_); }
  std::vector<SampledToken> prompt() const { return Locked(prompt_); }
  int32_t cached_tokens() const { return Locked(cached_tokens_); }
  FinishReason finish() const { return Locked(finish_); }
  Status status() const { return Locked(status_); }
  bool ended() const { return Locked(ended_); }

 private:
  template <typename T>
  T Locked(const T& value) const {
    std::lock_guard lock(mutex_);
    return value;
  }

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  int32_t next_index_;
  const bool is_prefill_;
  std::vector<int32_t> tokens_;
  std::vector<LayerEvent> layers_;
  int32_t cached_tokens_ = -1;
  std::vector<SampledToken> prompt_;
  std::vector<float> mtp_hidden_;
  FinishReason finish_ = FinishReason::kNone;
  Status status_;
  bool ended_ = false;
  bool destroyed_ = false;
};

class RecordingSink final : public PrefillSink {
 public:
  explicit RecordingSink(std::shared_ptr<Recording> recording) : recording_(std::move(recording)) {}
  ~RecordingSink() override { recording_->OnDestroyed(); }
  void OnToken(const TokenEvent& event) override { recording_->OnToken(event); }
  void OnError(const Status& status) override { recording_->OnError(status); }
  void OnLayer(int32_t layer, int32_t first_page, std::span<const PageId> pages) override {
    recording_->OnLayer({layer, first_page, std::vector<PageId>(pages.begin(), pages.end())});
  }

 private:
  const std::shared_ptr<Recording> recording_;
};

}  // namespace millrace::engine
