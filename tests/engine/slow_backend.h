#pragma once
// The fake backend on a fake clock that its tokens move.

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
    }
    return fake_.Forward(batch, layer_done);
  }

  StatusOr<std::span<const float>> ForwardMtp(std::span<const MtpSegment> segments) override {
    return fake_.ForwardMtp(segments);
  }

 private:
  FakeBackend fake_;
  FakeClock* const clock_;
  const Duration per_token_;
};

}  // namespace millrace::engine
