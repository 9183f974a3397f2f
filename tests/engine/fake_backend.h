#pragma once
// A pseudo-model whose tokens depend on every byte of a sequence's KV: a page mixed up, a position off by one
// or a row that was never written changes the answer. Two computed layers and an MTP layer that guesses right
// three times of four. It computes in memory of its own, like a device: what crosses to and from kv_memory()
// crosses as backend.h says, or the answer is wrong.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <set>
#include <vector>

#include "base/check.h"
#include "base/random.h"
#include "engine/backend/backend.h"
#include "engine/core/engine.h"
#include "engine/sampling/sampler.h"

namespace millrace::engine {

inline constexpr int32_t kFakeLayers = 2;
inline constexpr int32_t kFakeVocabSize = 97;
inline constexpr int32_t kFakeVocabularyTokens = 90;  // the last rows of the logits have no token
inline constexpr int32_t kFakeEos = 3;
inline constexpr int32_t kFakeContext = 1024;

inline uint64_t FakeFirstKey(int32_t token, int32_t position) {
  return Mix64(static_cast<uint64_t>(token) << 32 | static_cast<uint64_t>(position));
}
inline uint64_t FakeValue(uint64_t key, int32_t layer) {
  return Mix64(key ^ static_cast<uint64_t>(layer + 7));
}
inline uint64_t FakeFold(uint64_t state, uint64_t key, uint64_t value) {
  return Mix64(state ^ key ^ value << 1);
}
inline uint64_t FakeNextKey(uint64_t state, int32_t layer) {
  return Mix64(state + static_cast<uint64_t>(layer));
}
inline void FakeLogits(uint64_t state, std::vector<float>* logits) {
  for (int32_t i = 0; i < kFakeVocabSize; ++i) {
    const float noise = static_cast<float>(Mix64(state + static_cast<uint64_t>(i)) >> 40) * 0x1p-24f;
    // Rows without a token are the most likely ones, for whoever draws them by mistake.
    logits->push_back(8 * noise + (i >= kFakeVocabularyTokens ? 20.0f : 0.0f));
  }
}

inline uint64_t FakeRead(std::span<const std::byte> memory, size_t offset) {
  uint64_t value;
  std::memcpy(&value, memory.data() + offset, sizeof(value));
  return value;
}
inline void FakeWrite(std::span<std::byte> memory, size_t offset, uint64_t value) {
  std::memcpy(memory.data() + offset, &value, sizeof(value));
}

// One layer of the model for tokens [position, position + n): reads the layer below through the page table.
inline void FakeLayer(const KvLayout& layout, std::span<std::byte> memory, int32_t layer,
                      const Segment& segment) {
  const auto row = [&](int32_t of_layer, int v, int32_t at) {
    return layout.piece_offset(of_layer, segment.pages[static_cast<size_t>(at / kPageTokens)]) +
           layout.row_offset(v, 0, at % kPageTokens);
  };
  const int32_t end = segment.position + static_cast<int32_t>(segment.tokens.size());
  uint64_t state = 0;
  for (int32_t at = layer == 0 ? segment.position : 0; at < end; ++at) {
    uint64_t key = 0;
    if (layer == 0) {
      key = FakeFirstKey(segment.tokens[static_cast<size_t>(at - segment.position)], at);
    } else {
      state =
          FakeFold(state, FakeRead(memory, row(layer - 1, 0, at)), FakeRead(memory, row(layer - 1, 1, at)));
      key = FakeNextKey(state, layer);
    }
    if (at < segment.position) continue;
    FakeWrite(memory, row(layer, 0, at), key);
    FakeWrite(memory, row(layer, 1, at), FakeValue(key, layer));
  }
}

inline size_t FakeRow(const KvLayout& layout, std::span<const PageId> pages, int32_t layer, int32_t at) {
  return layout.piece_offset(layer, pages[static_cast<size_t>(at / kPageTokens)]) +
         layout.row_offset(0, 0, at % kPageTokens);
}

// Over the first `end` rows of a layer, as the layer above sees them after the last one.
inline uint64_t FakeState(const KvLayout& layout, std::span<const std::byte> memory,
                          std::span<const PageId> pages, int32_t layer, int32_t end) {
  const size_t value = layout.row_offset(1, 0, 0) - layout.row_offset(0, 0, 0);
  uint64_t state = 0;
  for (int32_t at = 0; at < end; ++at) {
    const size_t row = FakeRow(layout, pages, layer, at);
    state = FakeFold(state, FakeRead(memory, row), FakeRead(memory, row + value));
  }
  return state;
}

// A row's final hidden state as floats, 16 bits in each, and back.
inline constexpr int32_t kFakeHidden = 4;
inline void FakeHidden(uint64_t state, std::vector<float>* hidden) {
  for (int i = 0; i < kFakeHidden; ++i) hidden->push_back(static_cast<float>(state >> (16 * i) & 0xffff));
}
inline uint64_t FakeHiddenState(std::span<const float> hidden) {
  uint64_t state = 0;
  for (size_t i = 0; i < kFakeHidden; ++i) state |= static_cast<uint64_t>(hidden[i]) << (16 * i);
  return state;
}
// What the MTP layer keeps of a row: its state and the token after it.
inline uint64_t FakeMtpKey(uint64_t state, uint64_t next_first_key) {
  return Mix64(state ^ next_first_key << 1);
}

inline KvLayout FakeLayout(int32_t num_pages) {
  KvLayout layout;
  layout.num_layers = kFakeLayers + 1;
  layout.num_pages = num_pages;
  layout.num_kv_heads = 1;
  layout.head_dim = 2;
  layout.dtype = KvDType::kF32;  // one row = 8 bytes
  return layout;
}

inline ModelConfig FakeConfig() {
  ModelConfig config;
  config.num_layers = kFakeLayers;
  config.num_mtp_layers = 1;
  config.max_position = kFakeContext;
  config.vocab_size = kFakeVocabSize;
  config.hidden_size = kFakeHidden;
  config.eos_token_ids = {kFakeEos};
  return config;
}

class FakeBackend final : public Backend {
 public:
  explicit FakeBackend(int32_t num_pages)
      : config_(FakeConfig()),
        layout_(FakeLayout(num_pages)),
        device_(layout_.total_bytes()),
        memory_(layout_.total_bytes()) {}

