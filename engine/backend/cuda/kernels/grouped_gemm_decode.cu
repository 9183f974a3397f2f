// Decode: weight rows on the 16-row side of mma.sync m16n8k16, tokens on its 8-column side, so that two
// tokens of an expert do not cost the work of 64. Persistent CTAs; one producer warp streams [rows x 512
// bytes of k] stages of weights (tensor copies, evict-first) and the tokens' k range (one bulk copy per
// token). Two groups of consumer warps take the CTA's items in turn, so that one finds its tile, reads scales
// and writes its outputs while the other multiplies; in a group each warp owns 16 weight rows of the tile
// over the whole of k.

#include "engine/backend/cuda/kernels/expert_tiles.cuh"
#include "engine/backend/cuda/kernels/grouped_gemm.h"
#include "engine/backend/cuda/kernels/launch.cuh"
#include "engine/backend/cuda/kernels/ptx.cuh"
#include "engine/backend/cuda/kernels/tensor_map.h"

namespace millrace::engine::cuda {
namespace {

constexpr int kTileTokens = 32;
// Along k everything is counted in bytes: 256 bf16 or 512 e4m3 per stage.
constexpr int kStageK = 512;
constexpr int kBoxK = 128;  // one swizzle row; of e4m3, one block of scales
constexpr int kBoxes = kStageK / kBoxK;
constexpr int kStepK = 32;  // one mma: 16 bf16 or 32 e4m3
// Token rows are padded by 16 bytes: the 8 rows of an ldmatrix then fall on 8 different groups of banks.
constexpr int kTokenPitch = kStageK + 16;
constexpr int kTokenBytes = kTileTokens * kTokenPitch;

constexpr int kGroups = 2;

// kWarps: of one group.
template <int kWarps>
struct Shape {
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kBoxBytes = kRows * 128;
  static constexpr int kWeightBytes = kBoxes * kBoxBytes;
  static constexpr int kStages = kWarps == 4 ? 4 : 6;
  static constexpr int kThreads = 32 * (kGroups * kWarps + 1);
};

// Stages first: weight boxes need 1024-byte alignment.
template <int kWarps>
struct alignas(1024) Shared {
  uint8_t weights[Shape<kWarps>::kStages][Shape<kWarps>::kWeightBytes];
  uint8_t tokens[Shape<kWarps>::kStages][kTokenBytes];
  uint64_t full[Shape<kWarps>::kStages];   // the producer's expected bytes have landed
  uint64_t empty[Shape<kWarps>::kStages];  // every warp of the group whose item it is has read the stage
  uint64_t turn[kGroups];                  // the other group has read the last stage of its item

  int32_t prefix[kGroupedGemmExpertsMax + 1];
};

struct Params {
  GroupedGemmArgs args;
  int row_tiles;
  int k_bytes;  // of a row of weights or of x
};

template <ExpertType kType>
constexpr int kElementBytes = kType == ExpertType::kBf16 ? 2 : 1;

// What a lane needs to scale the sums of one 128-byte box: its rows' (gate or upper, up or lower) and its
// tokens'.
template <int kColumns>
struct BoxScales {
  float rows[2];
  float tokens[kColumns][2];
};

// sums += 16 weight rows (one warp) x kColumns x 8 tokens over one box. `k_left`: valid bytes of k in the
// box.
template <ExpertType kType, int kColumns>
__device__ __forceinline__ void MultiplyBox(uint32_t weights, uint32_t tokens, int row, int lane, int k_left,
                                            float (&sums)[kColumns][4]) {
  // e4m3 stays rolled: its scales leave fewer registers for loads that run ahead.
  constexpr int kUnroll = kType == ExpertType::kBf16 ? kBoxK / kStepK / 2 : 1;
#pragma unroll kUnroll
  for (int pair = 0; pair < kBoxK / kStepK / 2; ++pair) {  // two steps: one token load serves both
    if (pair * 2 * kStepK >= k_left) break;
    uint32_t b[kColumns][4];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      ptx::LoadMatrix4(b[column], tokens + column * 8 * kTokenPitch + pair * 2 * kStepK);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int step = pair * 2 + half;
      if (step * kStepK >= k_left) break;
      const uint32_t chunk = step * 2 + (lane >> 4);
      uint32_t a[4];
      ptx::LoadMatrix4(a, weights + ((chunk ^ (row & 7)) << 4));
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        if constexpr (kType == ExpertType::kBf16) {
          ptx::Mma16816(sums[column], a, b[column][2 * half], b[column][2 * half + 1]);
        } else {
          ptx::Mma16832E4m3(sums[column], a, b[column][2 * half], b[column][2 * half + 1]);
        }
      }
    }
  }
}

