// The launches for one to four rows: products against fp64; routing against fp64 (norm, logits) and, from its
// own logits on, exactly against the kernels for any number of rows.
#include "engine/backend/cuda/kernels/few_rows.h"

#include <cstring>

#include "engine/backend/cuda/kernels/quantize.h"
#include "tests/engine/cuda/hot/support.h"
#include "tests/engine/cuda/step/tests.h"

namespace millrace::test {
namespace {

using namespace millrace::engine::cuda;  // NOLINT: what is tested

std::vector<float> Floats(size_t count, float mean, float deviation, uint32_t seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(mean, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = normal(engine);
  return values;
}

void TestProduct(int n, int k, bool out_float, bool accumulate) {
  const std::vector<Bf16> weights = Normal(static_cast<size_t>(n) * k, 0.1f, 21),
                          x = Normal(size_t{2} * k, 1, 22);
  const std::vector<float> start = Floats(size_t{2} * n, 0, 1, 23);
  Device<Bf16> device_weights(weights), device_x(x);
  std::vector<double> both;
  for (const int rows : {2, 1}) {
    Device<float> wide(start);
    Device<Bf16> narrow(size_t{2} * n);
    void* const out = out_float ? static_cast<void*>(wide.get()) : narrow.get();
    CUDA_OK(LaunchFewRowsGemm({device_weights.get(), device_x.get(), out, out_float, accumulate, rows, n, k},
                              nullptr));
    const std::vector<float> got_wide = wide.Get();
    const std::vector<Bf16> got_narrow = narrow.Get();
    Comparison comparison;
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < n; ++c) {
        const size_t at = size_t(r) * n + c;
        const double got = out_float ? double{got_wide[at]} : Value(got_narrow[at]);
        if (rows == 2) {
          both.push_back(got);
        } else {
          EXPECT(got == both[at], "row %d of %d: its value depends on the others", r, rows);
        }
        double sum = accumulate ? start[at] : 0;
        double magnitude = std::fabs(sum);
        for (int i = 0; i < k; ++i) {
          const double product = Value(weights[size_t(c) * k + i]) * Value(x[size_t(r) * k + i]);
          sum += product;
          magnitude += std::fabs(product);
        }
        comparison.Add(got, sum, magnitude * k * 0x1p-24 + (out_float ? 0 : std::fabs(sum) / 256) + 1e-30);
      }
    }
    EXPECT_CLOSE(comparison, 1e-5, "product of few rows");
    for (size_t at = size_t(rows) * n; at < size_t{2} * n; ++at) {
      EXPECT(out_float ? got_wide[at] == start[at] : IsPoison(got_narrow[at]),
             "a row beyond the last was written");
    }
  }
}

struct Case {
  int hidden, experts, top_k, groups, kept;
  bool sigmoid, bias;
};

template <typename T>
bool SameBytes(const Device<T>& a, const Device<T>& b) {
  const std::vector<T> x = a.Get(), y = b.Get();
  return std::memcmp(x.data(), y.data(), x.size() * sizeof(T)) == 0;
}

void TestRoute(const Case& c, int rows, int valid) {
  const std::vector<float> residual = Floats(size_t(rows) * c.hidden, 0.1f, 2, 31 + rows);
  const std::vector<float> norm = Floats(c.hidden, 1, 0.3f, 32);
  const std::vector<Bf16> router = Normal(size_t(c.experts) * c.hidden, 1 / std::sqrt(float(c.hidden)), 33);
  Device<float> device_residual(residual), device_norm(norm), bias(Floats(c.experts, 0, 0.2f, 34));
  Device<Bf16> device_router(router), normed(size_t(rows) * c.hidden);
  Device<float> logits(size_t(rows) * c.experts), weights(size_t(rows) * c.top_k);
  Device<int32_t> blocks_done(std::vector<int32_t>{0}), valid_rows(std::vector<int32_t>{valid}),
      experts(size_t(rows) * c.top_k);
  FewRowsRouteArgs args;
  args.residual = device_residual.get();
  args.norm_weight = device_norm.get();
  args.router = device_router.get();
  args.normed = normed.get();
  args.logits = logits.get();
  args.blocks_done = blocks_done.get();
  args.hidden = c.hidden;
  args.eps = 1e-6f;
  args.select.logits = logits.get();
  args.select.bias = c.bias ? bias.get() : nullptr;
  args.select.valid_rows = valid_rows.get();
  args.select.experts = experts.get();
  args.select.weights = weights.get();
  args.select.rows = rows;
  args.select.num_experts = c.experts;
  args.select.top_k = c.top_k;
  args.select.num_groups = c.groups;
  args.select.groups_per_token = c.kept;
  args.select.sigmoid = c.sigmoid;
  args.select.scaling = 2.5f;
  for (int launch = 0; launch < 2; ++launch)
    CUDA_OK(LaunchFewRowsRoute(args, nullptr));  // the count is zero again
  EXPECT(blocks_done.Get()[0] == 0, "blocks are still counted");
  const std::vector<float> got_logits = logits.Get();
  const std::vector<Bf16> got_normed = normed.Get();
  Comparison norms, sums;
  for (int r = 0; r < rows; ++r) {
    double squares = 0;
    for (int i = 0; i < c.hidden; ++i)
      squares += double{residual[size_t(r) * c.hidden + i]} * residual[size_t(r) * c.hidden + i];
    const double scale = 1 / std::sqrt(squares / c.hidden + 1e-6);
    for (int i = 0; i < c.hidden; ++i) {
      const double y = residual[size_t(r) * c.hidden + i] * scale * norm[i];
      norms.Add(Value(got_normed[size_t(r) * c.hidden + i]), y, std::fabs(y) / 256 + 1e-6);
    }
    for (int e = 0; e < c.experts; ++e) {
      double sum = 0, magnitude = 0;
      for (int i = 0; i < c.hidden; ++i) {
        const double product =
            Value(got_normed[size_t(r) * c.hidden + i]) * Value(router[size_t(e) * c.hidden + i]);
        sum += product;
        magnitude += std::fabs(product);
      }
      sums.Add(got_logits[size_t(r) * c.experts + e], sum, magnitude * c.hidden * 0x1p-24 + 1e-30);
    }
  }
  EXPECT_CLOSE(norms, 1e-5, "norm of few rows");
  EXPECT_CLOSE(sums, 1e-6, "router logits of few rows");
  Device<int32_t> want_experts(size_t(rows) * c.top_k);
  Device<float> want_weights(size_t(rows) * c.top_k);
  args.select.experts = want_experts.get();
  args.select.weights = want_weights.get();
  CUDA_OK(LaunchSelectExperts(args.select, nullptr));
  EXPECT(SameBytes(experts, want_experts) && SameBytes(weights, want_weights),
         "%d experts, %d of %d rows: other choices than SelectExperts", c.experts, valid, rows);
}

struct ExpertCase {
  int hidden, width, experts, top_k, shared;
  bool e4m3;
};

std::vector<uint8_t> RandomBytes(size_t count, int k, bool e4m3, uint32_t seed) {
  std::vector<uint8_t> bytes(count * (e4m3 ? 1 : 2));
  if (e4m3) {
    std::mt19937 engine(seed);
    for (uint8_t& code : bytes) {
      code = static_cast<uint8_t>(engine());
      if ((code & 0x7f) == 0x7f) code = 0;  // no NaN
    }
  } else {
    const std::vector<Bf16> values = Normal(count, 1 / std::sqrt(float(k)), seed);
    std::memcpy(bytes.data(), values.data(), bytes.size());
  }
  return bytes;
}

// Both products, each on the same inputs as the grouped one.
void TestExperts(const ExpertCase& c, int tokens, int valid) {
  const int all = c.experts + c.shared, slots_per_token = c.top_k + c.shared,
            slots = tokens * slots_per_token;
  const size_t matrix = size_t(c.hidden) * c.width;
  Device<uint8_t> gate_up(RandomBytes(2 * matrix * all, c.hidden, c.e4m3, 41)),
      down(RandomBytes(matrix * all, c.width, c.e4m3, 42));
  const float scale_mean = 1 / (60 * std::sqrt(float(c.hidden)));
  Device<float> gate_up_scales(Floats(2 * matrix * all / 16384 + 1, scale_mean, scale_mean / 5, 43)),
      down_scales(Floats(matrix * all / 16384 + 1, scale_mean, scale_mean / 5, 44));
  std::mt19937 engine(45 + tokens);
  std::vector<int32_t> chosen, slot_numbers, slot_tokens, offsets = {0};
  std::vector<float> weights, slot_weights;
  for (int t = 0; t < tokens; ++t) {
    for (int j = 0; j < c.top_k; ++j) {
      chosen.push_back(t < valid ? static_cast<int32_t>((engine() % 2 + 2 * j) % c.experts) : -1);
      weights.push_back(0.1f * static_cast<float>(j + 1));
    }
  }
  for (int e = 0; e < all; ++e) {  // as SortSlots would
    for (int t = 0; t < valid; ++t) {
      for (int j = 0; j < slots_per_token; ++j) {
        if ((j < c.top_k ? chosen[t * c.top_k + j] : c.experts + j - c.top_k) != e) continue;
        slot_numbers.push_back(t * slots_per_token + j);
        slot_tokens.push_back(t);
        slot_weights.push_back(j < c.top_k ? weights[t * c.top_k + j] : 1.0f);
      }
    }
    offsets.push_back(static_cast<int32_t>(slot_numbers.size()));
  }
  Device<Bf16> x(Normal(size_t(tokens) * c.hidden, 1, 46)), act(size_t(slots) * c.width),
      out(size_t(slots) * c.hidden), want_act(size_t(slots) * c.width), want_out(size_t(slots) * c.hidden);
  Device<int32_t> experts(chosen), valid_rows(std::vector<int32_t>{valid}), device_offsets(offsets),
      device_slots(slot_numbers), device_tokens(slot_tokens);
  Device<float> expert_weights(weights), device_weights(slot_weights);
  Device<uint8_t> codes(size_t(slots) * std::max(c.hidden, c.width));
  Device<float> code_scales(size_t(slots) * std::max(c.hidden, c.width) / 128 + 1);
  const ExpertType type = c.e4m3 ? ExpertType::kE4m3 : ExpertType::kBf16;
  for (const bool is_down : {false, true}) {
    const int k = is_down ? c.width : c.hidden, rows = is_down ? c.hidden : 2 * c.width;
    GroupedGemmArgs grouped;
    grouped.matrix = is_down ? ExpertMatrix::kDown : ExpertMatrix::kGateUp;
    grouped.type = type;
    grouped.num_experts = all;
    grouped.rows = rows;
    grouped.k = k;
    grouped.num_slots_max = slots;
    grouped.weights = is_down ? down.get() : gate_up.get();
    grouped.weight_scales = is_down ? down_scales.get() : gate_up_scales.get();
    grouped.expert_offsets = device_offsets.get();
    const Bf16* const input = is_down ? want_act.get() : x.get();  // of down: rows by slot number
    grouped.x = input;
    grouped.x_stride = k;
    grouped.x_rows = is_down ? device_slots.get() : device_tokens.get();
    grouped.out = is_down ? want_out.get() : want_act.get();
    grouped.out_stride = is_down ? c.hidden : c.width;
    grouped.out_rows = device_slots.get();
    if (is_down) grouped.slot_scale = device_weights.get();
    if (c.e4m3) {
      CUDA_OK(LaunchQuantizeRows({is_down ? slots : tokens, k, input, k, codes.get(), code_scales.get()},
                                 nullptr));
      grouped.x = codes.get();
      grouped.x_scales = code_scales.get();
      grouped.x_scales_stride = k / 128;
    }
    CUDA_OK(LaunchGroupedGemmDecode(grouped, nullptr));
    CUDA_OK(cudaDeviceSynchronize());  // down reads its experts before the launch before it has ended
    FewRowsExpertsArgs args;
    args.matrix = grouped.matrix;
    args.type = type;
    args.tokens = tokens;
    args.top_k = c.top_k;
    args.num_experts = c.experts;
    args.num_shared = c.shared;
    args.rows = rows;
    args.k = k;
    args.weights = grouped.weights;
    args.weight_scales = grouped.weight_scales;
    args.experts = experts.get();
    args.expert_weights = expert_weights.get();
    args.valid_rows = valid_rows.get();
    args.x = input;
    args.out = is_down ? out.get() : act.get();
    CUDA_OK(LaunchFewRowsExperts(args, nullptr));
    const std::vector<Bf16> got = (is_down ? out : act).Get(), want = (is_down ? want_out : want_act).Get();
    double largest = 0;
    for (const Bf16 value : want)
      largest = IsPoison(value) ? largest : std::max(largest, std::fabs(Value(value)));
    Comparison comparison;
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT(IsPoison(got[i]) == IsPoison(want[i]), "value %zu: written by one only", i);
      if (!IsPoison(want[i]))
        comparison.Add(Value(got[i]), Value(want[i]), std::fabs(Value(want[i])) / 128 + largest * 1e-4);
    }
    EXPECT_CLOSE(comparison, 1e-5, is_down ? "down of few rows" : "gate and up of few rows");
  }
}

}  // namespace

void TestFewRows() {
  TestProduct(320, 96, false, false);
  TestProduct(96, 160, true, true);
  TestProduct(72, 2048, true, false);
  TestProduct(9, 5128, false, false);
  const Case cases[] = {{2048, 256, 8, 8, 4, true, true}, {128, 64, 6, 0, 0, false, false},
                        {2056, 16, 4, 4, 2, true, true},  {128, 32, 4, 4, 2, true, true},
                        {96, 8, 1, 0, 0, true, false},    {4096, 512, 16, 32, 5, true, true}};
  for (const Case& c : cases) {
    for (const int rows : {1, 2}) {
      TestRoute(c, rows, rows);
      TestRoute(c, rows, rows - 1);
    }
  }
  const ExpertCase experts[] = {{2048, 512, 24, 8, 1, false}, {128, 48, 32, 4, 1, false},
                                {4096, 1024, 9, 4, 2, false}, {2048, 512, 24, 8, 1, true},
                                {128, 128, 32, 4, 1, true},   {4096, 1024, 9, 4, 0, true}};
  for (const ExpertCase& c : experts) {
    TestExperts(c, 1, 1);
    TestExperts(c, 2, 1);
    TestExperts(c, 2, 2);
  }
}

}  // namespace millrace::test
