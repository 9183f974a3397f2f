// The kernels around attention and experts against fp64 on the CPU: embedding, norms, rotary KV write,
// routing, slots, combine, SwiGLU. Padding and pages that nothing names are poisoned first and must stay as
// they are.
#include <algorithm>
#include <limits>
#include <set>

#include "engine/backend/cuda/gemm.h"
#include "engine/backend/cuda/kernels/combine.h"
#include "engine/backend/cuda/kernels/norm.h"
#include "engine/backend/cuda/kernels/qk_rope.h"
#include "engine/backend/cuda/kernels/router.h"
#include "tests/engine/cuda/hot/support.h"
#include "tests/engine/cuda/step/tests.h"

namespace millrace::test {
namespace {

using namespace millrace::engine::cuda;  // NOLINT: what is tested

constexpr double kHalfUlp =
    1.0 / 256;  // bf16 rounds to 8 bits: an error of 2^-9, doubled for the fp32 sums before it

std::vector<float> NormalFloats(size_t count, float mean, float deviation, uint32_t seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(mean, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = normal(engine);
  return values;
}

double InverseRms(const float* x, int n, double eps) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += double{x[i]} * x[i];
  return 1 / std::sqrt(sum / n + eps);
}

void TestNorm(int rows, int hidden, bool bias, bool index) {
  const std::vector<float> x = NormalFloats(static_cast<size_t>(rows) * hidden, 0.1f, 3, 1);
  const std::vector<float> weight = NormalFloats(hidden, 1, 0.3f, 2);
  const std::vector<float> b = NormalFloats(hidden, 0, 1, 3);
  std::vector<int32_t> rows_read(rows);
  for (int r = 0; r < rows; ++r) rows_read[r] = index ? (r * 7 + 3) % rows : r;
  Device<float> residual(x), weights(weight), biases(b);
  Device<int32_t> indices(rows_read);
  Device<Bf16> out(static_cast<size_t>(rows + 1) * hidden);
  RmsNormArgs args;
  args.residual = residual.get();
  args.bias = bias ? biases.get() : nullptr;
  args.weight = weights.get();
  args.index = index ? indices.get() : nullptr;
  args.out = out.get();
  args.rows = rows;
  args.hidden = hidden;
  args.eps = 1e-6f;
  CUDA_OK(LaunchRmsNorm(args, nullptr));
  const std::vector<Bf16> got = out.Get();
  const std::vector<float> after = residual.Get();
  Comparison comparison;
  for (int r = 0; r < rows; ++r) {
    std::vector<float> row(x.begin() + int64_t{rows_read[r]} * hidden,
                           x.begin() + (int64_t{rows_read[r]} + 1) * hidden);
    for (int i = 0; bias && i < hidden; ++i) row[i] += b[i];
    for (int i = 0; i < hidden; ++i) {
      EXPECT(after[int64_t{rows_read[r]} * hidden + i] == row[i], "residual %d %d", r, i);
    }
    const double scale = InverseRms(row.data(), hidden, 1e-6);
    for (int i = 0; i < hidden; ++i) {
      const double want = row[i] * scale * weight[i];
      comparison.Add(Value(got[int64_t{r} * hidden + i]), want, std::fabs(want) * kHalfUlp + 1e-30);
    }
  }
  EXPECT_CLOSE(comparison, 1e-5, "rms norm");
  EXPECT(IsPoison(got[int64_t{rows} * hidden]), "wrote past the last row");
}

void TestEmbed(int rows, int hidden) {
  const std::vector<Bf16> table = Normal(static_cast<size_t>(97) * hidden, 1, 4);
  std::vector<int32_t> tokens(rows);
  for (int r = 0; r < rows; ++r) tokens[r] = (r * 31 + 5) % 97;
  Device<Bf16> device_table(table);
  Device<int32_t> device_tokens(tokens);
  Device<float> out(static_cast<size_t>(rows) * hidden);
  CUDA_OK(LaunchEmbed({device_tokens.get(), device_table.get(), out.get(), rows, hidden}, nullptr));
  const std::vector<float> got = out.Get();
  bool equal = true;
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < hidden; ++i) {
      equal &=
          got[int64_t{r} * hidden + i] == static_cast<float>(Value(table[int64_t{tokens[r]} * hidden + i]));
    }
  }
  EXPECT(equal, "embedding of %d rows", rows);
}

