#pragma once
// What the benchmark's parts share: ceilings of the card, one line per measurement on the terminal, JSON at
// the end.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace millrace::test {

struct Ceilings {
  double copy_bytes_per_second = 0;  // device to device, bytes read plus bytes written
  double bf16_flops_per_second = 0;  // 8192^3 through cuBLASLt, random data
};

// Of `work` on `stream`, events around each call: median of several after warming up. The spread (largest
// minus smallest over the median) is kept for Report.
double MedianSeconds(cudaStream_t stream, const std::function<void()>& work);
double LastSpread();

void FillRandom(__nv_bfloat16* out, size_t count, uint64_t seed);  // deviation about 1/3
void FillRandom(float* out, size_t count, uint64_t seed);

class Report {
 public:
  void SetDevice(const std::string& name, const Ceilings& ceilings);
  // `microseconds` of one launch that must move `bytes` and do `flops`; the fraction is of whichever bounds
  // it.
  void Kernel(const std::string& name, int rows, double bytes, double flops, double microseconds);
  // A decode step over `batch` sequences of `context` tokens, or a prefill.
  void Step(const std::string& kind, int batch, int context, double tokens, double seconds,
            double bound_seconds);
  std::string Json() const;
  const Ceilings& ceilings() const { return ceilings_; }

 private:
  std::string device_;
  Ceilings ceilings_;
  std::vector<std::string> entries_;
};

void BenchKernels(Report& report);
// The whole Ling-mini-2.0 shape with random weights: decode at several batch sizes and contexts, prefill.
void BenchSteps(Report& report);

}  // namespace millrace::test