  const ModelConfig& config() const override { return config_; }
  const KvLayout& kv_layout() const override { return layout_; }
  std::span<std::byte> kv_memory() override { return memory_; }
  std::string Describe() const override { return "fake"; }

  Status ToHost(std::span<const PageId> pages) override {
    for (int32_t layer = 0; layer < layout_.num_layers; ++layer) CopyLayer(device_, memory_, layer, pages);
    return CopyFailure();
  }
  Status FromHost(std::span<const PageId> pages) override {
    for (int32_t layer = 0; layer < layout_.num_layers; ++layer) CopyLayer(memory_, device_, layer, pages);
    return CopyFailure();
  }

  StatusOr<StepOutput> Forward(const Batch& batch, const LayerDone& layer_done) override {
    Status failure;
    {
      std::unique_lock lock(mutex_);
      ++forwards_;
      changed_.notify_all();
      changed_.wait(lock, [this] { return open_ > 0; });
      if (open_ != kOpen) --open_;
      failure = failure_;
      for (const Segment& segment : batch.segments)
        segments_.emplace_back(segment.position, segment.tokens.size());
    }
    if (!failure.ok()) return failure;
    Check(batch);
    for (int32_t layer = 0; layer < kFakeLayers; ++layer) {
      for (const Segment& segment : batch.segments) {
        FakeLayer(layout_, device_, layer, segment);
        if (segment.exported) CopyLayer(device_, memory_, layer, Written(segment));
      }
      layer_done(layer);
    }
    logits_.clear();
    hidden_.clear();
    for (const Segment& segment : batch.segments) {
      const auto end = segment.position + static_cast<int32_t>(segment.tokens.size());
      for (int32_t at = end - segment.num_logits; at < end; ++at) {
        const uint64_t state = FakeState(layout_, device_, segment.pages, kFakeLayers - 1, at + 1);
        FakeLogits(state, &logits_);
        FakeHidden(state, &hidden_);
      }
      for (size_t i = 0; i < segment.next_tokens.size(); ++i) {
        const int32_t at = segment.position + static_cast<int32_t>(i);
        if (segment.next_tokens[i] < 0) continue;
        WriteMtp(segment.pages, at, FakeState(layout_, device_, segment.pages, kFakeLayers - 1, at + 1),
                 segment.next_tokens[i]);
      }
      if (segment.exported) CopyLayer(device_, memory_, kFakeLayers, Written(segment));
    }
    StepOutput output;
    output.logits = logits_;
    output.hidden = hidden_;
    if (draws_.load()) DrawGreedy(batch, &output);
    return output;
  }