void TestMtpInput(int rows, int hidden) {
  const std::vector<Bf16> table = Normal(static_cast<size_t>(50) * hidden, 1, 5);
  const std::vector<float> x = NormalFloats(static_cast<size_t>(rows + 3) * hidden, 0, 2, 6);
  const std::vector<float> norms = NormalFloats(static_cast<size_t>(3) * hidden, 1, 0.2f, 7);
  std::vector<int32_t> index(rows), tokens(rows);
  for (int r = 0; r < rows; ++r) index[r] = r + 3, tokens[r] = (r * 11) % 50;
  Device<Bf16> device_table(table), out(static_cast<size_t>(rows) * 2 * hidden);
  Device<float> device_x(x), device_norms(norms);
  Device<int32_t> device_index(index), device_tokens(tokens);
  MtpInputArgs args;
  args.residual = device_x.get();
  args.index = device_index.get();
  args.next_tokens = device_tokens.get();
  args.table = device_table.get();
  args.final_norm = device_norms.get();
  args.hidden_norm = device_norms.get() + hidden;
  args.embedding_norm = device_norms.get() + 2 * hidden;
  args.out = out.get();
  args.rows = rows;
  args.hidden = hidden;
  args.eps = 1e-6f;
  CUDA_OK(LaunchMtpInput(args, nullptr));
  const std::vector<Bf16> got = out.Get();
  Comparison comparison;
  for (int r = 0; r < rows; ++r) {
    std::vector<float> e(hidden), h(hidden);
    for (int i = 0; i < hidden; ++i) e[i] = static_cast<float>(Value(table[int64_t{tokens[r]} * hidden + i]));
    const float* row = x.data() + int64_t{index[r]} * hidden;
    const double scale = InverseRms(row, hidden, 1e-6);
    for (int i = 0; i < hidden; ++i) h[i] = static_cast<float>(row[i] * scale * norms[i]);
    const double e_scale = InverseRms(e.data(), hidden, 1e-6);
    const double h_scale = InverseRms(h.data(), hidden, 1e-6);
    for (int i = 0; i < hidden; ++i) {
      const double want_e = e[i] * e_scale * norms[2 * hidden + i];
      const double want_h = h[i] * h_scale * norms[hidden + i];
      comparison.Add(Value(got[int64_t{r} * 2 * hidden + i]), want_e, std::fabs(want_e) * kHalfUlp + 1e-30);
      comparison.Add(Value(got[(int64_t{r} * 2 + 1) * hidden + i]), want_h,
                     std::fabs(want_h) * kHalfUlp + 1e-30);
    }
  }
  EXPECT_CLOSE(comparison, 1e-5, "MTP input");
}

void TestSwiglu(int rows, int width) {
  const std::vector<Bf16> in = Normal(static_cast<size_t>(rows) * 2 * width, 2, 8);
  Device<Bf16> device_in(in), out(static_cast<size_t>(rows) * width);
  CUDA_OK(LaunchSwiglu({device_in.get(), out.get(), rows, width}, nullptr));
  const std::vector<Bf16> got = out.Get();
  Comparison comparison;
  for (size_t i = 0; i < got.size(); ++i) {
    const double gate = Value(in[2 * i]);
    const double want = gate / (1 + std::exp(-gate)) * Value(in[2 * i + 1]);
    comparison.Add(Value(got[i]), want, std::fabs(want) * kHalfUlp + 1e-30);
  }
  EXPECT_CLOSE(comparison, 1e-5, "swiglu");
}

struct HeadShape {
  int heads, kv_heads, head_dim, pairs;
  bool norm, bias;
};

