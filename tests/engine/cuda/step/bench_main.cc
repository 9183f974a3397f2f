// cuda_bench [kernels|steps] [FILE]: measures the card's ceilings, then kernels and whole steps; JSON to
// FILE. Exit code 77: no GPU of compute capability 9.0 here.
#include <algorithm>
#include <chrono>
#include <fstream>

#include "engine/backend/cuda/gemm.h"
#include "tests/engine/cuda/hot/support.h"
#include "tests/engine/cuda/step/bench.h"

namespace millrace::test {
namespace {

double last_spread = 0;

std::string Text(const char* format, auto... values) {
  char text[512];
  std::snprintf(text, sizeof(text), format, values...);
  return text;
}

Ceilings MeasureCeilings() {
  Ceilings ceilings;
  cudaStream_t stream;
  CUDA_OK(cudaStreamCreate(&stream));
  {
    constexpr size_t kBytes = size_t{4} << 30;
    Device<uint8_t> from(kBytes), to(kBytes);
    FillRandom(reinterpret_cast<float*>(from.get()), kBytes / 4, 1);
    ceilings.copy_bytes_per_second =
        2.0 * kBytes / MedianSeconds(stream, [&] {
          CUDA_OK(cudaMemcpyAsync(to.get(), from.get(), kBytes, cudaMemcpyDeviceToDevice, stream));
        });
  }
  constexpr int kSide = 8192;
  Device<Bf16> a(size_t{kSide} * kSide), b(size_t{kSide} * kSide), c(size_t{kSide} * kSide);
  FillRandom(a.get(), a.size(), 2);
  FillRandom(b.get(), b.size(), 3);
  std::unique_ptr<engine::cuda::Gemm> gemm;
  engine::cuda::Result result = engine::cuda::Gemm::Create(&gemm);
  EXPECT(result.ok(), "%s", result.message().c_str());
  const double seconds = MedianSeconds(stream, [&] {
    result = gemm->Run({a.get(), b.get(), c.get(), false, false, kSide, kSide, kSide}, stream);
    EXPECT(result.ok(), "%s", result.message().c_str());
  });
  ceilings.bf16_flops_per_second = 2.0 * kSide * kSide * kSide / seconds;
  CUDA_OK(cudaStreamDestroy(stream));
  return ceilings;
}

}  // namespace

double LastSpread() { return last_spread; }

double MedianSeconds(cudaStream_t stream, const std::function<void()>& work) {
  constexpr int kWarm = 2, kRuns = 11;
  cudaEvent_t events[kRuns + 1];
  for (cudaEvent_t& event : events) CUDA_OK(cudaEventCreate(&event));
  for (int i = 0; i < kWarm; ++i) work();
  CUDA_OK(cudaEventRecord(events[0], stream));
  for (int i = 0; i < kRuns; ++i) {
    work();
    CUDA_OK(cudaEventRecord(events[i + 1], stream));
  }
  CUDA_OK(cudaStreamSynchronize(stream));
  std::vector<double> seconds;
  for (int i = 0; i < kRuns; ++i) {
    float milliseconds = 0;
    CUDA_OK(cudaEventElapsedTime(&milliseconds, events[i], events[i + 1]));
    seconds.push_back(milliseconds / 1e3);
  }
  for (const cudaEvent_t event : events) CUDA_OK(cudaEventDestroy(event));
  std::sort(seconds.begin(), seconds.end());
  last_spread = (seconds.back() - seconds.front()) / seconds[kRuns / 2];
  return seconds[kRuns / 2];
}

void Report::SetDevice(const std::string& name, const Ceilings& ceilings) {
  device_ = name;
  ceilings_ = ceilings;
  std::printf("%s: copy %.2f TB/s, bf16 %.0f TFLOP/s\n", name.c_str(), ceilings.copy_bytes_per_second / 1e12,
              ceilings.bf16_flops_per_second / 1e12);
}

void Report::Kernel(const std::string& name, int rows, double bytes, double flops, double microseconds) {
  const double by_bytes = bytes / ceilings_.copy_bytes_per_second * 1e6;
  const double by_flops = flops / ceilings_.bf16_flops_per_second * 1e6;
  const double bound = std::max(by_bytes, by_flops);
  std::printf("%-20s %5d rows %9.2f us  %8.2f MB  %9.3f GFLOP  %5.1f %% of the %s bound\n", name.c_str(),
              rows, microseconds, bytes / 1e6, flops / 1e9, 100 * bound / microseconds,
              by_bytes >= by_flops ? "memory" : "compute");
  entries_.push_back(
      Text("{\"kernel\": \"%s\", \"rows\": %d, \"microseconds\": %.3f, \"bytes\": %.0f, \"flops\": %.0f, "
           "\"fraction\": %.4f, \"spread\": %.3f}",
           name.c_str(), rows, microseconds, bytes, flops, bound / microseconds, last_spread));
}

void Report::Step(const std::string& kind, int batch, int context, double tokens, double seconds,
                  double bound_seconds) {
  std::printf("%-28s batch %3d context %4d: %8.3f ms, bound %8.3f ms (%4.1f %%), %9.0f tokens/s\n",
              kind.c_str(), batch, context, seconds * 1e3, bound_seconds * 1e3, 100 * bound_seconds / seconds,
              tokens / seconds);
  std::fflush(stdout);
  entries_.push_back(
      Text("{\"step\": \"%s\", \"batch\": %d, \"context\": %d, \"milliseconds\": %.4f, "
           "\"bound_milliseconds\": %.4f, \"tokens_per_second\": %.0f, \"spread\": %.3f}",
           kind.c_str(), batch, context, seconds * 1e3, bound_seconds * 1e3, tokens / seconds, last_spread));
}

std::string Report::Json() const {
  std::string text = Text(
      "{\"device\": \"%s\", \"copy_bytes_per_second\": %.4g, \"bf16_flops_per_second\": %.4g,\n"
      " \"entries\": [",
      device_.c_str(), ceilings_.copy_bytes_per_second, ceilings_.bf16_flops_per_second);
  for (size_t i = 0; i < entries_.size(); ++i) text += (i == 0 ? "\n  " : ",\n  ") + entries_[i];
  return text + "\n]}\n";
}

}  // namespace millrace::test

int main(int argc, char** argv) {
  using namespace millrace::test;  // NOLINT: this is their main
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess || properties.major != 9) {
    std::printf("SKIPPED: no GPU of compute capability 9.0\n");
    return 77;
  }
  const std::string only = argc > 1 ? argv[1] : "";
  Report report;
  report.SetDevice(properties.name, MeasureCeilings());
  if (only != "steps") BenchKernels(report);
  if (only != "kernels") BenchSteps(report);
  if (argc > 2) std::ofstream(argv[2]) << report.Json();
  return failures == 0 ? 0 : 1;
}