  StatusOr<std::span<const float>> ForwardMtp(std::span<const MtpSegment> segments) override {
    logits_.clear();
    for (const MtpSegment& segment : segments) {
      int32_t at = segment.position;
      for (size_t i = 0; i < segment.next_tokens.size(); ++i, ++at) {
        const uint64_t state = FakeHiddenState(segment.hidden.subspan(i * kFakeHidden, kFakeHidden));
        MR_CHECK(state == FakeState(layout_, device_, segment.pages, kFakeLayers - 1, at + 1),
                 "the hidden state of row {} is that of another", at);
        WriteMtp(segment.pages, at, state, segment.next_tokens[i]);
      }
      CheckMtpRows(segment.pages, at - 1);
      // The next token's rows, as the main model will compute them.
      uint64_t states[kFakeLayers];
      uint64_t key = FakeFirstKey(segment.next_tokens.back(), at);
      for (int32_t layer = 0; layer < kFakeLayers; ++layer) {
        states[layer] =
            FakeFold(FakeState(layout_, device_, segment.pages, layer, at), key, FakeValue(key, layer));
        key = FakeNextKey(states[layer], layer + 1);
      }
      const uint64_t state = states[kFakeLayers - 1];
      FakeLogits(Mix64(state) % 4 == 0 ? state + 1 : state, &logits_);
    }
    return std::span<const float>(logits_);
  }
  // The last one first: whoever relies on an order gets it wrong.
  void RunParallel(int64_t num_tasks, int64_t, absl::FunctionRef<void(int64_t)> task) override {
    for (int64_t i = num_tasks; i-- > 0;) task(i);
  }
  // Rows of the MTP layer that ForwardMtp found other than they must be. The last row of a page may have been
  // computed for another continuation of the same text and does not count.
  int32_t wrong_mtp_rows() const { return wrong_mtp_rows_; }