// The scales of the weight rows of a warp (16 rows from row16 on) and of a lane's tokens.
template <bool kGateUp, int kColumns>
struct ScaleReader {
  const float* weight_scales;  // of the upper rows
  int lower;                   // from there to those of the lower rows
  int tokens[kColumns][2];     // elements from args.x_scales

  __device__ __forceinline__ ScaleReader(const GroupedGemmArgs& args, const ExpertTile& tile, int row16,
                                         int lane) {
    const int64_t k_blocks = args.k / kScaleBlock;
    const int64_t row_blocks = args.rows / kScaleBlock;  // of an expert, gates and ups together
    const float* expert = args.weight_scales + tile.expert * row_blocks * k_blocks;
    weight_scales = expert + (kGateUp ? row16 / 2 : row16) / kScaleBlock * k_blocks;
    lower = kGateUp ? static_cast<int>(row_blocks / 2 * k_blocks) : 0;
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int slot = tile.first_slot + min(column * 8 + 2 * (lane & 3) + i, tile.num_tokens - 1);
        const int row = args.x_rows != nullptr ? args.x_rows[slot] : slot;
        tokens[column][i] = row * static_cast<int>(args.x_scales_stride);
      }
    }
  }
  __device__ __forceinline__ void Read(const GroupedGemmArgs& args, int k_block,
                                       BoxScales<kColumns>& scales) const {
    scales.rows[0] = __ldg(weight_scales + k_block);
    scales.rows[1] = __ldg(weight_scales + lower + k_block);
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      scales.tokens[column][0] = args.x_scales[tokens[column][0] + k_block];
      scales.tokens[column][1] = args.x_scales[tokens[column][1] + k_block];
    }
  }
};

template <int kColumns>
__device__ __forceinline__ void AddScaled(const float (&box)[kColumns][4], const BoxScales<kColumns>& scales,
                                          float (&sums)[kColumns][4]) {
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[column][i] =
          fmaf(box[column][i], scales.rows[i / 2] * scales.tokens[column][i % 2], sums[column][i]);
    }
  }
}

// One tile of one consumer warp: all of k, then the epilogue. `ordinal`: of the item among the CTA's.

template <ExpertType kType, int kWarps, bool kGateUp, int kColumns>
__device__ __forceinline__ void ConsumeTile(const Params& params, Shared<kWarps>& shared,
                                            const ExpertTile& tile, int row_tile, int ordinal, int warp,
                                            int lane) {
  using S = Shape<kWarps>;
  const GroupedGemmArgs& args = params.args;
  const int row = warp * 16 + (lane & 15);
  const int row16 = row_tile * S::kRows + warp * 16;
  const uint32_t token_offset = (lane & 7) * kTokenPitch + (lane >> 3) * 16;
  float sums[kColumns][4] = {};
  const int group = ordinal % kGroups;
  int step = ordinal * ((params.k_bytes + kStageK - 1) / kStageK);  // of the ring of stages
  int stage = step % S::kStages;
  auto consume = [&](auto&& multiply) {  // calls multiply(weights, tokens, first byte of k) per stage
    for (int k0 = 0; k0 < params.k_bytes; k0 += kStageK) {
      multiply(ptx::SmemAddress(shared.weights[stage]) + row * 128,
               ptx::SmemAddress(shared.tokens[stage]) + token_offset, k0);
      __syncwarp();  // every lane has read the stage
      if (lane == 0) ptx::BarrierArrive(ptx::SmemAddress(&shared.empty[stage]));
      stage = ++step % S::kStages;
    }
    if (lane == 0) ptx::BarrierArrive(ptx::SmemAddress(&shared.turn[1 - group]));
  };
  auto wait = [&](int k0) {
    // Until the other group has read the stages before these, a barrier may stand a whole round earlier,
    // where its parity would mislead. Group 0's n-th item follows group 1's (n - 1)-th, group 1's n-th group
    // 0's n-th.
    if (k0 == 0) ptx::BarrierWait(ptx::SmemAddress(&shared.turn[group]), (ordinal / kGroups + 1 - group) & 1);
    ptx::BarrierWait(ptx::SmemAddress(&shared.full[stage]), (step / S::kStages) & 1);
  };
  if constexpr (kType == ExpertType::kBf16) {
    consume([&](uint32_t weights, uint32_t tokens, int k0) {
      wait(k0);
      if (params.k_bytes - k0 >= kStageK) {
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) {
          MultiplyBox<kType>(weights + box * S::kBoxBytes, tokens + box * kBoxK, row, lane, kBoxK, sums);
        }
      } else {
        for (int box = 0; k0 + box * kBoxK < params.k_bytes; ++box) {
          MultiplyBox<kType>(weights + box * S::kBoxBytes, tokens + box * kBoxK, row, lane,
                             params.k_bytes - k0 - box * kBoxK, sums);
        }
      }
    });
  } else {
    const ScaleReader<kGateUp, kColumns> reader(args, tile, min(row16, args.rows - 16), lane);
    consume([&](uint32_t weights, uint32_t tokens, int k0) {
      const int boxes = min((params.k_bytes - k0) / kBoxK, kBoxes);
      // The first boxes' scales are asked for before the wait, which hides them; the rest lie in the same
      // cache lines.
      constexpr int kAhead = kColumns == 1 ? 2 : 1;
      BoxScales<kColumns> scales[kAhead];
#pragma unroll
      for (int box = 0; box < kAhead; ++box) {
        if (box < boxes) reader.Read(args, k0 / kBoxK + box, scales[box]);
      }
      wait(k0);
#pragma unroll 1  // unrolled whole, it would hold the scales of all boxes at once
      for (int base = 0; base < boxes; base += kAhead) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int box = base + i;
          if (box >= boxes) break;
          float part[kColumns][4] = {};
          MultiplyBox<kType>(weights + box * S::kBoxBytes, tokens + box * kBoxK, row, lane, kBoxK, part);
          AddScaled(part, scales[i], sums);
          if (box + kAhead < boxes) reader.Read(args, k0 / kBoxK + box + kAhead, scales[i]);
        }
      }
    });
  }

  if (row16 >= args.rows) return;
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = column * 8 + 2 * (lane & 3) + i;
      if (token >= tile.num_tokens) continue;
      const int slot = tile.first_slot + token;
      const int out_row = args.out_rows != nullptr ? args.out_rows[slot] : slot;
      __nv_bfloat16* out = args.out + out_row * args.out_stride;
      const float upper = sums[column][i];
      const float lower = sums[column][2 + i];
      if constexpr (kGateUp) {  // the box brought 8 gates, then their 8 ups
        const float silu = __fdividef(upper, 1.0f + __expf(-upper));
        out[row16 / 2 + lane / 4] = __float2bfloat16(silu * lower);
      } else {
        const float scale = args.slot_scale != nullptr ? args.slot_scale[slot] : 1.0f;
        out[row16 + lane / 4] = __float2bfloat16(scale * upper);
        out[row16 + lane / 4 + 8] = __float2bfloat16(scale * lower);
      }
    }
  }
}