void TestQkRope(const HeadShape& s, int rows) {
  constexpr int kPages = 5, kPositions = 300;
  const int width = (s.heads + 2 * s.kv_heads) * s.head_dim;
  const std::vector<Bf16> qkv = Normal(static_cast<size_t>(rows) * width, 1.5f, 9);
  const std::vector<float> bias = NormalFloats(width, 0, 0.5f, 10);
  const std::vector<float> norms = NormalFloats(static_cast<size_t>(2) * s.head_dim, 1, 0.3f, 11);
  std::vector<float> rope(static_cast<size_t>(kPositions) * 2 * s.pairs);
  for (int p = 0; p < kPositions; ++p) {
    for (int i = 0; i < s.pairs; ++i) {
      const double angle = p * std::pow(600000.0, -1.0 * i / s.pairs);
      rope[(int64_t{p} * 2) * s.pairs + i] = static_cast<float>(std::cos(angle));
      rope[(int64_t{p} * 2 + 1) * s.pairs + i] = static_cast<float>(std::sin(angle));
    }
  }
  std::vector<int32_t> positions(rows), slots(rows);
  for (int r = 0; r < rows; ++r) {
    positions[r] = (r * 17 + 63) % kPositions;
    slots[r] = r % 4 == 3 ? -1 : (r * 37 + 60) % (kPages * 64);  // 37 is coprime: no two rows share a slot
  }
  Device<Bf16> device_qkv(qkv), query(static_cast<size_t>(rows) * s.heads * s.head_dim);
  Device<Bf16> pages(static_cast<size_t>(kPages) * 2 * s.kv_heads * 64 * s.head_dim);
  Device<float> device_bias(bias), device_norms(norms), device_rope(rope);
  Device<int32_t> device_positions(positions), device_slots(slots);
  QkRopeArgs args;
  args.qkv = device_qkv.get();
  args.bias = s.bias ? device_bias.get() : nullptr;
  args.query_norm = s.norm ? device_norms.get() : nullptr;
  args.key_norm = s.norm ? device_norms.get() + s.head_dim : nullptr;
  args.rope = device_rope.get();
  args.positions = device_positions.get();
  args.kv_slots = device_slots.get();
  args.query = query.get();
  args.kv_layer = pages.get();
  args.rows = rows;
  args.heads = s.heads;
  args.kv_heads = s.kv_heads;
  args.head_dim = s.head_dim;
  args.pairs = s.pairs;
  args.eps = 1e-6f;
  CUDA_OK(LaunchQkRope(args, nullptr));
  const std::vector<Bf16> got_query = query.Get();
  std::vector<Bf16> got_pages = pages.Get();
  Comparison comparison;
  for (int r = 0; r < rows; ++r) {
    for (int head = 0; head < s.heads + 2 * s.kv_heads; ++head) {
      std::vector<double> x(s.head_dim);
      double squares = 0;
      double largest = 0;
      for (int d = 0; d < s.head_dim; ++d) {
        const int at = head * s.head_dim + d;
        x[d] = Value(qkv[int64_t{r} * width + at]) + (s.bias ? bias[at] : 0);
        squares += x[d] * x[d];
      }
      if (head < s.heads + s.kv_heads) {
        const double scale = s.norm ? 1 / std::sqrt(squares / s.head_dim + 1e-6) : 1;
        const float* weight = norms.data() + (head < s.heads ? 0 : s.head_dim);
        for (int d = 0; s.norm && d < s.head_dim; ++d) x[d] *= scale * weight[d];
        const float* cosine = rope.data() + int64_t{positions[r]} * 2 * s.pairs;
        for (int i = 0; i < s.pairs; ++i) {
          const double a = x[i], b = x[i + s.pairs];
          x[i] = a * cosine[i] - b * cosine[s.pairs + i];
          x[i + s.pairs] = b * cosine[i] + a * cosine[s.pairs + i];
        }
      }
      for (const double value : x) largest = std::max(largest, std::fabs(value));
      const Bf16* got = got_query.data() + (int64_t{r} * s.heads + head) * s.head_dim;
      if (head >= s.heads) {
        if (slots[r] < 0) continue;
        const int64_t piece = int64_t{slots[r] / 64} * 2 * s.kv_heads + head - s.heads;
        got = got_pages.data() + (piece * 64 + slots[r] % 64) * s.head_dim;
      }
      // Rotation may cancel: the bound is relative to the larger of value and 1e-3 of the head's largest.
      for (int d = 0; d < s.head_dim; ++d) {
        comparison.Add(Value(got[d]), x[d], std::max(std::fabs(x[d]), 1e-3 * largest) * kHalfUlp);
      }
    }
  }
  EXPECT_CLOSE(comparison, 1e-5, "QK norm, rotation and KV write");
  std::set<int32_t> written(slots.begin(), slots.end());
  bool untouched = true;
  for (int slot = 0; slot < kPages * 64; ++slot) {
    if (written.count(slot) != 0) continue;
    for (int head = 0; head < 2 * s.kv_heads; ++head) {
      const int64_t piece = int64_t{slot / 64} * 2 * s.kv_heads + head;
      for (int d = 0; d < s.head_dim; ++d)
        untouched &= IsPoison(got_pages[(piece * 64 + slot % 64) * s.head_dim + d]);
    }
  }
  EXPECT(untouched, "a row of the pages that no token owns was written");
}

