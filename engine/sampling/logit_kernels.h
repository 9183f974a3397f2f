#pragma once
// The two passes over a row of logits that a draw cannot do without. They are compiled for the instruction
// sets that a processor may have and chosen by cpuid; all do the same operations in the same order, without
// contraction, so that every worker has the same bits.

#include <cstdint>
#include <span>

namespace millrace::engine {

// Tokens less likely than e^-40 times the best one weigh less than the rounding of the sum and are left out.
inline constexpr double kExponentMin = -40;
inline constexpr int32_t kNumBuckets = 255;
inline constexpr uint8_t kNoBucket = 255;

struct LogitKernels {
  const char* name;
  // The first of the highest logits; NaN is never one. 0 if there is none above minus infinity.
  int32_t (*arg_max)(std::span<const float> logits);
  // weights[i] = exp((logits[i] - best) * inverse_temperature), good to 1e-15 of itself and 1 for the best; 0
  // where the exponent is below kExponentMin or no number. buckets[i] is a rank of likelihood: of two tokens
  // the one with the higher logit never has the higher number. kNoBucket for a weight of 0. `best` is no less
  // than any logit.
  void (*weigh)(std::span<const float> logits, float best, double inverse_temperature, double* weights,
                uint8_t* buckets);
};

// Those that this processor can run, the best first. Any thread.
std::span<const LogitKernels> RunnableLogitKernels();
inline const LogitKernels& BestLogitKernels() { return RunnableLogitKernels().front(); }

}  // namespace millrace::engine
