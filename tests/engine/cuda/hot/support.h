#pragma once
// Support of the GPU kernel tests and benches, for machines that have only the CUDA toolkit: checks that
// count failures, device arrays, seeded data. A CUDA error ends the program: nothing after it can be trusted.

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

namespace millrace::test {

inline int failures = 0;
inline int checks = 0;

#define CUDA_OK(call)                                                                            \
  do {                                                                                           \
    const cudaError_t error_ = (call);                                                           \
    if (error_ != cudaSuccess) {                                                                 \
      std::printf("FAIL %s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_)); \
      std::exit(1);                                                                              \
    }                                                                                            \
  } while (0)

#define EXPECT(condition, ...)                                        \
  do {                                                                \
    ++millrace::test::checks;                                         \
    if (!(condition)) {                                               \
      ++millrace::test::failures;                                     \
      std::printf("FAIL %s:%d %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                       \
      std::printf("\n");                                              \
    }                                                                 \
  } while (0)

using Bf16 = __nv_bfloat16;

// An array in device memory, filled with 0xff bytes (NaN, or -1) until something is copied in.
template <typename T>
class Device {
 public:
  explicit Device(size_t count) : count_(count) {
    CUDA_OK(cudaMalloc(&data_, count * sizeof(T) + 16));
    Poison();
  }
  explicit Device(const std::vector<T>& host) : Device(host.size()) { Set(host); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device() { cudaFree(data_); }

  T* get() const { return data_; }
  size_t size() const { return count_; }
  void Poison() { CUDA_OK(cudaMemset(data_, 0xff, count_ * sizeof(T))); }
  void Zero() { CUDA_OK(cudaMemset(data_, 0, count_ * sizeof(T))); }
  void Set(const std::vector<T>& host) {
    CUDA_OK(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> Get() const {
    std::vector<T> host(count_);
    CUDA_OK(cudaDeviceSynchronize());
    CUDA_OK(cudaMemcpy(host.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  size_t count_;
  T* data_ = nullptr;
};

inline double Value(Bf16 x) { return static_cast<double>(__bfloat162float(x)); }
inline bool SameBits(Bf16 a, Bf16 b) { return std::memcmp(&a, &b, sizeof(a)) == 0; }
inline bool IsPoison(Bf16 x) {
  uint16_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits == 0xffff;
}

// Normal values of the given deviation; a fresh seed for each array.
inline std::vector<Bf16> Normal(size_t count, float deviation, uint32_t seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<Bf16> values(count);
  for (Bf16& value : values) value = __float2bfloat16(normal(engine));
  return values;
}

// Gathers how far results are from fp64 references: `excess` is the worst |y - ref| / bound, `drift` the
// aggregate 1 - 2 <y, ref> / (|y|^2 + |ref|^2).
struct Comparison {
  double excess = 0;
  double cross = 0;
  double squares = 0;
  size_t count = 0;
  bool nan = false;
  void Add(double y, double reference, double bound) {
    if (!std::isfinite(y)) nan = true;
    excess = std::max(excess, std::fabs(y - reference) / bound);
    cross += y * reference;
    squares += y * y + reference * reference;
    ++count;
  }
  double drift() const { return squares == 0 ? 0 : 1 - 2 * cross / squares; }
};

#define EXPECT_CLOSE(comparison, drift_max, name)                                                            \
  do {                                                                                                       \
    const auto& c_ = (comparison);                                                                           \
    EXPECT(c_.count > 0 && !c_.nan && c_.excess <= 1 && std::fabs(c_.drift()) <= (drift_max),                \
           "%s: %zu values, nan %d, worst %.3f of its bound, drift %.2e", name, c_.count, c_.nan, c_.excess, \
           c_.drift());                                                                                      \
  } while (0)

}  // namespace millrace::test