  // Test thread. Greedy tokens are drawn here from now on, and their logits spoilt.
  void DrawGreedyTokens() { draws_.store(true); }
  // Test thread. From now on a Forward stops at its start until let through.
  void Close() {
    std::lock_guard lock(mutex_);
    open_ = 0;
  }
  void LetThrough(int32_t count) { SetOpen(count); }
  void Open() { SetOpen(kOpen); }
  void AwaitForward(int32_t count) {  // until `count` Forwards have begun, all in all
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return forwards_ >= count; });
  }
  void FailWith(const Status& status) {
    std::lock_guard lock(mutex_);
    failure_ = status;
  }
  void FailCopiesWith(const Status& status) {
    std::lock_guard lock(mutex_);
    copy_failure_ = status;
  }
  int32_t forwards() const {
    std::lock_guard lock(mutex_);
    return forwards_;
  }
  std::vector<std::pair<int32_t, size_t>> segments() const {  // (position, tokens) of all that ran
    std::lock_guard lock(mutex_);
    return segments_;
  }

 private:
  static constexpr int32_t kOpen = 1 << 30;

  void SetOpen(int32_t open) {
    {
      std::lock_guard lock(mutex_);
      open_ = open;
    }
    changed_.notify_all();
  }

  void DrawGreedy(const Batch& batch, StepOutput* output) {
    drawn_.clear();
    for (const Segment& segment : batch.segments) {
      for (int32_t i = 1; i < segment.num_logits; ++i) drawn_.push_back(-1);
      if (segment.num_logits == 0) continue;
      const auto row = std::span(logits_).subspan(drawn_.size() * kFakeVocabSize, kFakeVocabSize);
      drawn_.push_back(-1);
      if (!segment.draw.has_value() || segment.draw->temperature > 0) continue;
      const auto drawable = row.first(static_cast<size_t>(segment.draw->num_tokens));
      drawn_.back() =
          static_cast<int32_t>(std::max_element(drawable.begin(), drawable.end()) - drawable.begin());
      std::fill(row.begin(), row.end(), 0.0f);
    }
    output->drawn = drawn_;
  }
  Status CopyFailure() const {
    std::lock_guard lock(mutex_);
    return copy_failure_;
  }
  static std::span<const PageId> Written(const Segment& segment) {
    const int32_t first = segment.position / kPageTokens;
    const int32_t end = PagesFor(segment.position + static_cast<int64_t>(segment.tokens.size()));
    return segment.pages.subspan(static_cast<size_t>(first), static_cast<size_t>(end - first));
  }
  void CopyLayer(const std::vector<std::byte>& from, std::vector<std::byte>& to, int32_t layer,
                 std::span<const PageId> pages) const {
    for (const PageId page : pages) {
      const size_t offset = layout_.piece_offset(layer, page);
      std::memcpy(to.data() + offset, from.data() + offset, layout_.piece_bytes());
    }
  }

  void Check(const Batch& batch) const {
    std::set<PageId> read, written;
    for (const Segment& segment : batch.segments) {
      MR_CHECK(!segment.tokens.empty());
      MR_CHECK(segment.pages.size() * kPageTokens >=
               static_cast<size_t>(segment.position) + segment.tokens.size());
      // What is computed already may be shared; what is written is the segment's own.
      for (size_t i = 0; i < segment.pages.size(); ++i) {
        const bool is_read = (i + 1) * kPageTokens <= static_cast<size_t>(segment.position);
        if (is_read) {
          read.insert(segment.pages[i]);
        } else {
          MR_CHECK(written.insert(segment.pages[i]).second, "page {} in two places", segment.pages[i]);
        }
      }
      if (segment.num_logits == 0) MR_CHECK(segment.tokens.size() % kPageTokens == 0);
    }
    for (const PageId page : written)
      MR_CHECK(!read.contains(page), "page {} is written to and shared", page);
  }

  void WriteMtp(std::span<const PageId> pages, int32_t at, uint64_t state, int32_t next_token) {
    FakeWrite(device_, FakeRow(layout_, pages, kFakeLayers, at),
              FakeMtpKey(state, FakeFirstKey(next_token, at + 1)));
  }
  void CheckMtpRows(std::span<const PageId> pages, int32_t end) {
    for (int32_t at = 0; at < end; ++at) {
      if (at % kPageTokens == kPageTokens - 1) continue;
      const uint64_t next = FakeRead(device_, FakeRow(layout_, pages, 0, at + 1));
      const uint64_t state = FakeState(layout_, device_, pages, kFakeLayers - 1, at + 1);
      if (FakeRead(device_, FakeRow(layout_, pages, kFakeLayers, at)) != FakeMtpKey(state, next))
        ++wrong_mtp_rows_;
    }
  }

  const ModelConfig config_;
  const KvLayout layout_;
  std::vector<std::byte> device_;
  std::vector<std::byte> memory_;  // its mirror
  std::vector<float> logits_;
  std::vector<float> hidden_;
  int32_t wrong_mtp_rows_ = 0;  // engine thread
  std::vector<int32_t> drawn_;
  std::atomic<bool> draws_{false};

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  int32_t open_ = kOpen;
  int32_t forwards_ = 0;
  Status failure_;
  Status copy_failure_;
  std::vector<std::pair<int32_t, size_t>> segments_;
};

