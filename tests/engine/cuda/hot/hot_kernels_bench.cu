// Times the attention and grouped GEMM kernels against ceilings measured in the same run (device copy,
// cuBLASLt bf16): median of several graph replays, with the spread; every replay runs through input sets that
// together exceed L2 many times. Prints a table and writes JSON to the path given.

#include <cublasLt.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <string>

#include "engine/backend/cuda/kernels/decode_attention.h"
#include "engine/backend/cuda/kernels/grouped_gemm.h"
#include "engine/backend/cuda/kernels/prefill_attention.h"
#include "tests/engine/cuda/hot/support.h"

namespace millrace::test {
namespace {

using namespace engine::cuda;  // NOLINT: the kernels under test

struct Result {
  std::string name;
  double us;  // median per launch
  double us_min, us_max;
  double bytes, flops;  // per launch
  double fraction;      // of the ceiling that binds
  const char* bound;
};

struct Ceilings {
  double bytes_per_s = 0;  // the better of copy and read
  double flops_per_s = 0;
};

std::vector<Result> results;
Ceilings ceilings;

// Seconds per launch of `launch(i)`, i = 0..count-1 captured as one graph: {median, min, max} of 7 replays.
struct Timing {
  double median, min, max;
};
Timing Time(int count, const std::function<void(int, cudaStream_t)>& launch) {
  cudaStream_t stream;
  CUDA_OK(cudaStreamCreate(&stream));
  launch(0, stream);
  CUDA_OK(cudaStreamSynchronize(stream));
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < count; ++i) launch(i, stream);
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CUDA_OK(cudaStreamEndCapture(stream, &graph));
  CUDA_OK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  CUDA_OK(cudaEventCreate(&begin));
  CUDA_OK(cudaEventCreate(&end));
  std::vector<double> seconds;
  for (int i = 0; i < 9; ++i) {
    CUDA_OK(cudaEventRecord(begin, stream));
    CUDA_OK(cudaGraphLaunch(exec, stream));
    CUDA_OK(cudaEventRecord(end, stream));
    CUDA_OK(cudaEventSynchronize(end));
    float ms;
    CUDA_OK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 2) seconds.push_back(ms * 1e-3 / count);
  }
  std::sort(seconds.begin(), seconds.end());
  CUDA_OK(cudaGraphExecDestroy(exec));
  CUDA_OK(cudaGraphDestroy(graph));
  CUDA_OK(cudaEventDestroy(begin));
  CUDA_OK(cudaEventDestroy(end));
  CUDA_OK(cudaStreamDestroy(stream));
  return {seconds[seconds.size() / 2], seconds.front(), seconds.back()};
}

void Report(const std::string& name, Timing t, double bytes, double flops, double flops_ceiling) {
  const double by_bytes = bytes / ceilings.bytes_per_s;
  const double by_flops = flops / flops_ceiling;
  Result r = {name,
              t.median * 1e6,
              t.min * 1e6,
              t.max * 1e6,
              bytes,
              flops,
              std::max(by_bytes, by_flops) / t.median,
              by_bytes > by_flops ? "bytes" : "flops"};
  std::printf("%-44s %9.1f us (%.1f..%.1f) %7.0f GB/s %6.1f TFLOP/s %5.1f%% of %s\n", name.c_str(), r.us,
              r.us_min, r.us_max, bytes / t.median * 1e-9, flops / t.median * 1e-12, r.fraction * 100,
              r.bound);
  std::fflush(stdout);
  results.push_back(r);
}

__global__ void Fill(Bf16* data, size_t count, uint32_t seed, float scale) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count;
       i += size_t(gridDim.x) * blockDim.x) {
    uint32_t h = uint32_t(i) * 2654435761u ^ seed;
    h ^= h >> 15;
    h *= 0x85ebca6bu;
    h ^= h >> 13;
    h *= 0xc2b2ae35u;
    h ^= h >> 16;
    const int sum = int(h & 0xff) + int(h >> 8 & 0xff) + int(h >> 16 & 0xff) + int(h >> 24) - 510;
    data[i] = __float2bfloat16(float(sum) * scale / 148.0f);
  }
}
void FillRandom(Device<Bf16>& array, uint32_t seed, float deviation) {
  Fill<<<1056, 256>>>(array.get(), array.size(), seed, deviation);
  CUDA_OK(cudaGetLastError());
}

