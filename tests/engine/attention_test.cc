// Attention of a whole step over contexts of several spans of 1024 keys, shared among threads and not,
// against plain softmax in double.

#include "engine/backend/cpu/attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "base/random.h"
#include "engine/backend/cpu/bfloat16.h"

namespace millrace::engine {
namespace {

constexpr int32_t kHeads = 4;
constexpr int32_t kKvHeads = 2;
constexpr int32_t kHeadDim = 32;
constexpr int32_t kLayer = 1;

float Noise(Random& random, float scale) { return scale * static_cast<float>(2 * random.Uniform() - 1); }

// Sequences of these lengths on scattered pages of one pool, everything else poisoned.
class Contexts {
 public:
  explicit Contexts(const std::vector<int32_t>& lengths) {
    int32_t pages = 0;
    for (const int32_t length : lengths) pages += PagesFor(length);
    layout_.num_layers = 2;
    layout_.num_pages = pages;
    layout_.num_kv_heads = kKvHeads;
    layout_.head_dim = kHeadDim;
    memory_.assign(layout_.total_bytes(), std::byte{0xff});  // NaN
    Random random(uint64_t{1} << 30);
    PageId next = 0;
    for (const int32_t length : lengths) {
      std::vector<PageId>& table = tables_.emplace_back();
      for (int32_t p = 0; p < PagesFor(length); ++p) table.push_back(next++);
      for (size_t p = table.size(); p > 1; --p) std::swap(table[p - 1], table[random.Below(p)]);
      for (int32_t key = 0; key < length; ++key) {
        for (int v = 0; v < 2; ++v) {
          for (int32_t head = 0; head < kKvHeads; ++head) {
            for (int32_t d = 0; d < kHeadDim; ++d) *At(table, v, head, key, d) = ToBf16(Noise(random, 1));
          }
        }
      }
    }
  }
  const KvLayout& layout() const { return layout_; }
  const std::byte* memory() const { return memory_.data(); }
  const std::vector<PageId>& table(size_t sequence) const { return tables_[sequence]; }
  double Value(size_t sequence, int v, int32_t head, int32_t key, int32_t d) {
    return FromBf16(*At(tables_[sequence], v, head, key, d));
  }

 private:
  uint16_t* At(const std::vector<PageId>& table, int v, int32_t head, int32_t key, int32_t d) {
    std::byte* const piece =
        memory_.data() + layout_.piece_offset(kLayer, table[static_cast<size_t>(key / kPageTokens)]);
    return reinterpret_cast<uint16_t*>(piece + layout_.row_offset(v, head, key % kPageTokens)) + d;
  }
  KvLayout layout_;
  std::vector<std::byte> memory_;
  std::vector<std::vector<PageId>> tables_;
};

// The last `rows[s]` tokens of each sequence attend. Returns [row][heads * head_dim].
std::vector<std::vector<float>> Attend(Contexts& contexts, const std::vector<int32_t>& lengths,
                                       const std::vector<int32_t>& rows,
                                       const std::vector<std::vector<float>>& queries, int threads) {
  ThreadPool pool(threads);
  AttentionRunner runner(contexts.layout(), kHeads, PortableKernels(), pool);
  std::vector<Segment> segments(lengths.size());
  std::vector<AttentionRun> runs;
  int32_t first_row = 0;
  for (size_t s = 0; s < lengths.size(); ++s) {
    segments[s].pages = contexts.table(s);
    runs.push_back({&segments[s], first_row, rows[s], lengths[s] - rows[s]});
    first_row += rows[s];
  }
  std::vector<std::vector<float>> output(queries.size(), std::vector<float>(kHeads * kHeadDim, NAN));
  std::vector<float*> in, out;
  for (size_t r = 0; r < queries.size(); ++r) {
    in.push_back(const_cast<float*>(queries[r].data()));
    out.push_back(output[r].data());
  }
  runner.Run(runs, kLayer, contexts.memory(), in, out);
  return output;
}

TEST(AttentionRunner, LongContextsEqualPlainSoftmaxAndAnyThreadCount) {
  // One token of a long context, and a few of several: the spans are shared among threads only while there
  // are fewer (block, kv head) pairs than twice the threads.
  const struct {
    std::vector<int32_t> lengths, rows;
  } cases[] = {{{1025}, {1}}, {{3200}, {1}}, {{2049}, {5}}, {{4096, 70, 1024}, {1, 1, 2}}};
  for (const auto& c : cases) {
    SCOPED_TRACE(::testing::Message()
                 << c.lengths.front() << " keys of " << c.lengths.size() << " sequences");
    Contexts contexts(c.lengths);
    Random random(uint64_t{2} << 30);
    std::vector<std::vector<float>> queries;
    for (const int32_t rows : c.rows) {
      for (int32_t r = 0; r < rows; ++r) {
        std::vector<float>& query = queries.emplace_back(kHeads * kHeadDim);
        for (float& value : query) value = Noise(random, 0.8f);
      }
    }
    // Four threads share the spans of every case; one thread takes block after block.
    ASSERT_LT(c.rows.size() * kKvHeads, 2 * 4);
    ASSERT_GE(c.rows.size() * kKvHeads, 2 * 1);
    const auto shared = Attend(contexts, c.lengths, c.rows, queries, 4);
    const auto whole = Attend(contexts, c.lengths, c.rows, queries, 1);
    size_t row = 0;
    for (size_t s = 0; s < c.lengths.size(); ++s) {
      for (int32_t r = 0; r < c.rows[s]; ++r, ++row) {
        const int32_t keys = c.lengths[s] - c.rows[s] + r + 1;
        for (int32_t head = 0; head < kHeads; ++head) {
          const int32_t kv_head = head / (kHeads / kKvHeads);
          std::vector<double> weights;
          double sum = 0;
          for (int32_t key = 0; key < keys; ++key) {
            double score = 0;
            for (int32_t d = 0; d < kHeadDim; ++d) {
              score += double{queries[row][static_cast<size_t>(head * kHeadDim + d)]} *
                       contexts.Value(s, 0, kv_head, key, d);
            }
            weights.push_back(std::exp(score));  // scores are small: no maximum to take out
            sum += weights.back();
          }
          for (int32_t d = 0; d < kHeadDim; ++d) {
            double want = 0;
            for (int32_t key = 0; key < keys; ++key)
              want += weights[static_cast<size_t>(key)] * contexts.Value(s, 1, kv_head, key, d);
            const auto at = static_cast<size_t>(head * kHeadDim + d);
            ASSERT_NEAR(shared[row][at], want / sum, 2e-6) << "row " << row << " head " << head;
            ASSERT_EQ(shared[row][at], whole[row][at]) << "row " << row << " head " << head;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace millrace::engine
