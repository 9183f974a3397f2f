#pragma once
// From router logits to sorted work for the experts. The rules are those of engine/moe/router.h.
//
// Shared experts are experts like the others: they have ids num_experts, num_experts + 1, ..., every token
// chooses them, and their weight is 1. A slot is one (token, choice); its number is token * slots_per_token +
// choice, where slots_per_token = top_k + shared experts.

#include <cuda_runtime.h>

#include <cstdint>

namespace millrace::engine::cuda {

inline constexpr int32_t kExpertsMax = 512;
inline constexpr int32_t kTopKMax = 16;
inline constexpr int32_t kGroupsMax = 32;

struct SelectExpertsArgs {
  const float* logits = nullptr;        // [rows, num_experts]
  const float* bias = nullptr;          // [num_experts], or null
  const int32_t* valid_rows = nullptr;  // device scalar: rows from here on are padding and choose nothing
  int32_t* experts = nullptr;           // [rows, top_k], written; -1 in padding rows
  float* weights = nullptr;             // [rows, top_k], written; 0 in padding rows
  int32_t rows = 0;
  int32_t num_experts = 0;  // at most kExpertsMax
  int32_t top_k = 0;        // at most kTopKMax
  int32_t num_groups = 0;   // 0: no group limit; at most kGroupsMax
  int32_t groups_per_token = 0;
  bool sigmoid = false;
  bool norm_topk_prob = true;
  float scaling = 1;
};
cudaError_t LaunchSelectExperts(const SelectExpertsArgs& args, cudaStream_t stream);

// Slots sorted by expert, in token order within an expert: the same list on every run.
struct SortSlotsArgs {
  // [rows, top_k] as SelectExperts wrote them. Without shared experts any choice may be -1: it has no slot.
  const int32_t* experts = nullptr;
  const float* weights = nullptr;       // likewise
  const int32_t* valid_rows = nullptr;  // device scalar
  int32_t* offsets = nullptr;  // [num_experts + num_shared + 1], written: where each expert's slots begin
  // The sorted slots' numbers, tokens and weights: [rows * slots_per_token] each, written up to offsets' last
  // entry.
  int32_t* slots = nullptr;
  int32_t* tokens = nullptr;
  float* slot_weights = nullptr;
  int32_t rows = 0;
  int32_t num_experts = 0;
  int32_t top_k = 0;
  int32_t num_shared = 0;
};
cudaError_t LaunchSortSlots(const SortSlotsArgs& args, cudaStream_t stream);

}  // namespace millrace::engine::cuda