template <ExpertType kType, int kWarps>
__device__ __forceinline__ void Produce(const Params& params, const CUtensorMap* map, Shared<kWarps>& shared,
                                        int lane) {
  using S = Shape<kWarps>;
  const GroupedGemmArgs& args = params.args;
  const uint64_t policy = ptx::PolicyEvictFirst();
  const int num_items = shared.prefix[args.num_experts] * params.row_tiles;
  int stage = 0;
  uint32_t phase = 0;
  for (int item = blockIdx.x; item < num_items; item += gridDim.x) {
    const ExpertTile tile = FindExpertTile<kTileTokens>(args.expert_offsets, args.num_experts, shared.prefix,
                                                        item / params.row_tiles);
    const int row_tile = item % params.row_tiles;
    const uint8_t* x = nullptr;
    if (lane < tile.num_tokens) {
      const int slot = tile.first_slot + lane;
      const int64_t row = args.x_rows != nullptr ? args.x_rows[slot] : slot;
      x = static_cast<const uint8_t*>(args.x) + row * args.x_stride * kElementBytes<kType>;
    }
    for (int k0 = 0; k0 < params.k_bytes; k0 += kStageK) {
      ptx::BarrierWait(ptx::SmemAddress(&shared.empty[stage]), phase ^ 1);
      const uint32_t full = ptx::SmemAddress(&shared.full[stage]);
      const int k_here = min(params.k_bytes - k0, kStageK);
      if (lane == 0) {
        const int boxes = (k_here + kBoxK - 1) / kBoxK;
        ptx::BarrierArriveExpect(full, boxes * S::kBoxBytes + tile.num_tokens * k_here);
        for (int box = 0; box < boxes; ++box) {
          ptx::TensorCopy5d(ptx::SmemAddress(shared.weights[stage]) + box * S::kBoxBytes, map,
                            (k0 + box * kBoxK) / kElementBytes<kType>, 0, 0, row_tile * (S::kRows / 16),
                            tile.expert, full, policy);
        }
      }
      __syncwarp();  // the expectation stands before any token's bytes can land
      if (lane < tile.num_tokens) {
        ptx::BulkCopy(ptx::SmemAddress(shared.tokens[stage]) + lane * kTokenPitch, x + k0, k_here, full);
      }
      if (++stage == S::kStages) {
        stage = 0;
        phase ^= 1;
      }
    }
  }
}

