#include <math_constants.h>

#include "engine/backend/cuda/kernels/device.cuh"
#include "engine/backend/cuda/kernels/sampling.h"

namespace millrace::engine::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 2048;   // of weights by their exponent, from 0 down to kCut
constexpr double kCut = -40;  // weights below e^kCut are left out, as in sampler.cc
constexpr double kBinsPerUnit = kBins / -kCut;

struct Shared {
  unsigned long long best[kWarps];
  double sums[kWarps];
  int bins[kBins];
  unsigned long long candidates[kDrawCandidatesMax];  // Order() of each
  int num_candidates;
  int last_bin;
};

// Larger means drawn from earlier: the larger logit, then the lower id.
__device__ __forceinline__ unsigned long long Order(float logit, int id) {
  const uint32_t bits = __float_as_uint(logit);
  const uint32_t key = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  return static_cast<unsigned long long>(key) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}
__device__ __forceinline__ int IdOf(unsigned long long order) {
  return static_cast<int>(0xffffffffu - static_cast<uint32_t>(order & 0xffffffffu));
}
__device__ __forceinline__ float LogitOf(unsigned long long order) {
  const auto key = static_cast<uint32_t>(order >> 32);
  return __uint_as_float(key ^ ((key >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}

// The first in order; 0 when no logit is a number above minus infinity.
__device__ __forceinline__ unsigned long long Best(const float* logits, int count, Shared& shared) {
  unsigned long long best = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const float logit = logits[i];
    if (logit > -CUDART_INF_F) best = max(best, Order(logit, i));
  }
  for (int offset = 16; offset > 0; offset /= 2) best = max(best, __shfl_xor_sync(kFullWarp, best, offset));
  if (threadIdx.x % 32 == 0) shared.best[threadIdx.x / 32] = best;
  __syncthreads();  // every warp's best is there
  for (int w = 0; w < kWarps; ++w) best = max(best, shared.best[w]);
  return best;
}

__device__ __forceinline__ double Exponent(float logit, float best, double inverse_temperature) {
  return (static_cast<double>(logit) - static_cast<double>(best)) * inverse_temperature;
}

__device__ __forceinline__ double WarpSumDouble(double value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

// Weights of consecutive runs of ids, one run a warp: shared.sums. Returns their sum, added in order.
__device__ __forceinline__ double SumRuns(const float* logits, int begin, int end, float best,
                                          double inverse_temperature, Shared& shared) {
  double sum = 0;
  for (int i = begin + static_cast<int>(threadIdx.x % 32); i < end; i += 32) {
    const double exponent = Exponent(logits[i], best, inverse_temperature);
    if (exponent >= kCut) sum += exp(exponent);
  }
  sum = WarpSumDouble(sum);
  if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32] = sum;
  __syncthreads();  // every warp's sum is there
  double total = 0;
  for (int w = 0; w < kWarps; ++w) total += shared.sums[w];
  return total;
}

// Gathers the likeliest candidates, as many whole bins as fit, sorted. False if the first bin alone is too
// much.
__device__ __forceinline__ bool Gather(const float* logits, const DrawRow& draw, float best,
                                       double inverse_temperature, Shared& shared) {
  for (int b = threadIdx.x; b < kBins; b += kThreads) shared.bins[b] = 0;
  __syncthreads();  // bins are zero
  const auto bin_of = [&](float logit) {
    const double exponent = Exponent(logit, best, inverse_temperature);
    return exponent >= kCut ? min(static_cast<int>(-exponent * kBinsPerUnit), kBins - 1) : kBins;
  };
  for (int i = threadIdx.x; i < draw.num_tokens; i += kThreads) {
    const int bin = bin_of(logits[i]);
    if (bin < kBins) atomicAdd(&shared.bins[bin], 1);
  }
  __syncthreads();  // bins are counted
  if (threadIdx.x == 0) {
    int count = 0;
    int bin = 0;
    while (bin < kBins && count + shared.bins[bin] <= kDrawCandidatesMax) count += shared.bins[bin++];
    shared.last_bin = bin - 1;
    shared.num_candidates = 0;
  }
  for (int i = threadIdx.x; i < kDrawCandidatesMax; i += kThreads) shared.candidates[i] = 0;
  __syncthreads();  // last_bin is set, candidates are empty
  if (shared.last_bin < 0) return false;
  for (int i = threadIdx.x; i < draw.num_tokens; i += kThreads) {
    const float logit = logits[i];
    if (bin_of(logit) <= shared.last_bin)
      shared.candidates[atomicAdd(&shared.num_candidates, 1)] = Order(logit, i);
  }
  // Bitonic sort, largest first; the order in which they were gathered does not show.
  for (int size = 2; size <= kDrawCandidatesMax; size *= 2) {
    for (int step = size / 2; step > 0; step /= 2) {
      __syncthreads();  // the exchanges of the step before are done
      for (int i = threadIdx.x; i < kDrawCandidatesMax; i += kThreads) {
        const int other = i ^ step;
        if (other <= i) continue;
        const bool falling = (i & size) == 0;
        const unsigned long long a = shared.candidates[i], b = shared.candidates[other];
        if ((a < b) != falling) continue;
        shared.candidates[i] = b;
        shared.candidates[other] = a;
      }
    }
  }
  __syncthreads();  // sorted
  return true;
}

// One thread. `total` is the weight of all, `all_gathered` says that nothing lies beyond the candidates. The
// draw runs from the likeliest candidate down, as in sampler.cc.
__device__ __forceinline__ int DrawFromSorted(const DrawRow& draw, float best, double total,
                                              bool all_gathered, const Shared& shared) {
  const auto weight = [&](int i) {
    return exp(Exponent(LogitOf(shared.candidates[i]), best, draw.inverse_temperature));
  };
  int count = shared.num_candidates;
  bool open = !all_gathered;                  // more may belong to the set
  if (draw.top_k > count && open) return -1;  // the weight of the top_k is not known here
  if (draw.top_k > 0 && (draw.top_k < count || open)) {
    count = draw.top_k;
    open = false;
    total = 0;
    for (int i = 0; i < count; ++i) total += weight(i);
  }
  if (draw.top_p < 1 || draw.min_p > 0) {
    const double mass = static_cast<double>(draw.top_p) * total;
    double kept = 0;
    int keep = 0;
    while (keep < count) {
      const double next = weight(keep);
      if (keep > 0 && !(kept < mass && next >= draw.min_p)) break;
      kept += next;
      ++keep;
    }
    if (open && keep == count && kept < mass) return -1;
    open = false;
    count = keep;
    total = kept;
  }
  const double target = draw.uniform * total;
  double below = 0;
  for (int i = 0; i < (open ? count : count - 1); ++i) {
    below += weight(i);
    if (below > target) return IdOf(shared.candidates[i]);
  }
  return open ? -1 : IdOf(shared.candidates[count - 1]);
}

__global__ void __launch_bounds__(kThreads, 1) Draw(DrawArgs args) {
  __shared__ Shared shared;
  const DrawRow draw = args.draws[blockIdx.x];
  int32_t* const token = args.tokens + blockIdx.x;
  const float* const logits = args.logits + static_cast<int64_t>(blockIdx.x) * args.stride;
  const unsigned long long first = draw.num_tokens > 0 ? Best(logits, draw.num_tokens, shared) : 0;
  if (first == 0 || draw.inverse_temperature <= 0) {
    if (threadIdx.x == 0) *token = first == 0 ? -1 : IdOf(first);
    return;
  }
  const float best = LogitOf(first);
  const double inverse_temperature = draw.inverse_temperature;
  const int run = (draw.num_tokens + kThreads - 1) / kThreads * 32;
  const int begin = min(static_cast<int>(threadIdx.x / 32) * run, draw.num_tokens);
  const double total =
      SumRuns(logits, begin, min(begin + run, draw.num_tokens), best, inverse_temperature, shared);
  const bool gathered = Gather(logits, draw, best, inverse_temperature, shared);
  if (threadIdx.x != 0) return;
  *token = gathered ? DrawFromSorted(draw, best, total, shared.last_bin == kBins - 1, shared) : -1;
}

}  // namespace

cudaError_t LaunchDraw(const DrawArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  Draw<<<args.rows, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace millrace::engine::cuda
