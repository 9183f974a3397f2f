#pragma once
// A backend that does no maths and keeps time: every step ends at a tick of the steady clock, and its token
// says which. So whoever reads a token knows how long ago it was there to be sent.

#include <chrono>
#include <thread>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "engine/backend/backend.h"

namespace millrace::engine {

class NullBackend final : public Backend {
 public:
  // Ticks are `tick` apart; steps end at every one whose number modulo `every` is `phase`. In the step that
  // ends at tick k every sequence draws tokens[k % tokens.size()].
  NullBackend(ModelConfig config, int32_t num_pages, int32_t rows_max, Duration tick, int64_t every,
              int64_t phase, std::vector<int32_t> tokens)
      : config_(std::move(config)),
        layout_({.num_layers = 1,
                 .num_pages = num_pages,
                 .num_kv_heads = 1,
                 .head_dim = 1,
                 .dtype = KvDType::kBf16}),
        memory_(layout_.total_bytes()),
        logits_(static_cast<size_t>(rows_max) * static_cast<size_t>(config_.vocab_size)),
        tick_(tick),
        every_(every),
        phase_(phase),
        tokens_(std::move(tokens)) {}

  const ModelConfig& config() const override { return config_; }
  const KvLayout& kv_layout() const override { return layout_; }
  std::span<std::byte> kv_memory() override { return memory_; }
  std::string Describe() const override { return "nothing but time"; }

  StatusOr<StepOutput> Forward(const Batch& batch, const LayerDone& layer_done) override {
    int64_t tick = std::chrono::steady_clock::now().time_since_epoch() / tick_ + 1;
    tick += ((phase_ - tick) % every_ + every_) % every_;
    std::this_thread::sleep_until(TimePoint(tick_ * tick));
    layer_done(0);
    drawn_.clear();
    for (const Segment& segment : batch.segments) {
      if (segment.num_logits > 1 || (segment.num_logits == 1 && !segment.draw.has_value()))
        return Unimplemented("there are no logits here: no penalties, masks or log-probabilities");
      if (segment.num_logits == 1) drawn_.push_back(tokens_[static_cast<size_t>(tick) % tokens_.size()]);
    }
    StepOutput output;
    output.logits = std::span(logits_).first(drawn_.size() * static_cast<size_t>(config_.vocab_size));
    output.drawn = drawn_;
    return output;
  }

 private:
  const ModelConfig config_;
  const KvLayout layout_;
  std::vector<std::byte> memory_;
  std::vector<float> logits_;  // [rows_max, vocab_size], never read: every row is drawn
  std::vector<int32_t> drawn_;
  const Duration tick_;
  const int64_t every_;
  const int64_t phase_;
  const std::vector<int32_t> tokens_;
};

}  // namespace millrace::engine