// Makes each byte a finite e4m3 code (of magnitude below 2).
__global__ void ClearTopExponent(uint16_t* data, size_t count) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count;
       i += size_t(gridDim.x) * blockDim.x) {
    data[i] &= 0xbfbf;
  }
}
void MakeE4m3(Device<Bf16>& array) {
  ClearTopExponent<<<1056, 256>>>(reinterpret_cast<uint16_t*>(array.get()), array.size());
  CUDA_OK(cudaGetLastError());
}

// Reads everything, writes nothing that matters.
__global__ void Read(const uint4* data, size_t count, uint32_t* sink) {
  uint32_t sum = 0;
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count;
       i += 4 * size_t(gridDim.x) * blockDim.x) {
    uint4 values[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const size_t at = i + j * size_t(gridDim.x) * blockDim.x;
      values[j] = at < count ? __ldcs(data + at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) sum ^= values[j].x ^ values[j].y ^ values[j].z ^ values[j].w;
  }
  if (sum == 0x9e3779b9u) *sink = sum;
}

#define CUBLAS_OK(call)                                                                 \
  do {                                                                                  \
    if ((call) != CUBLAS_STATUS_SUCCESS) std::printf("FAIL %s\n", #call), std::exit(1); \
  } while (0)

void MeasureCeilings() {
  {
    const size_t bytes = size_t(2) << 30;
    Device<uint8_t> a(bytes), b(bytes);
    const Timing t = Time(4, [&](int, cudaStream_t stream) {
      CUDA_OK(cudaMemcpyAsync(b.get(), a.get(), bytes, cudaMemcpyDeviceToDevice, stream));
    });
    Device<uint32_t> sink(1);
    const Timing read = Time(4, [&](int, cudaStream_t stream) {
      Read<<<132 * 16, 256, 0, stream>>>(reinterpret_cast<const uint4*>(a.get()), bytes / 16, sink.get());
    });
    ceilings.bytes_per_s = std::max(2.0 * bytes / t.median, bytes / read.median);
    std::printf("copy %.0f GB/s, read %.0f GB/s, ", 2e-9 * bytes / t.median, 1e-9 * bytes / read.median);
  }
  const int n = 8192;
  Device<Bf16> a(size_t(n) * n), b(size_t(n) * n), c(size_t(n) * n);
  FillRandom(a, 1, 1);
  FillRandom(b, 2, 1);
  cublasLtHandle_t handle;
  CUBLAS_OK(cublasLtCreate(&handle));
  cublasLtMatmulDesc_t matmul;
  CUBLAS_OK(cublasLtMatmulDescCreate(&matmul, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  const cublasOperation_t transposed = CUBLAS_OP_T;
  CUBLAS_OK(
      cublasLtMatmulDescSetAttribute(matmul, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof(transposed)));
  cublasLtMatrixLayout_t layout;
  CUBLAS_OK(cublasLtMatrixLayoutCreate(&layout, CUDA_R_16BF, n, n, n));
  cublasLtMatmulPreference_t preference;
  CUBLAS_OK(cublasLtMatmulPreferenceCreate(&preference));
  const size_t workspace_bytes = 32 << 20;
  Device<uint8_t> workspace(workspace_bytes);
  CUBLAS_OK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                 &workspace_bytes, sizeof(workspace_bytes)));
  cublasLtMatmulHeuristicResult_t choice;
  int found = 0;
  CUBLAS_OK(cublasLtMatmulAlgoGetHeuristic(handle, matmul, layout, layout, layout, layout, preference, 1,
                                           &choice, &found));
  const float one = 1, zero = 0;
  const Timing t = Time(8, [&](int, cudaStream_t stream) {
    CUBLAS_OK(cublasLtMatmul(handle, matmul, &one, a.get(), layout, b.get(), layout, &zero, c.get(), layout,
                             c.get(), layout, &choice.algo, workspace.get(), workspace_bytes, stream));
  });
  ceilings.flops_per_s = 2.0 * n * n * n / t.median;
  std::printf("ceiling of bytes %.0f GB/s, cuBLASLt bf16 8192^3 %.1f TFLOP/s\n", ceilings.bytes_per_s * 1e-9,
              ceilings.flops_per_s * 1e-12);
}

// Uniform top-k routing of `tokens` over `experts`, then the shared expert that takes every token.
struct Routing {
  std::vector<int32_t> offsets, tokens;
  int active = 0;
};
Routing Route(int tokens, int experts, int top_k, std::mt19937& engine) {
  std::vector<std::vector<int32_t>> lists(experts + 1);
  std::vector<int> order(experts);
  std::iota(order.begin(), order.end(), 0);
  for (int t = 0; t < tokens; ++t) {
    for (int j = 0; j < top_k; ++j) {
      std::swap(order[j], order[j + engine() % (experts - j)]);
      lists[order[j]].push_back(t);
    }
    lists[experts].push_back(t);
  }
  Routing r;
  r.offsets.push_back(0);
  for (const auto& list : lists) {
    r.active += !list.empty();
    r.tokens.insert(r.tokens.end(), list.begin(), list.end());
    r.offsets.push_back(int(r.tokens.size()));
  }
  return r;
}

void BenchGroupedGemm(const char* model, ExpertType type, int h, int m, const std::vector<int>& batches) {
  const int experts = 256;
  const int sets = 8;
  const bool e4m3 = type == ExpertType::kE4m3;
  const double element = e4m3 ? 1 : 2;
  const size_t one = size_t(experts + 1) * m * h;
  Device<Bf16> up(size_t(2 * one * element / 2)), down(size_t(one * element / 2));
  FillRandom(up, 3, 1 / std::sqrt(float(h)));
  FillRandom(down, 4, 1 / std::sqrt(float(m)));
  if (e4m3) MakeE4m3(up), MakeE4m3(down);
  Device<float> weight_scales(std::vector<float>(2 * one / 128 / 128, 0.01f));
  std::mt19937 engine(7);
  for (int tokens : batches) {
    const int slots = tokens * 9;
    Device<Bf16> x(size_t(tokens) * h), act(size_t(slots) * m), out(size_t(slots) * std::max(h, m));
    FillRandom(x, 5, 1);
    FillRandom(act, 6, 1);
    if (e4m3) MakeE4m3(x), MakeE4m3(act);
    Device<float> x_scales(std::vector<float>(size_t(slots) * std::max(h, m) / 128, 0.01f));
    std::vector<std::unique_ptr<Device<int32_t>>> offsets, rows;
    double active = 0;
    for (int i = 0; i < sets; ++i) {
      const Routing routing = Route(tokens, experts, 8, engine);
      offsets.push_back(std::make_unique<Device<int32_t>>(routing.offsets));
      rows.push_back(std::make_unique<Device<int32_t>>(routing.tokens));
      active += double(routing.active) / sets;
    }
    Device<float> scale(std::vector<float>(slots, 0.3f));
    GroupedGemmArgs args;
    args.type = type;
    args.num_experts = experts + 1;
    args.num_slots_max = slots;
    args.weight_scales = weight_scales.get();
    args.x_scales = x_scales.get();
    for (bool is_down : {false, true}) {
      args.matrix = is_down ? ExpertMatrix::kDown : ExpertMatrix::kGateUp;
      args.rows = is_down ? h : 2 * m;
      args.k = is_down ? m : h;
      args.weights = is_down ? down.get() : up.get();
      args.x = is_down ? act.get() : x.get();
      args.x_stride = args.k;
      args.x_scales_stride = args.k / 128;
      args.out = out.get();
      args.out_stride = is_down ? h : m;
      args.slot_scale = is_down ? scale.get() : nullptr;
      const double bytes = active * args.rows * args.k * element +
                           element * (is_down ? slots : tokens) * args.k + 2.0 * slots * args.out_stride;
      const double flops = 2.0 * slots * args.rows * args.k;
      for (bool wgmma : {false, true}) {
        if (!wgmma && tokens > 1024) continue;
        const Timing t = Time(sets, [&](int i, cudaStream_t stream) {
          args.expert_offsets = offsets[i]->get();
          args.x_rows = is_down ? nullptr : rows[i]->get();
          CUDA_OK(wgmma ? LaunchGroupedGemmPrefill(args, stream) : LaunchGroupedGemmDecode(args, stream));
        });
        Report(std::string(wgmma ? "gemm_prefill " : "gemm_decode ") + (e4m3 ? "e4m3 " : "bf16 ") + model +
                   (is_down ? " down T=" : " gate_up T=") + std::to_string(tokens),
               t, bytes, flops, ceilings.flops_per_s * (e4m3 ? 2 : 1));
      }
    }
  }
}

void BenchDecodeAttention(const char* model, int q_heads, int kv_heads, int seqs, int length) {
  const int dim = 128;
  const int pages_each = (length + 63) / 64;
  const size_t page_elements = size_t(2) * kv_heads * 64 * dim;
  const size_t bytes_each = size_t(seqs) * pages_each * page_elements * 2;
  const int sets = int(std::clamp<size_t>((size_t(1) << 30) / bytes_each, 2, 32));
  Device<Bf16> kv(size_t(sets) * seqs * pages_each * page_elements);
  Device<Bf16> q(size_t(seqs) * q_heads * dim), out(size_t(seqs) * q_heads * dim);
  FillRandom(kv, 8, 1);
  FillRandom(q, 9, 1);
  std::vector<int32_t> table(size_t(sets) * seqs * pages_each);
  std::iota(table.begin(), table.end(), 0);
  std::shuffle(table.begin(), table.end(), std::mt19937(10));
  Device<int32_t> d_table(table), lengths(std::vector<int32_t>(seqs, length));
  Device<uint8_t> workspace(DecodeAttentionWorkspaceBytes(seqs, q_heads, kv_heads, dim));
  workspace.Zero();
  DecodeAttentionArgs args;
  args.num_seqs = seqs;
  args.num_q_heads = q_heads;
  args.num_kv_heads = kv_heads;
  args.head_dim = dim;
  args.scale = 0.088f;
  args.q = q.get();
  args.q_stride = q_heads * dim;
  args.kv = kv.get();
  args.page_table_stride = pages_each;
  args.lengths = lengths.get();
  args.out = out.get();
  args.out_stride = q_heads * dim;
  args.workspace = workspace.get();
  const Timing t = Time(sets, [&](int i, cudaStream_t stream) {
    args.page_table = d_table.get() + size_t(i) * seqs * pages_each;
    CUDA_OK(LaunchDecodeAttention(args, stream));
  });
  const double tokens = double(seqs) * length;
  Report(std::string("decode_attention ") + model + " B=" + std::to_string(seqs) +
             " ctx=" + std::to_string(length),
         t, tokens * 2 * kv_heads * dim * 2 + 4.0 * seqs * q_heads * dim, tokens * q_heads * dim * 4,
         ceilings.flops_per_s);
}

void BenchPrefillAttention(const char* model, int q_heads, int kv_heads, int segments, int length,
                           int context) {
  const int dim = 128;
  const int tokens = segments * length;
  const int all = context + length;
  const int pages_each = (all + 63) / 64;
  const int sets = 3;
  Device<Bf16> kv(size_t(sets) * segments * pages_each * 2 * kv_heads * 64 * dim);
  Device<Bf16> q(size_t(sets) * tokens * q_heads * dim), out(size_t(tokens) * q_heads * dim);
  FillRandom(kv, 11, 1);
  FillRandom(q, 12, 1);
  std::vector<int32_t> table(size_t(sets) * segments * pages_each), begin;
  std::iota(table.begin(), table.end(), 0);
  std::shuffle(table.begin(), table.end(), std::mt19937(13));
  for (int i = 0; i <= segments; ++i) begin.push_back(i * length);
  Device<int32_t> d_table(table), d_begin(begin), lengths(std::vector<int32_t>(segments, all));
  PrefillAttentionArgs args;
  args.num_segments = segments;
  args.num_tokens = tokens;
  args.num_q_heads = q_heads;
  args.num_kv_heads = kv_heads;
  args.head_dim = dim;
  args.scale = 0.088f;
  args.q_stride = q_heads * dim;
  args.q_begin = d_begin.get();
  args.kv_lengths = lengths.get();
  args.kv = kv.get();
  args.num_pages = int(table.size());
  args.page_table_stride = pages_each;
  args.out = out.get();
  args.out_stride = q_heads * dim;
  const double pairs = segments * (double(length) * context + double(length) * (length + 1) / 2);
  for (bool wgmma : {false, true}) {
    const Timing t = Time(sets, [&](int i, cudaStream_t stream) {
      args.q = q.get() + size_t(i) * tokens * q_heads * dim;
      args.page_table = d_table.get() + size_t(i) * segments * pages_each;
      CUDA_OK(wgmma ? LaunchPrefillAttentionWgmma(args, stream) : LaunchPrefillAttentionMma(args, stream));
    });
    Report(std::string(wgmma ? "prefill_attention_wgmma " : "prefill_attention_mma ") + model + " " +
               std::to_string(segments) + "x" + std::to_string(length) +
               (context ? "+" + std::to_string(context) : ""),
           t, 2.0 * (2.0 * tokens * q_heads * dim + 2.0 * segments * all * kv_heads * dim),
           pairs * q_heads * dim * 4, ceilings.flops_per_s);
  }
}

void WriteJson(const char* path, const char* device) {
  FILE* file = std::fopen(path, "w");
  if (file == nullptr) std::printf("FAIL cannot write %s\n", path), std::exit(1);
  std::fprintf(file,
               "{\n  \"device\": \"%s\",\n  \"bytes_ceiling_gb_s\": %.0f,\n  \"bf16_tflop_s\": %.1f,\n  "
               "\"results\": [",
               device, ceilings.bytes_per_s * 1e-9, ceilings.flops_per_s * 1e-12);
  for (size_t i = 0; i < results.size(); ++i) {
    const Result& r = results[i];
    std::fprintf(file,
                 "%s\n    {\"name\": \"%s\", \"us\": %.2f, \"us_min\": %.2f, \"us_max\": %.2f, \"bytes\": "
                 "%.0f, \"flops\": "
                 "%.0f, \"fraction\": %.3f, \"bound\": \"%s\"}",
                 i ? "," : "", r.name.c_str(), r.us, r.us_min, r.us_max, r.bytes, r.flops, r.fraction,
                 r.bound);
  }
  std::fprintf(file, "\n  ]\n}\n");
  std::fclose(file);
}

}  // namespace
}  // namespace millrace::test