// The rules of engine/moe/router.h once more, in double. `margin`: how far the closest decision was from the
// other side.
void RouteReference(const SelectExpertsArgs& a, const float* logits, const float* bias, std::vector<int>* ids,
                    std::vector<double>* weights, double* margin) {
  const int e_count = a.num_experts;
  std::vector<double> score(e_count), choice(e_count);
  double largest = -1e300, total = 0;
  for (int e = 0; e < e_count; ++e) largest = std::max<double>(largest, logits[e]);
  for (int e = 0; e < e_count; ++e) {
    score[e] = a.sigmoid ? 1 / (1 + std::exp(-double{logits[e]})) : std::exp(logits[e] - largest);
    total += score[e];
  }
  for (int e = 0; e < e_count; ++e) {
    if (!a.sigmoid) score[e] /= total;
    choice[e] = score[e] + (bias == nullptr ? 0 : bias[e]);
  }
  *margin = 1e300;
  const auto take = [&](std::vector<double>& from) {
    const size_t best = std::max_element(from.begin(), from.end()) - from.begin();
    const double value = from[best];
    from[best] = -std::numeric_limits<double>::infinity();
    for (const double other : from) {
      if (std::isfinite(other)) *margin = std::min(*margin, value - other);
    }
    return static_cast<int>(best);
  };
  if (a.num_groups > 0) {
    const int size = e_count / a.num_groups;
    std::vector<double> group(a.num_groups);
    for (int g = 0; g < a.num_groups; ++g) {
      std::vector<double> values(choice.begin() + g * size, choice.begin() + (g + 1) * size);
      std::sort(values.rbegin(), values.rend());
      group[g] = values[0] + (size > 1 ? values[1] : 0);
    }
    std::set<int> kept;
    for (int i = 0; i < a.groups_per_token; ++i) kept.insert(take(group));
    for (int e = 0; e < e_count; ++e) {
      if (kept.count(e / size) == 0) choice[e] = -std::numeric_limits<double>::infinity();
    }
  }
  double sum = 0;
  for (int j = 0; j < a.top_k; ++j) {
    ids->push_back(take(choice));
    weights->push_back(score[ids->back()]);
    sum += score[ids->back()];
  }
  const double divisor = a.norm_topk_prob && a.top_k > 1 ? sum + (a.sigmoid ? 1e-20 : 0) : 1;
  for (double& weight : *weights) weight = weight / divisor * a.scaling;
}

struct RouterCase {
  int experts, top_k, shared, groups, kept;
  bool sigmoid, bias;
};

