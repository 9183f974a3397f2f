#pragma once
// Embedding, RMSNorm, and the input of the MTP layer: one block per row, statistics in fp32, a row's value
// independent of the other rows. The residual stream is fp32; what a GEMM reads is bf16. hidden is a multiple
// of 8.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace millrace::engine::cuda {

struct EmbedArgs {
  const int32_t* tokens = nullptr;       // [rows], each in [0, vocabulary)
  const __nv_bfloat16* table = nullptr;  // [vocabulary, hidden]
  float* residual = nullptr;             // [rows, hidden], written
  int32_t rows = 0;
  int32_t hidden = 0;
};
cudaError_t LaunchEmbed(const EmbedArgs& args, cudaStream_t stream);

// out[r] = x[index[r]] / sqrt(mean(x^2) + eps) * weight, where x = residual (+ bias, stored back).
struct RmsNormArgs {
  float* residual = nullptr;       // [.., hidden]
  const float* bias = nullptr;     // [hidden] or null; added to the residual first (then index must be null)
  const float* weight = nullptr;   // [hidden]
  const int32_t* index = nullptr;  // [rows] row of the residual to read; null: r itself
  __nv_bfloat16* out = nullptr;    // [rows, hidden]
  int32_t rows = 0;
  int32_t hidden = 0;
  float eps = 0;
};
cudaError_t LaunchRmsNorm(const RmsNormArgs& args, cudaStream_t stream);

// The MTP layer's input: out[r] = [RMSNorm(table[next_tokens[r]]; embedding_norm),
// RMSNorm(RMSNorm(residual[index[r]]; final_norm); hidden_norm)].
struct MtpInputArgs {
  const float* residual = nullptr;       // [.., hidden], after the last main layer
  const int32_t* index = nullptr;        // [rows]
  const int32_t* next_tokens = nullptr;  // [rows]
  const __nv_bfloat16* table = nullptr;  // [vocabulary, hidden]
  const float* final_norm = nullptr;     // [hidden] each
  const float* hidden_norm = nullptr;
  const float* embedding_norm = nullptr;
  __nv_bfloat16* out = nullptr;  // [rows, 2 * hidden]
  int32_t rows = 0;
  int32_t hidden = 0;
  float eps = 0;
};
cudaError_t LaunchMtpInput(const MtpInputArgs& args, cudaStream_t stream);

// out[r][i] = silu(gate_up[r][2 i]) * gate_up[r][2 i + 1]. width is a multiple of 8.
struct SwigluArgs {
  const __nv_bfloat16* gate_up = nullptr;  // [rows, 2 * width]
  __nv_bfloat16* out = nullptr;            // [rows, width]
  int32_t rows = 0;
  int32_t width = 0;
};
cudaError_t LaunchSwiglu(const SwigluArgs& args, cudaStream_t stream);

}  // namespace millrace::engine::cuda
