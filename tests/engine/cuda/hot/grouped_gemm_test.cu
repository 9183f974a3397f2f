// Grouped GEMM against fp64: ragged experts, odd shapes, poison in everything that must not be read, and the
// promise that a row does not depend on its batch.

#include <cuda_fp8.h>

#include <algorithm>
#include <numeric>
#include <string>

#include "engine/backend/cuda/kernels/grouped_gemm.h"
#include "engine/backend/cuda/kernels/quantize.h"
#include "tests/engine/cuda/hot/support.h"
#include "tests/engine/cuda/hot/tests.h"

namespace millrace::test {
namespace {

using engine::cuda::ExpertMatrix;
using engine::cuda::ExpertType;
using engine::cuda::GroupedGemmArgs;
using engine::cuda::LaunchGroupedGemmDecode;
using engine::cuda::LaunchGroupedGemmPrefill;

using Launcher = cudaError_t (*)(const GroupedGemmArgs&, cudaStream_t);

struct Case {
  ExpertType type;
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
  // kE4m3: what the kernels get instead; `weights` and `x` are then empty.
  std::vector<uint8_t> weights8, x8;
  std::vector<float> weight_scales, x_scales;

  double Weight(const Case& c, size_t expert, int row, int i) const {
    const size_t at = (expert * c.rows + row) * c.k + i;
    if (c.type == ExpertType::kBf16) return Value(weights[at]);
    const bool gate_up = c.matrix == ExpertMatrix::kGateUp;
    const size_t k_blocks = c.k / 128, row_blocks = c.rows / 128;
    const size_t block = gate_up ? row % 2 * (row_blocks / 2) + row / 2 / 128 : row / 128;
    return E4m3(weights8[at]) * double(weight_scales[(expert * row_blocks + block) * k_blocks + i / 128]);
  }
  double X(const Case& c, int row, int i) const {
    const size_t at = size_t(row) * c.k + i;
    return c.type == ExpertType::kBf16 ? Value(x[at]) : E4m3(x8[at]) * double(x_scales[at / 128]);
  }
  static double E4m3(uint8_t bits) {
    __nv_fp8_e4m3 value;
    value.__x = bits;
    return double(float(value));
  }
};

// e4m3 and scales for the same problem. Weight bytes are drawn at once; x goes through the quantisation
// kernel.
void Quantize(const Case& c, Problem* p, uint32_t seed) {
  std::mt19937 engine(seed);
  p->weights8.resize(p->weights.size());
  for (size_t i = 0; i < p->weights8.size(); ++i) {
    p->weights8[i] = __nv_fp8_e4m3(float(Value(p->weights[i])) * 60.0f).__x;  // NaN stays NaN
  }
  std::uniform_real_distribution<float> uniform(0.5f, 2.0f);
  p->weight_scales.resize(p->weights.size() / 128 / 128);
  for (float& scale : p->weight_scales) scale = uniform(engine) / 60.0f;
  Device<Bf16> x(p->x);
  Device<uint8_t> q(p->x.size());
  Device<float> scales(p->x.size() / 128);
  engine::cuda::QuantizeRowsArgs args;
  args.num_rows = p->num_rows;
  args.k = c.k;
  args.x = x.get();
  args.x_stride = c.k;
  args.q = q.get();
  args.scales = scales.get();
  CUDA_OK(engine::cuda::LaunchQuantizeRows(args, nullptr));
  p->x8 = q.Get();
  p->x_scales = scales.Get();
  size_t wrong = 0;
  for (size_t block = 0; block < p->x_scales.size(); ++block) {
    float largest = 0;
    for (int i = 0; i < 128; ++i) largest = std::max(largest, std::fabs(float(Value(p->x[block * 128 + i]))));
    if (std::isnan(float(Value(p->x[block * 128])))) {  // nobody's row
      std::fill_n(p->x8.begin() + block * 128, 128, uint8_t{0x7f});
      p->x_scales[block] = NAN;
      continue;
    }
    const float scale = largest > 0 ? largest / 448.0f : 1.0f;
    wrong += p->x_scales[block] != scale;
    for (int i = 0; i < 128; ++i) {
      wrong += p->x8[block * 128 + i] != __nv_fp8_e4m3(float(Value(p->x[block * 128 + i])) / scale).__x;
    }
  }
  EXPECT(wrong == 0, "quantize: %zu of %zu codes or scales differ from the CPU's", wrong, p->x8.size());
  p->weights.clear();
  p->x.clear();
}

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
  if (c.type == ExpertType::kE4m3) Quantize(c, &p, seed + 3);
  return p;
}

std::vector<Bf16> Run(Launcher launch, const Case& c, const Problem& p, int hint) {
  Device<Bf16> weights(p.weights), x(p.x), out(size_t(p.num_rows) * p.num_outputs);
  Device<int32_t> offsets(p.offsets), x_rows(p.x_rows), out_rows(p.out_rows);
  Device<float> scale(p.scale), weight_scales(p.weight_scales), x_scales(p.x_scales);
  Device<uint8_t> weights8(p.weights8), x8(p.x8);
  GroupedGemmArgs args;
  args.matrix = c.matrix;
  args.num_experts = int(c.counts.size());
  args.rows = c.rows;
  args.k = c.k;
  args.num_slots_max = hint;
  args.type = c.type;
  args.weights = c.type == ExpertType::kBf16 ? static_cast<const void*>(weights.get()) : weights8.get();
  args.weight_scales = weight_scales.get();
  args.x_scales = x_scales.get();
  args.x_scales_stride = c.k / 128;
  args.expert_offsets = offsets.get();
  args.x = c.type == ExpertType::kBf16 ? static_cast<const void*>(x.get()) : x8.get();
  args.x_stride = c.k;
  args.x_rows = x_rows.get();
  args.out = out.get();
  args.out_stride = p.num_outputs;
  args.out_rows = out_rows.get();
  args.slot_scale = c.matrix == ExpertMatrix::kDown ? scale.get() : nullptr;
  CUDA_OK(launch(args, nullptr));
  return out.Get();
}

// Row `row` of expert `expert` times input row `x_row`; `magnitude` = the sum of the products' magnitudes.
double Dot(const Case& c, const Problem& p, size_t expert, int row, int x_row, double* magnitude) {
  double sum = 0;
  *magnitude = 0;
  for (int i = 0; i < c.k; ++i) {
    const double product = p.Weight(c, expert, row, i) * p.X(c, x_row, i);
    sum += product;
    *magnitude += std::fabs(product);
  }
  return sum;
}

// Every `step`-th output of every slot against fp64; rows of nobody stay untouched.
void Compare(const Case& c, const Problem& p, const std::vector<Bf16>& out, const std::string& name) {
  const double macs = double(p.offsets.back()) * c.rows * c.k;
  const int step = std::max(1, int(macs / (c.type == ExpertType::kBf16 ? 1e8 : 2e7))) | 1;
  // Hopper's e4m3 sums keep about 14 bits within a block of 128 k.
  const double eps = c.type == ExpertType::kBf16 ? c.k * std::ldexp(1.0, -24) : std::ldexp(1.0, -12);
  Comparison comparison;
  for (size_t e = 0; e < c.counts.size(); ++e) {
    for (int slot = p.offsets[e]; slot < p.offsets[e + 1]; ++slot) {
      const Bf16* y = out.data() + size_t(p.out_rows[slot]) * p.num_outputs;
      for (int i = slot % step; i < p.num_outputs; i += step) {
        double magnitude, other;
        if (c.matrix == ExpertMatrix::kDown) {
          const double reference = Dot(c, p, e, i, p.x_rows[slot], &magnitude) * p.scale[slot];
          comparison.Add(Value(y[i]), reference,
                         std::fabs(reference) / 256 + 2 * eps * magnitude * p.scale[slot] + 1e-6);
        } else {
          const double gate = Dot(c, p, e, 2 * i, p.x_rows[slot], &magnitude);
          const double up = Dot(c, p, e, 2 * i + 1, p.x_rows[slot], &other);
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
  const ExpertType bf16 = ExpertType::kBf16;
  const ExpertType e4m3 = ExpertType::kE4m3;
  const std::vector<Case> cases = {
      {bf16, ExpertMatrix::kGateUp, 128, 128, {0, 1, 7, 8, 9, 0, 33}},
      {bf16, ExpertMatrix::kDown, 128, 64, {1, 0, 2, 15, 16, 17, 0}},
      {bf16, ExpertMatrix::kGateUp, 192, 128, {3, 31, 32, 33}},
      {bf16, ExpertMatrix::kDown, 128, 96, {5, 64, 65, 0, 127}},
      {bf16, ExpertMatrix::kGateUp, 160, 272, {40, 0, 1}},
      {bf16, ExpertMatrix::kDown, 272, 80, {129, 2}},
      {bf16, ExpertMatrix::kGateUp, 1024, 2048, {1, 33, 0, 65, 129, 96}},
      {bf16, ExpertMatrix::kDown, 2048, 512, {200, 1, 0, 64, 31}},
      {bf16, ExpertMatrix::kGateUp, 2048, 4096, {2, 20, 70}},
      {bf16, ExpertMatrix::kDown, 4096, 1024, {10, 0, 100}},
      {bf16, ExpertMatrix::kDown, 128, 64, {0, 0}},
      {e4m3, ExpertMatrix::kGateUp, 256, 128, {0, 1, 7, 8, 9, 0, 33}},
      {e4m3, ExpertMatrix::kDown, 128, 128, {97, 0, 2, 15, 16, 17, 0}},
      {e4m3, ExpertMatrix::kDown, 384, 640, {5, 64, 65, 0, 127}},
      {e4m3, ExpertMatrix::kGateUp, 768, 384, {40, 0, 95, 96}},
      {e4m3, ExpertMatrix::kGateUp, 1024, 2048, {1, 33, 0, 65, 129, 96}},
      {e4m3, ExpertMatrix::kDown, 2048, 512, {200, 1, 0, 64, 31}},
      {e4m3, ExpertMatrix::kGateUp, 2048, 4096, {2, 20, 70}},
  };
  uint32_t seed = 100;
  for (const Case& c : cases) {
    seed += 10;
    const Problem p = MakeProblem(c, seed);
    const std::string shape = std::string(c.type == e4m3 ? "e4m3 " : "bf16 ") +
                              std::string(c.matrix == ExpertMatrix::kDown ? "down" : "gate_up") + " rows " +
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
