#pragma once
// The fake backend on a fake clock that its tokens move.

#include <algorithm>

#include "tests/engine/fake_backend.h"

namespace millrace::engine {

class SlowBackend final : public Backend {
 public:
  SlowBackend(int32_t num_pages, FakeClock* clock, Duration per_token)
      : fake_(num_pages), clock_(clock), per_token_(per_token) {}
  const ModelConfig& config() const override { return fake_.config(); }
  const KvLayout& kv_layout() const override { return fake_.kv_layout(); }
  std::span<std::byte> kv_memory() override { return fake_.kv_memory(); }
  Status ToHost(std::span<const PageId> pages) override { return fake_.ToHost(pages); }
  Status FromHost(std::span<const PageId> pages) override { return fake_.FromHost(pages); }
  std::string Describe() const override { return "slow"; }
  StatusOr<StepOutput> Forward(const Batch& batch, const LayerDone& layer_done) override {
    for (const Segment& segment : batch.segments) {
      clock_->Advance(per_token_ * static_cast<int64_t>(segment.tokens.size()));
      mtp_rows_ += std::ranges::count_if(segment.next_tokens, [](int32_t token) { return token >= 0; });
    }
    return fake_.Forward(batch, layer_done);
  }

  StatusOr<std::span<const float>> ForwardMtp(std::span<const MtpSegment> segments) override {
    return fake_.ForwardMtp(segments);
  }
  // Of prompts: what Forward was asked to compute of the MTP layer.
  int64_t mtp_rows() const { return mtp_rows_; }

 private:
  int64_t mtp_rows_ = 0;
  FakeBackend fake_;
  FakeClock* const clock_;
  const Duration per_token_;
};

}  // namespace millrace::engine