// The KV of `tokens` from page `first_page` on in `pages`, as another worker would compute and send it.
inline void FakePrefill(const KvLayout& layout, std::span<std::byte> memory, std::span<const int32_t> tokens,
                        std::span<const PageId> pages, int32_t first_page = 0) {
  const KvLayout source = FakeLayout(PagesFor(static_cast<int64_t>(tokens.size())));
  std::vector<std::byte> computed(source.total_bytes());
  std::vector<PageId> table;
  for (PageId page = 0; page < source.num_pages; ++page) table.push_back(page);
  Segment segment;
  segment.tokens = tokens;
  segment.pages = table;
  for (int32_t layer = 0; layer < kFakeLayers; ++layer) {
    FakeLayer(source, computed, layer, segment);
    for (size_t i = 0; i < pages.size(); ++i) {
      std::memcpy(memory.data() + layout.piece_offset(layer, pages[i]),
                  computed.data() + source.piece_offset(layer, first_page + static_cast<PageId>(i)),
                  layout.piece_bytes());
    }
  }
}

struct FakeAnswer {
  std::vector<int32_t> tokens;  // new ones
  FinishReason finish = FinishReason::kNone;
};

// The logits of the row of the last token.
inline std::vector<float> FakeLogitsAfter(std::span<const int32_t> tokens) {
  uint64_t states[kFakeLayers] = {};
  for (size_t position = 0; position < tokens.size(); ++position) {
    uint64_t key = FakeFirstKey(tokens[position], static_cast<int32_t>(position));
    for (int32_t layer = 0; layer < kFakeLayers; ++layer) {
      states[layer] = FakeFold(states[layer], key, FakeValue(key, layer));
      key = FakeNextKey(states[layer], layer + 1);
    }
  }
  std::vector<float> logits;
  FakeLogits(states[kFakeLayers - 1], &logits);
  return logits;
}

// What the model answers, computed without pages, batches or an engine.
inline FakeAnswer ExpectedAnswer(const EngineRequest& request) {
  FakeAnswer answer;
  std::vector<int32_t> tokens = request.prompt;
  tokens.insert(tokens.end(), request.output.begin(), request.output.end());
  std::vector<int32_t> ends = request.sampling.stop_token_ids;
  if (!request.sampling.ignore_eos) ends.push_back(kFakeEos);
  uint64_t states[kFakeLayers] = {};
  int32_t position = 0;
  while (answer.finish == FinishReason::kNone) {
    for (; position < static_cast<int32_t>(tokens.size()); ++position) {
      uint64_t key = FakeFirstKey(tokens[static_cast<size_t>(position)], position);
      for (int32_t layer = 0; layer < kFakeLayers; ++layer) {
        states[layer] = FakeFold(states[layer], key, FakeValue(key, layer));
        key = FakeNextKey(states[layer], layer + 1);
      }
    }
    std::vector<float> logits;
    FakeLogits(states[kFakeLayers - 1], &logits);
    SampleInput input;
    input.logits = logits;
    input.prompt = std::span(tokens).first(request.prompt.size());
    input.output = std::span(tokens).subspan(request.prompt.size());
    input.end_tokens = ends;
    input.num_tokens_in_vocabulary = kFakeVocabularyTokens;
    const int32_t token = Sample(input, request.sampling).token;
    tokens.push_back(token);
    answer.tokens.push_back(token);
    const size_t num_output = tokens.size() - request.prompt.size();
    if (std::find(ends.begin(), ends.end(), token) != ends.end()) {
      answer.finish = FinishReason::kStop;
    } else if (num_output == static_cast<size_t>(request.sampling.max_tokens) ||
               tokens.size() == kFakeContext) {
      answer.finish = FinishReason::kLength;
    }
  }
  return answer;
}

}  // namespace millrace::engine