template <ExpertType kType, int kWarps, bool kGateUp>
__global__ void __launch_bounds__(Shape<kWarps>::kThreads, 1)
    GroupedGemmDecode(const Params params, const __grid_constant__ CUtensorMap map) {
  using S = Shape<kWarps>;
  extern __shared__ uint8_t raw[];
  auto& shared = *reinterpret_cast<Shared<kWarps>*>(raw + ((1024 - (ptx::SmemAddress(raw) & 1023)) & 1023));
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const GroupedGemmArgs& args = params.args;
  if (warp == kGroups * kWarps) {
    if (lane == 0) {
      ptx::TensorMapPrefetch(&map);
      for (int i = 0; i < S::kStages; ++i) {
        ptx::BarrierInit(ptx::SmemAddress(&shared.full[i]), 1);
        ptx::BarrierInit(ptx::SmemAddress(&shared.empty[i]), kWarps);
      }
      for (int i = 0; i < kGroups; ++i) ptx::BarrierInit(ptx::SmemAddress(&shared.turn[i]), kWarps);
      ptx::BarrierInitFence();
    }
    __syncwarp();
    ptx::WaitForEarlierLaunches();
    BuildExpertTiles<kTileTokens>(args.expert_offsets, args.num_experts, lane, shared.prefix);
  }
  ptx::WaitForEarlierLaunches();
  ptx::LetNextLaunchBegin();
  __syncthreads();  // barriers and tile list are ready
  if (warp == kGroups * kWarps) {
    Produce<kType, kWarps>(params, &map, shared, lane);
    return;
  }
  const int num_items = shared.prefix[args.num_experts] * params.row_tiles;
  const int first = warp / kWarps;
  for (int ordinal = first; static_cast<int>(blockIdx.x + ordinal * gridDim.x) < num_items;
       ordinal += kGroups) {
    const int item = blockIdx.x + ordinal * gridDim.x;
    const ExpertTile tile = FindExpertTile<kTileTokens>(args.expert_offsets, args.num_experts, shared.prefix,
                                                        item / params.row_tiles);
    const int row_tile = item % params.row_tiles;
    switch ((tile.num_tokens + 7) / 8) {
      case 1:
        ConsumeTile<kType, kWarps, kGateUp, 1>(params, shared, tile, row_tile, ordinal, warp % kWarps, lane);
        break;
      case 2:
        ConsumeTile<kType, kWarps, kGateUp, 2>(params, shared, tile, row_tile, ordinal, warp % kWarps, lane);
        break;
      default:
        ConsumeTile<kType, kWarps, kGateUp, 4>(params, shared, tile, row_tile, ordinal, warp % kWarps, lane);
    }
  }
}

template <ExpertType kType, int kWarps, bool kGateUp>
cudaError_t Launch(const GroupedGemmArgs& args, int num_sms, cudaStream_t stream) {
  using S = Shape<kWarps>;
  constexpr int kBytes = sizeof(Shared<kWarps>) + 1024;
  auto kernel = GroupedGemmDecode<kType, kWarps, kGateUp>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  CUtensorMap map;
  error = EncodeExpertWeights(args.weights, kElementBytes<kType>, args.num_experts, args.rows, args.k,
                              S::kRows, kGateUp, &map);
  if (error != cudaSuccess) return error;
  const Params params = {args, (args.rows + S::kRows - 1) / S::kRows, args.k * kElementBytes<kType>};
  return LaunchOverlapped(kernel, num_sms, S::kThreads, kBytes, stream, params, map);
}

template <ExpertType kType>
cudaError_t LaunchTyped(const GroupedGemmArgs& args, int num_sms, cudaStream_t stream) {
  const bool gate_up = args.matrix == ExpertMatrix::kGateUp;
  // Few tiles: halve them, so that the last wave leaves fewer multiprocessors idle. Results do not change.
  const int tiles_max = (args.num_slots_max < args.num_experts ? args.num_slots_max : args.num_experts) *
                        ((args.rows + 63) / 64);
  if (tiles_max < 8 * num_sms) {
    return gate_up ? Launch<kType, 2, true>(args, num_sms, stream)
                   : Launch<kType, 2, false>(args, num_sms, stream);
  }
  return gate_up ? Launch<kType, 4, true>(args, num_sms, stream)
                 : Launch<kType, 4, false>(args, num_sms, stream);
}

}  // namespace

cudaError_t LaunchGroupedGemmDecode(const GroupedGemmArgs& args, cudaStream_t stream) {
  if (!ValidGroupedGemm(args)) return cudaErrorInvalidValue;
  int device = 0;
  int num_sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  return args.type == ExpertType::kBf16 ? LaunchTyped<ExpertType::kBf16>(args, num_sms, stream)
                                        : LaunchTyped<ExpertType::kE4m3>(args, num_sms, stream);
}

}  // namespace millrace::engine::cuda