int main(int argc, char** argv) {
  using namespace millrace::test;  // NOLINT: this is their main
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess || properties.major != 9) {
    std::printf("SKIPPED: no GPU of compute capability 9.0\n");
    return 77;
  }
  MeasureCeilings();
  for (int context : {1024, 4096}) {
    for (int batch : {1, 8, 32, 64, 128, 256}) BenchDecodeAttention("mini", 16, 4, batch, context);
  }
  BenchDecodeAttention("mini", 16, 4, 1, 32768);
  BenchDecodeAttention("flash", 32, 4, 64, 4096);
  for (ExpertType type : {ExpertType::kBf16, ExpertType::kE4m3}) {
    BenchGroupedGemm("mini", type, 2048, 512, {1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384});
    BenchGroupedGemm("flash", type, 4096, 1024, {1, 32, 128, 2048, 8192});
  }
  BenchPrefillAttention("mini", 16, 4, 1, 2048, 0);
  BenchPrefillAttention("mini", 16, 4, 4, 2048, 0);
  BenchPrefillAttention("mini", 16, 4, 1, 8192, 0);
  BenchPrefillAttention("mini", 16, 4, 1, 2048, 6144);
  BenchPrefillAttention("flash", 32, 4, 1, 8192, 0);
  if (argc > 1) WriteJson(argv[1], properties.name);
  return 0;
}
