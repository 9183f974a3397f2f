#pragma once
// Draws one token per row of logits, by the rules of engine/sampling/sampler.h and in its order of
// candidates: greedy, temperature, top-k, top-p, min-p. Block per row; a row's token depends on its own
// logits and parameters only.

#include <cuda_runtime.h>

#include <cstdint>

namespace millrace::engine::cuda {

// Likeliest candidates that a row can look at when top-k, top-p or min-p cut; a cut that needs more is not
// drawn here.
inline constexpr int32_t kDrawCandidatesMax = 1024;

// As a Segment asks for it; plain bytes, copied to the device.
struct DrawRow {
  double uniform = 0;              // [0, 1)
  double inverse_temperature = 1;  // 0 = greedy
  float top_p = 1;
  float min_p = 0;
  int32_t top_k = 0;       // 0 = off
  int32_t num_tokens = 0;  // ids from here on are never drawn; 0: draw nothing
};

struct DrawArgs {
  const float* logits = nullptr;  // [rows, stride]
  int64_t stride = 0;
  const DrawRow* draws = nullptr;  // [rows]
  int32_t* tokens =
      nullptr;  // [rows], written; -1: not drawn (nothing asked, no finite logit, too many candidates)
  int32_t rows = 0;
};
cudaError_t LaunchDraw(const DrawArgs& args, cudaStream_t stream);

}  // namespace millrace::engine::cuda