void TestRouting(const RouterCase& c, int rows, int valid) {
  const std::vector<float> logits = NormalFloats(static_cast<size_t>(rows) * c.experts, 0, 1.5f, 12 + rows);
  const std::vector<float> bias = NormalFloats(c.experts, 0, 0.2f, 13);
  const int slots = c.top_k + c.shared;
  const int all = c.experts + c.shared;
  Device<float> device_logits(logits), device_bias(bias), weights(static_cast<size_t>(rows) * c.top_k);
  Device<int32_t> valid_rows(std::vector<int32_t>{valid}), experts(static_cast<size_t>(rows) * c.top_k);
  SelectExpertsArgs select;
  select.logits = device_logits.get();
  select.bias = c.bias ? device_bias.get() : nullptr;
  select.valid_rows = valid_rows.get();
  select.experts = experts.get();
  select.weights = weights.get();
  select.rows = rows;
  select.num_experts = c.experts;
  select.top_k = c.top_k;
  select.num_groups = c.groups;
  select.groups_per_token = c.kept;
  select.sigmoid = c.sigmoid;
  select.scaling = c.sigmoid ? 2.5f : 1.0f;
  CUDA_OK(LaunchSelectExperts(select, nullptr));
  const std::vector<int32_t> got = experts.Get();
  const std::vector<float> got_weights = weights.Get();
  int close_calls = 0;
  const int k = c.top_k;
  for (int r = 0; r < rows; ++r) {
    if (r >= valid) {
      for (int j = 0; j < k; ++j) EXPECT(got[r * k + j] == -1, "padding row %d chose", r);
      continue;
    }
    std::vector<int> ids;
    std::vector<double> want;
    double margin = 0;
    RouteReference(select, logits.data() + int64_t{r} * c.experts, c.bias ? bias.data() : nullptr, &ids,
                   &want, &margin);
    const bool clear = margin > 1e-6;  // fp32 scores decide like fp64 ones when nothing is closer
    close_calls += !clear;
    for (int j = 0; clear && j < k; ++j) {
      EXPECT(got[r * k + j] == ids[j], "row %d choice %d: %d, not %d", r, j, got[r * k + j], ids[j]);
      EXPECT(std::fabs(got_weights[r * k + j] - want[j]) < 1e-5, "row %d weight %d", r, j);
    }
  }
  EXPECT(close_calls * 20 <= rows + 19, "%d of %d rows are too close to call", close_calls, rows);

  Device<int32_t> offsets(all + 1), sorted(static_cast<size_t>(rows) * slots),
      tokens(static_cast<size_t>(rows) * slots);
  Device<float> sorted_weights(static_cast<size_t>(rows) * slots);
  SortSlotsArgs sort;
  sort.experts = experts.get();
  sort.weights = weights.get();
  sort.valid_rows = valid_rows.get();
  sort.offsets = offsets.get();
  sort.slots = sorted.get();
  sort.tokens = tokens.get();
  sort.slot_weights = sorted_weights.get();
  sort.rows = rows;
  sort.num_experts = c.experts;
  sort.top_k = c.top_k;
  sort.num_shared = c.shared;
  CUDA_OK(LaunchSortSlots(sort, nullptr));
  std::vector<std::vector<int>> want(all);
  for (int r = 0; r < valid; ++r) {
    for (int j = 0; j < k; ++j) want[got[r * k + j]].push_back(r * slots + j);
    for (int j = k; j < slots; ++j) want[c.experts + j - k].push_back(r * slots + j);
  }
  const std::vector<int32_t> got_offsets = offsets.Get(), got_slots = sorted.Get(), got_tokens = tokens.Get();
  const std::vector<float> got_slot_weights = sorted_weights.Get();
  int at = 0;
  for (int e = 0; e < all; ++e) {
    EXPECT(got_offsets[e] == at, "offset of expert %d: %d, not %d", e, got_offsets[e], at);
    for (const int slot : want[e]) {
      const int token = slot / slots, choice = slot % slots;
      const float weight = choice < k ? got_weights[token * k + choice] : 1;
      EXPECT(got_slots[at] == slot && got_tokens[at] == token && got_slot_weights[at] == weight,
             "expert %d place %d: slot %d, not %d", e, at, got_slots[at], slot);
      ++at;
    }
  }
  EXPECT(got_offsets[all] == at, "slots in all: %d, not %d", got_offsets[all], at);
  for (size_t i = at; i < got_slots.size(); ++i) EXPECT(got_slots[i] == -1, "slot %zu beyond the last", i);
}

void TestCombine(int rows, int valid, int slots, int hidden, bool norm) {
  const std::vector<Bf16> in = Normal(static_cast<size_t>(rows) * slots * hidden, 1, 14);
  const std::vector<float> x = NormalFloats(static_cast<size_t>(rows) * hidden, 0, 2, 15);
  const std::vector<float> weight = NormalFloats(hidden, 1, 0.2f, 16);
  Device<Bf16> device_in(in), normed(static_cast<size_t>(rows) * hidden);
  Device<float> residual(x), device_weight(weight);
  Device<int32_t> valid_rows(std::vector<int32_t>{valid});
  CombineArgs args;
  args.expert_out = device_in.get();
  args.valid_rows = valid_rows.get();
  args.residual = residual.get();
  args.norm_weight = norm ? device_weight.get() : nullptr;
  args.normed = normed.get();
  args.rows = rows;
  args.slots_per_token = slots;
  args.hidden = hidden;
  args.eps = 1e-6f;
  CUDA_OK(LaunchCombine(args, nullptr));
  const std::vector<float> got = residual.Get();
  const std::vector<Bf16> got_normed = normed.Get();
  Comparison sums, norms;
  for (int r = 0; r < valid; ++r) {
    std::vector<float> row(hidden);
    for (int i = 0; i < hidden; ++i) {
      double sum = x[int64_t{r} * hidden + i];
      double magnitude = std::fabs(sum);
      for (int j = 0; j < slots; ++j) {
        const double value = Value(in[(int64_t{r} * slots + j) * hidden + i]);
        sum += value;
        magnitude += std::fabs(value);
      }
      row[i] = static_cast<float>(sum);
      sums.Add(got[int64_t{r} * hidden + i], sum, magnitude * slots * 0x1p-23);
    }
    const double scale = InverseRms(row.data(), hidden, 1e-6);
    for (int i = 0; norm && i < hidden; ++i) {
      const double want = row[i] * scale * weight[i];
      norms.Add(Value(got_normed[int64_t{r} * hidden + i]), want, std::fabs(want) * kHalfUlp + 1e-4);
    }
  }
  EXPECT_CLOSE(sums, 1e-6, "combine");
  if (norm) EXPECT_CLOSE(norms, 1e-5, "norm after combine");
  for (int r = valid; r < rows; ++r) {
    EXPECT(got[int64_t{r} * hidden] == x[int64_t{r} * hidden] && IsPoison(got_normed[int64_t{r} * hidden]),
           "padding row %d was touched", r);
  }
}

