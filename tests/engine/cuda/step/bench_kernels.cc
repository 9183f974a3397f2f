// Times of the kernels around attention and experts, and of the dense matrix products, for the Ling-mini-2.0
// shape.
#include <algorithm>
#include <functional>

#include "engine/backend/cuda/gemm.h"
#include "engine/backend/cuda/kernels/combine.h"
#include "engine/backend/cuda/kernels/norm.h"
#include "engine/backend/cuda/kernels/qk_rope.h"
#include "engine/backend/cuda/kernels/router.h"
#include "tests/engine/cuda/hot/support.h"
#include "tests/engine/cuda/step/bench.h"

namespace millrace::test {
namespace {

using namespace millrace::engine::cuda;  // NOLINT: what is timed

// Median time of one call, in microseconds, launch gaps hidden in a graph of `repeat` calls with other
// arguments each.
double Time(const std::function<void(int, cudaStream_t)>& launch, int repeat = 16) {
  cudaStream_t stream;
  CUDA_OK(cudaStreamCreate(&stream));
  for (int i = 0; i < repeat; ++i) launch(i, stream);
  CUDA_OK(cudaStreamSynchronize(stream));
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < repeat; ++i) launch(i, stream);
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CUDA_OK(cudaStreamEndCapture(stream, &graph));
  CUDA_OK(cudaGraphInstantiate(&exec, graph, 0));
  const double seconds = MedianSeconds(stream, [&] { CUDA_OK(cudaGraphLaunch(exec, stream)); });
  CUDA_OK(cudaGraphExecDestroy(exec));
  CUDA_OK(cudaGraphDestroy(graph));
  CUDA_OK(cudaStreamDestroy(stream));
  return seconds / repeat * 1e6;
}

// Copies of the arrays of one call, so that calls in a row do not find them in the L2 cache (50 MB) when they
// are large.
int CopiesFor(double bytes) { return static_cast<int>(std::clamp(200e6 / bytes, 1.0, 8.0)); }

struct Arrays {
  std::vector<std::unique_ptr<Device<Bf16>>> narrow;
  std::vector<std::unique_ptr<Device<float>>> wide;
};

Bf16* NewBf16(Arrays& arrays, size_t count) {
  arrays.narrow.push_back(std::make_unique<Device<Bf16>>(count));
  FillRandom(arrays.narrow.back()->get(), count, arrays.narrow.size());
  return arrays.narrow.back()->get();
}
float* NewFloat(Arrays& arrays, size_t count) {
  arrays.wide.push_back(std::make_unique<Device<float>>(count));
  FillRandom(arrays.wide.back()->get(), count, arrays.wide.size());
  return arrays.wide.back()->get();
}

constexpr int kHidden = 2048, kExperts = 256, kTopK = 8, kSlots = 9, kQkv = 3072;

void BenchNorm(Report& report, int rows) {
  const double bytes = rows * kHidden * 6.0;
  Arrays arrays;
  std::vector<RmsNormArgs> calls(CopiesFor(bytes));
  for (RmsNormArgs& call : calls) {
    call.residual = NewFloat(arrays, static_cast<size_t>(rows) * kHidden);
    call.weight = NewFloat(arrays, kHidden);
    call.out = NewBf16(arrays, static_cast<size_t>(rows) * kHidden);
    call.rows = rows;
    call.hidden = kHidden;
    call.eps = 1e-6f;
  }
  report.Kernel("rms_norm", rows, bytes, 0,
                Time([&](int i, cudaStream_t s) { CUDA_OK(LaunchRmsNorm(calls[i % calls.size()], s)); }));
}

void BenchQkRope(Report& report, int rows) {
  const double bytes = rows * kQkv * 4.0;
  Arrays arrays;
  const int pages = (rows + 63) / 64;
  std::vector<int32_t> positions(rows), slots(rows);
  for (int r = 0; r < rows; ++r) positions[r] = r % 4096, slots[r] = r;
  Device<int32_t> device_positions(positions), device_slots(slots);
  float* const rope = NewFloat(arrays, 4096 * 64);
  float* const norm = NewFloat(arrays, 128);
  std::vector<QkRopeArgs> calls(CopiesFor(bytes));
  for (QkRopeArgs& call : calls) {
    call.qkv = NewBf16(arrays, static_cast<size_t>(rows) * kQkv);
    call.query_norm = call.key_norm = norm;
    call.rope = rope;
    call.positions = device_positions.get();
    call.kv_slots = device_slots.get();
    call.query = NewBf16(arrays, static_cast<size_t>(rows) * kHidden);
    call.kv_layer = NewBf16(arrays, static_cast<size_t>(pages) * 64 * 1024);
    call.rows = rows;
    call.heads = 16;
    call.kv_heads = 4;
    call.head_dim = 128;
    call.pairs = 32;
    call.eps = 1e-6f;
  }
  report.Kernel("qk_rope", rows, bytes, 0,
                Time([&](int i, cudaStream_t s) { CUDA_OK(LaunchQkRope(calls[i % calls.size()], s)); }));
}

void BenchRouting(Report& report, int rows) {
  Arrays arrays;
  Device<int32_t> valid(std::vector<int32_t>{rows}), experts(static_cast<size_t>(rows) * kSlots),
      offsets(kExperts + 2), slots(static_cast<size_t>(rows) * kSlots),
      tokens(static_cast<size_t>(rows) * kSlots);
  SelectExpertsArgs select;
  select.logits = NewFloat(arrays, static_cast<size_t>(rows) * kExperts);
  select.bias = NewFloat(arrays, kExperts);
  select.valid_rows = valid.get();
  select.experts = experts.get();
  select.weights = NewFloat(arrays, static_cast<size_t>(rows) * kSlots);
  select.rows = rows;
  select.num_experts = kExperts;
  select.top_k = kTopK;
  select.num_groups = 8;
  select.groups_per_token = 4;
  select.sigmoid = true;
  report.Kernel("select_experts", rows, rows * (kExperts * 4.0 + kSlots * 8.0), 0,
                Time([&](int, cudaStream_t s) { CUDA_OK(LaunchSelectExperts(select, s)); }));
  SortSlotsArgs sort;
  sort.experts = experts.get();
  sort.weights = select.weights;
  sort.valid_rows = valid.get();
  sort.offsets = offsets.get();
  sort.slots = slots.get();
  sort.tokens = tokens.get();
  sort.slot_weights = NewFloat(arrays, static_cast<size_t>(rows) * kSlots);
  sort.rows = rows;
  sort.num_experts = kExperts;
  sort.top_k = kTopK;
  sort.num_shared = 1;
  report.Kernel("sort_slots", rows, rows * kSlots * 20.0, 0,
                Time([&](int, cudaStream_t s) { CUDA_OK(LaunchSortSlots(sort, s)); }));
}

void BenchCombine(Report& report, int rows) {
  const double bytes = rows * kHidden * (2.0 * kSlots + 8 + 2);
  Arrays arrays;
  Device<int32_t> valid(std::vector<int32_t>{rows});
  std::vector<CombineArgs> calls(CopiesFor(bytes));
  for (CombineArgs& call : calls) {
    call.expert_out = NewBf16(arrays, static_cast<size_t>(rows) * kSlots * kHidden);
    call.valid_rows = valid.get();
    call.residual = NewFloat(arrays, static_cast<size_t>(rows) * kHidden);
    call.norm_weight = NewFloat(arrays, kHidden);
    call.normed = NewBf16(arrays, static_cast<size_t>(rows) * kHidden);
    call.rows = rows;
    call.slots_per_token = kSlots;
    call.hidden = kHidden;
    call.eps = 1e-6f;
  }
  report.Kernel("combine", rows, bytes, 0,
                Time([&](int i, cudaStream_t s) { CUDA_OK(LaunchCombine(calls[i % calls.size()], s)); }));
}

void BenchGemm(Report& report, Gemm& gemm, const char* name, int rows, int n, int k, bool wide,
               bool accumulate) {
  const double bytes = 2.0 * n * k + 2.0 * rows * k + (wide ? 4.0 : 2.0) * rows * n * (accumulate ? 2 : 1);
  Arrays arrays;
  std::vector<GemmArgs> calls(CopiesFor(bytes));
  for (GemmArgs& call : calls) {
    call.weights = NewBf16(arrays, static_cast<size_t>(n) * k);
    call.x = NewBf16(arrays, static_cast<size_t>(rows) * k);
    call.out = wide ? static_cast<void*>(NewFloat(arrays, static_cast<size_t>(rows) * n))
                    : NewBf16(arrays, static_cast<size_t>(rows) * n);
    call.out_float = wide;
    call.accumulate = accumulate;
    call.rows = rows;
    call.n = n;
    call.k = k;
  }
  report.Kernel(name, rows, bytes, 2.0 * rows * n * k, Time([&](int i, cudaStream_t s) {
                  const Result result = gemm.Run(calls[i % calls.size()], s);
                  EXPECT(result.ok(), "%s", result.message().c_str());
                }));
}

}  // namespace

void BenchKernels(Report& report) {
  std::unique_ptr<Gemm> gemm;
  const Result created = Gemm::Create(&gemm);
  EXPECT(created.ok(), "%s", created.message().c_str());
  for (const int rows : {1, 32, 256, 2048, 8192}) {
    BenchNorm(report, rows);
    BenchQkRope(report, rows);
    BenchRouting(report, rows);
    BenchCombine(report, rows);
    BenchGemm(report, *gemm, "gemm qkv", rows, kQkv, kHidden, false, false);
    BenchGemm(report, *gemm, "gemm attention out", rows, kHidden, kHidden, true, true);
    BenchGemm(report, *gemm, "gemm router", rows, kExperts, kHidden, true, false);
    if (rows <= 256) BenchGemm(report, *gemm, "gemm lm_head", rows, 157184, kHidden, true, false);
  }
}

}  // namespace millrace::test
