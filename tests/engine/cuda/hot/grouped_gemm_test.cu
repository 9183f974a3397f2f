// Grouped GEMM against fp64: ragged experts, odd shapes, poison in everything that must not be read, and the
// promise that a row does not depend on its batch.

#include <algorithm>
#include <numeric>
#include <string>

#include "engine/backend/cuda/kernels/grouped_gemm.h"
#include "tests/engine/cuda/hot/support.h"
#include "tests/engine/cuda/hot/tests.h"

namespace millrace::test {
namespace {

using engine::cuda::ExpertMatrix;
using engine::cuda::GroupedGemmArgs;
using engine::cuda::LaunchGroupedGemmDecode;
using engine::cuda::LaunchGroupedGemmPrefill;

using Launcher = cudaError_t (*)(const GroupedGemmArgs&, cudaStream_t);

struct Case {
  ExpertMatrix matrix;
  int rows;
  int k;
  std::vector<int> counts;  // slots per expert
};

// One routed problem: every slot reads a row of its own choice and writes to a row of its own.
struct Problem {
  int num_outputs;
  int num_rows;  // of x and of out; more than slots: the rest is poison
  std::vector<int32_t> offsets, x_rows, out_rows;
  std::vector<float> scale;
  std::vector<Bf16> weights, x;
};

Problem MakeProblem(const Case& c, uint32_t seed) {
  Problem p;
  p.num_outputs = c.matrix == ExpertMatrix::kGateUp ? c.rows / 2 : c.rows;
  p.offsets.push_back(0);
  for (int count : c.counts) p.offsets.push_back(p.offsets.back() + count);
  const int slots = p.offsets.back();
  p.num_rows = slots + 5;
  std::mt19937 engine(seed);
  p.x_rows.resize(p.num_rows);
  std::iota(p.x_rows.begin(), p.x_rows.end(), 0);
  std::shuffle(p.x_rows.begin(), p.x_rows.end(), engine);
  p.out_rows = p.x_rows;
  std::shuffle(p.out_rows.begin(), p.out_rows.end(), engine);
  p.x_rows.resize(slots);
  p.out_rows.resize(slots);
  std::uniform_real_distribution<float> uniform(0.01f, 1.5f);
  for (int i = 0; i < slots; ++i) p.scale.push_back(uniform(engine));
  p.weights = Normal(c.counts.size() * size_t(c.rows) * c.k, 1.0f / std::sqrt(float(c.k)), seed + 1);
  p.x = Normal(size_t(p.num_rows) * c.k, 1.0f, seed + 2);
  const Bf16 nan = __float2bfloat16(NAN);
  for (size_t e = 0; e < c.counts.size(); ++e) {  // nobody's expert
    if (c.counts[e] == 0) std::fill_n(p.weights.begin() + e * c.rows * c.k, size_t(c.rows) * c.k, nan);
  }
  std::vector<bool> used(p.num_rows);
  for (int row : p.x_rows) used[row] = true;
  for (int row = 0; row < p.num_rows; ++row) {  // nobody's token
    if (!used[row]) std::fill_n(p.x.begin() + size_t(row) * c.k, c.k, nan);
  }
  return p;
}

std::vector<Bf16> Run(Launcher launch, const Case& c, const Problem& p, int hint) {
  Device<Bf16> weights(p.weights), x(p.x), out(size_t(p.num_rows) * p.num_outputs);
  Device<int32_t> offsets(p.offsets), x_rows(p.x_rows), out_rows(p.out_rows);
  Device<float> scale(p.scale);
  GroupedGemmArgs args;
  args.matrix = c.matrix;
  args.num_experts = int(c.counts.size());
  args.rows = c.rows;
  args.k = c.k;
  args.num_slots_max = hint;
  args.weights = weights.get();
  args.expert_offsets = offsets.get();
  args.x = x.get();
  args.x_stride = c.k;
  args.x_rows = x_rows.get();
  args.out = out.get();
  args.out_stride = p.num_outputs;
  args.out_rows = out_rows.get();
  args.slot_scale = c.matrix == ExpertMatrix::kDown ? scale.get() : nullptr;
  CUDA_OK(launch(args, nullptr));
  return out.Get();
}

double Dot(const Bf16* a, const Bf16* b, int k, double* magnitude) {
  double sum = 0;
  *magnitude = 0;
  for (int i = 0; i < k; ++i) {
    const double product = Value(a[i]) * Value(b[i]);
    sum += product;
    *magnitude += std::fabs(product);
  }
  return sum;
}

// Every `step`-th output of every slot against fp64; rows of nobody stay untouched.
void Compare(const Case& c, const Problem& p, const std::vector<Bf16>& out, const std::string& name) {
  const double macs = double(p.offsets.back()) * c.rows * c.k;
  const int step = std::max(1, int(macs / 1e8)) | 1;
  const double eps = c.k * std::ldexp(1.0, -24);
  Comparison comparison;
  for (size_t e = 0; e < c.counts.size(); ++e) {
    const Bf16* w = p.weights.data() + e * c.rows * c.k;
    for (int slot = p.offsets[e]; slot < p.offsets[e + 1]; ++slot) {
      const Bf16* x = p.x.data() + size_t(p.x_rows[slot]) * c.k;
      const Bf16* y = out.data() + size_t(p.out_rows[slot]) * p.num_outputs;
      for (int i = slot % step; i < p.num_outputs; i += step) {
        double magnitude, other;
        if (c.matrix == ExpertMatrix::kDown) {
          const double reference = Dot(w + size_t(i) * c.k, x, c.k, &magnitude) * p.scale[slot];
          comparison.Add(Value(y[i]), reference,
                         std::fabs(reference) / 256 + 2 * eps * magnitude * p.scale[slot] + 1e-6);
        } else {
          const double gate = Dot(w + size_t(2 * i) * c.k, x, c.k, &magnitude);
          const double up = Dot(w + size_t(2 * i + 1) * c.k, x, c.k, &other);
          const double reference = gate / (1 + std::exp(-gate)) * up;
          comparison.Add(Value(y[i]), reference,
                         std::fabs(reference) / 200 +
                             4 * eps * (magnitude * (std::fabs(up) + 1) + other * (std::fabs(gate) + 1)) +
                             1e-6);
        }
      }
    }
  }
  if (comparison.count > 0) EXPECT_CLOSE(comparison, 1e-5, name.c_str());
  std::vector<bool> used(p.num_rows);
  for (int row : p.out_rows) used[row] = true;
  for (int row = 0; row < p.num_rows; ++row) {
    if (used[row]) continue;
    EXPECT(IsPoison(out[size_t(row) * p.num_outputs]) && IsPoison(out[size_t(row + 1) * p.num_outputs - 1]),
           "%s: wrote to row %d, which is nobody's", name.c_str(), row);
  }
}

// The same slots with some of them taken away: what remains must not change by a bit.
void CompareThinned(Launcher launch, const Case& c, const Problem& p, const std::vector<Bf16>& out,
                    const std::string& name) {
  Case thin = c;
  Problem q = p;
  q.offsets = {0};
  q.x_rows.clear();
  q.out_rows.clear();
  q.scale.clear();
  for (size_t e = 0; e < c.counts.size(); ++e) {
    for (int slot = p.offsets[e]; slot < p.offsets[e + 1]; ++slot) {
      if (slot % 3 == 1) continue;
      q.x_rows.push_back(p.x_rows[slot]);
      q.out_rows.push_back(p.out_rows[slot]);
      q.scale.push_back(p.scale[slot]);
    }
    thin.counts[e] = int(q.x_rows.size()) - q.offsets.back();
    q.offsets.push_back(int(q.x_rows.size()));
  }
  if (q.x_rows.empty()) return;
  const std::vector<Bf16> thinned = Run(launch, thin, q, 1 << 20);
  size_t different = 0;
  for (int row : q.out_rows) {
    for (int i = 0; i < p.num_outputs; ++i) {
      const size_t at = size_t(row) * p.num_outputs + i;
      different += !SameBits(thinned[at], out[at]);
    }
  }
  EXPECT(different == 0, "%s: %zu values changed with the batch", name.c_str(), different);
}

}  // namespace

void TestGroupedGemm() {
  const std::vector<Case> cases = {
      {ExpertMatrix::kGateUp, 128, 128, {0, 1, 7, 8, 9, 0, 33}},
      {ExpertMatrix::kDown, 128, 64, {1, 0, 2, 15, 16, 17, 0}},
      {ExpertMatrix::kGateUp, 192, 128, {3, 31, 32, 33}},
      {ExpertMatrix::kDown, 128, 96, {5, 64, 65, 0, 127}},
      {ExpertMatrix::kGateUp, 160, 272, {40, 0, 1}},
      {ExpertMatrix::kDown, 272, 80, {129, 2}},
      {ExpertMatrix::kGateUp, 1024, 2048, {1, 33, 0, 65, 129, 96}},
      {ExpertMatrix::kDown, 2048, 512, {200, 1, 0, 64, 31}},
      {ExpertMatrix::kGateUp, 2048, 4096, {2, 20, 70}},
      {ExpertMatrix::kDown, 4096, 1024, {10, 0, 100}},
      {ExpertMatrix::kDown, 128, 64, {0, 0}},
  };
  uint32_t seed = 100;
  for (const Case& c : cases) {
    seed += 10;
    const Problem p = MakeProblem(c, seed);
    const std::string shape = std::string(c.matrix == ExpertMatrix::kDown ? "down" : "gate_up") + " rows " +
                              std::to_string(c.rows) + " k " + std::to_string(c.k) + " slots " +
                              std::to_string(p.offsets.back()) + " seed " + std::to_string(seed);
    const std::vector<Bf16> decode = Run(LaunchGroupedGemmDecode, c, p, 1 << 20);
    Compare(c, p, decode, "decode " + shape);
    CompareThinned(LaunchGroupedGemmDecode, c, p, decode, "decode " + shape);
    const std::vector<Bf16> narrow = Run(LaunchGroupedGemmDecode, c, p, 1);
    EXPECT(std::equal(decode.begin(), decode.end(), narrow.begin(), SameBits),
           "decode %s: tiles of 32 rows differ", shape.c_str());
    const std::vector<Bf16> prefill = Run(LaunchGroupedGemmPrefill, c, p, 1 << 20);
    Compare(c, p, prefill, "prefill " + shape);
    CompareThinned(LaunchGroupedGemmPrefill, c, p, prefill, "prefill " + shape);
    size_t different = 0;
    for (size_t i = 0; i < decode.size(); ++i) different += !SameBits(decode[i], prefill[i]);
    std::printf("  %s: decode and prefill differ in %zu of %zu values\n", shape.c_str(), different,
                decode.size());
  }
}

}  // namespace millrace::test
