#pragma once
// Grouped GEMM over experts: out[slot] = f(W[expert of the slot] x[row of the slot]) for slots sorted by
// expert. Two kernels share one contract: Decode for few tokens (bound by the bytes of the weights), Prefill
// for many (bound by the tensor cores). Everything that routing decides is read on the device, so a captured
// graph may replay either with other routing; the host fixes shapes only.
//
// Every output is one fp32 sum over k in ascending steps of 16, kept in one accumulator: its value depends on
// its own row and weights only, not on the other tokens, their number, the tile or the launch. Decode and
// Prefill use different instructions (mma.sync and wgmma) and may differ from each other in the last bits.
//
// Needs sm_90a. Launch returns the first CUDA error; it allocates nothing and synchronises nothing.

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>
#include <stdint.h>

namespace millrace::engine::cuda {

enum class ExpertMatrix {
  kGateUp,  // weights [experts][2 M][k], row 2i = gate i, 2i+1 = up i; out[i] = silu(gate i) * up i, M
            // outputs
  kDown,    // weights [experts][rows][k]; out[r] = slot_scale * (row r), `rows` outputs
};

enum class ExpertType {
  kBf16,
  // OCP e4m3 weights with one fp32 scale per 128 x 128 block, activations with one per row and 128 k (w = q *
  // scale). Products of 128 k are summed by the tensor cores, then scaled and added in fp32. k and the
  // outputs are multiples of 128; the output is bf16.
  kE4m3,
};

inline constexpr int kGroupedGemmExpertsMax = 448;
inline constexpr int kScaleBlock = 128;

struct GroupedGemmArgs {
  ExpertMatrix matrix = ExpertMatrix::kDown;
  ExpertType type = ExpertType::kBf16;  // of weights and x
  int num_experts = 0;                  // at most kGroupedGemmExpertsMax; a shared expert counts as one
  int rows = 0;                         // weight rows per expert (2 M for kGateUp); a multiple of 16
  int k = 0;                            // a multiple of 16
  int num_slots_max = 0;  // bound on expert_offsets[num_experts]; a hint for the choice of tiles

  const void* weights = nullptr;            // [num_experts][rows][k], 16-byte aligned
  const int32_t* expert_offsets = nullptr;  // [num_experts + 1] first slot of each expert, ascending from 0
  const void* x = nullptr;                  // input rows, row r at x + r * x_stride, 16-byte aligned
  int64_t x_stride = 0;                     // elements, rows 16-byte aligned
  const int32_t* x_rows = nullptr;          // [slots] input row of each slot; nullptr: row = slot
  // kE4m3 only. kGateUp: [num_experts][gate, up][M / 128][k / 128]; kDown: [num_experts][rows / 128][k /
  // 128].
  const float* weight_scales = nullptr;
  const float* x_scales =
      nullptr;  // [input rows][k / 128], rows x_scales_stride elements apart; fewer than 2^31 in all

  int64_t x_scales_stride = 0;
  __nv_bfloat16* out = nullptr;       // output rows, row r at out + r * out_stride, 16-byte aligned
  int64_t out_stride = 0;             // elements, a multiple of 8
  const int32_t* out_rows = nullptr;  // [slots] output row of each slot, distinct; nullptr: row = slot
  const float* slot_scale = nullptr;  // [slots] factor of each slot (kDown only); nullptr: 1
};

// What both kernels need of the shapes.
inline bool ValidGroupedGemm(const GroupedGemmArgs& args) {
  const int rows_step = args.type == ExpertType::kBf16 ? 16 : kScaleBlock;
  const int step =
      args.matrix == ExpertMatrix::kGateUp && args.type == ExpertType::kE4m3 ? 2 * rows_step : rows_step;
  return args.num_experts > 0 && args.num_experts <= kGroupedGemmExpertsMax && args.rows > 0 &&
         args.rows % step == 0 && args.k > 0 &&
         args.k % (args.type == ExpertType::kBf16 ? 16 : kScaleBlock) == 0;
}

// For up to about 16 slots per expert on average; correct for any number.
cudaError_t LaunchGroupedGemmDecode(const GroupedGemmArgs& args, cudaStream_t stream);

// For more. Correct for any number.
cudaError_t LaunchGroupedGemmPrefill(const GroupedGemmArgs& args, cudaStream_t stream);

}  // namespace millrace::engine::cuda
