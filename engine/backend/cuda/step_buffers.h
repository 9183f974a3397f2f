#pragma once
// What a step computes in: device arrays, R = padded rows, S = R * slots per token, L = padded logit rows.

#include "engine/backend/cuda/kernels/sampling.h"
#include "engine/backend/cuda/step_runner.h"

namespace millrace::engine::cuda {

struct StepRunner::Buffers {
  int32_t* inputs[2] = {};       // by PassKind: a PassInputs block
  int32_t* page_tables[2] = {};  // [R, table_stride]
  std::byte* attention_workspace = nullptr;
  float* residual = nullptr;            // [R, hidden]
  __nv_bfloat16* normed = nullptr;      // [R, hidden]
  __nv_bfloat16* qkv = nullptr;         // [R, qkv_width]
  __nv_bfloat16* query = nullptr;       // [R, q_width]
  __nv_bfloat16* attended = nullptr;    // [R, q_width]
  __nv_bfloat16* gate_up = nullptr;     // [R, 2 * dense_width]
  __nv_bfloat16* activation = nullptr;  // [R, dense_width] or [S, expert_width]
  __nv_bfloat16* expert_out = nullptr;  // [S, hidden], by slot number
  uint8_t* quantized = nullptr;         // [R, hidden] or [S, expert_width], e4m3
  float* quantized_scales = nullptr;    // [R, hidden / 128] or [S, expert_width / 128]
  float* router_logits = nullptr;       // [R, num_experts]
  int32_t* route_blocks = nullptr;      // one zero, for the routing of few rows
  int32_t* experts = nullptr;           // [S]
  float* expert_weights = nullptr;      // [S]
  int32_t* expert_offsets = nullptr;    // [experts_all + 1]
  int32_t* slots = nullptr;             // [S]
  int32_t* slot_tokens = nullptr;       // [S]
  float* slot_weights = nullptr;        // [S]
  __nv_bfloat16* head_input = nullptr;  // [L, hidden]
  DrawRow* draws = nullptr;             // [L]
  int32_t* drawn = nullptr;             // [L]
  float* logits = nullptr;              // [L, vocab]
  __nv_bfloat16* mtp_input = nullptr;   // [R, 2 * hidden]
  float* mtp_logits = nullptr;          // [L, vocab]
};

}  // namespace millrace::engine::cuda