void TestGemm(int rows, int n, int k, bool out_float, bool accumulate) {
  const std::vector<Bf16> weights = Normal(static_cast<size_t>(n) * k, 0.1f, 17),
                          x = Normal(static_cast<size_t>(rows) * k, 1, 18);
  const std::vector<float> start = NormalFloats(static_cast<size_t>(rows) * n, 0, 1, 19);
  Device<Bf16> device_weights(weights), device_x(x), narrow(static_cast<size_t>(rows) * n);
  Device<float> wide(start);
  std::unique_ptr<Gemm> gemm;
  const Result created = Gemm::Create(&gemm);
  EXPECT(created.ok(), "%s", created.message().c_str());
  if (!created.ok()) return;
  void* const out = out_float ? static_cast<void*>(wide.get()) : narrow.get();
  const Result ran =
      gemm->Run({device_weights.get(), device_x.get(), out, out_float, accumulate, rows, n, k}, nullptr);
  EXPECT(ran.ok(), "%s", ran.message().c_str());
  const std::vector<float> got_wide = wide.Get();
  const std::vector<Bf16> got_narrow = narrow.Get();
  Comparison comparison;
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < n; ++c) {
      double sum = accumulate ? start[int64_t{r} * n + c] : 0;
      double magnitude = std::fabs(sum);
      for (int i = 0; i < k; ++i) {
        const double product = Value(weights[int64_t{c} * k + i]) * Value(x[int64_t{r} * k + i]);
        sum += product;
        magnitude += std::fabs(product);
      }
      const double bound = magnitude * k * 0x1p-24 + (out_float ? 0 : std::fabs(sum) * kHalfUlp) + 1e-30;
      const double got =
          out_float ? double{got_wide[int64_t{r} * n + c]} : Value(got_narrow[int64_t{r} * n + c]);
      comparison.Add(got, sum, bound);
    }
  }
  EXPECT_CLOSE(comparison, 1e-5, "dense matrix product");
}

}  // namespace

void TestStepKernels() {
  for (const int hidden : {96, 128, 2048, 5376}) {
    TestNorm(1, hidden, false, false);
    TestNorm(33, hidden, true, false);
    TestNorm(17, hidden, false, true);
    TestEmbed(19, hidden);
    TestMtpInput(9, hidden);
  }
  for (const int width : {48, 160, 5120}) TestSwiglu(21, width);
  const HeadShape shapes[] = {{16, 4, 128, 32, true, false},
                              {4, 2, 32, 8, true, false},
                              {8, 1, 96, 48, false, true},
                              {32, 4, 128, 32, true, true},
                              {2, 2, 64, 32, false, false}};
  for (const HeadShape& shape : shapes) {
    for (const int rows : {1, 40}) TestQkRope(shape, rows);
  }
  const RouterCase cases[] = {{256, 8, 1, 8, 4, true, true}, {64, 6, 2, 0, 0, false, false},
                              {16, 4, 1, 4, 2, true, true},  {32, 4, 1, 4, 2, true, true},
                              {8, 1, 0, 0, 0, true, false},  {512, 16, 3, 32, 5, true, true}};
  for (const RouterCase& c : cases) {
    TestRouting(c, 1, 1);
    TestRouting(c, 8, 5);
    TestRouting(c, 64, 0);
    TestRouting(c, 700, 699);
  }
  for (const bool norm : {false, true}) {
    TestCombine(7, 5, 9, 2048, norm);
    TestCombine(3, 3, 4, 96, norm);
    TestCombine(70, 64, 8, 128, norm);
  }
  for (const int rows : {1, 2, 16, 64, 192}) {
    TestGemm(rows, 320, 96, false, false);
    TestGemm(rows, 96, 160, true, true);
    TestGemm(rows, 256, 2048, true, false);
  }
}

}  // namespace millrace::test
