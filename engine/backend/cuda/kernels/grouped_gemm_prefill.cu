// Prefill: wgmma with 256 weight rows by up to 128 (e4m3: 96) tokens per tile; weight rows fill every tile,
// so only the token side is ragged, and it is rounded up to 32. Persistent CTAs of three warpgroups: one
// loads (weights by tensor copies; token rows, gathered by index, by 16-byte asynchronous copies into the
// same swizzle), two multiply 128 rows each. SwiGLU or the router weight is applied to the sums in registers,
// which then pass through shared memory once to leave as full lines.

#include "engine/backend/cuda/kernels/expert_tiles.cuh"
#include "engine/backend/cuda/kernels/grouped_gemm.h"
#include "engine/backend/cuda/kernels/ptx.cuh"
#include "engine/backend/cuda/kernels/tensor_map.h"
#include "engine/backend/cuda/kernels/wgmma.cuh"

namespace millrace::engine::cuda {
namespace {

constexpr int kTileRows = 256;
constexpr int kStageK = 128;  // bytes of k: one swizzle row; of e4m3, one block of scales
constexpr int kStages = 4;
constexpr int kLag =
    1;  // stages of token copies under way while the next is asked for; must stay below kStages - 1
constexpr int kWeightBytes = kTileRows * 128;

constexpr int kConsumers = 2;  // warpgroups
constexpr int kRowsPerConsumer = kTileRows / kConsumers;
constexpr int kThreads = 128 * (1 + kConsumers);

template <ExpertType kType>
constexpr int kElementBytes = kType == ExpertType::kBf16 ? 2 : 1;
// e4m3 keeps a second set of sums for the block of k under way: fewer tokens fit into the registers.
template <ExpertType kType>
constexpr int kTileTokens = kType == ExpertType::kBf16 ? 128 : 96;

// Tiles first: the swizzle needs 1024-byte alignment.
template <ExpertType kType>
struct alignas(1024) Shared {
  uint8_t weights[kStages][kWeightBytes];
  uint8_t tokens[kStages][kTileTokens<kType> * 128];
  uint8_t out[kConsumers]
             [kTileTokens<kType> * 128];  // [token][64 outputs] bf16, chunks swizzled by token % 8
  float slot_scales[kConsumers][kTileTokens<kType>];  // of the consumer's tile
  // e4m3: of the stage's block of k.
  float x_scales[kType == ExpertType::kE4m3 ? kStages : 1]
                [kType == ExpertType::kE4m3 ? kTileTokens<kType> : 1];

  uint64_t full[kStages];   // 1 + 128 producer arrivals and the weights' bytes
  uint64_t empty[kStages];  // every consumer warp has finished reading
  int32_t prefix[kGroupedGemmExpertsMax + 1];
};
static_assert(sizeof(Shared<ExpertType::kBf16>) <= 232448 && sizeof(Shared<ExpertType::kE4m3>) <= 232448);

struct Params {
  GroupedGemmArgs args;
  int row_tiles;
  int k_bytes;  // of a row of weights or of x
};

struct Stage {
  int index = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void Advance() {
    if (++index == kStages) {
      index = 0;
      phase ^= 1;
    }
  }
};

__device__ __forceinline__ int64_t InputRow(const GroupedGemmArgs& args, int slot) {
  return args.x_rows != nullptr ? __ldg(args.x_rows + slot) : slot;
}

template <ExpertType kType>
__device__ __forceinline__ void Produce(const Params& params, const CUtensorMap* map, Shared<kType>& shared,
                                        int thread) {
  const GroupedGemmArgs& args = params.args;
  const uint64_t policy = ptx::PolicyEvictNormal();
  const uint8_t* x = static_cast<const uint8_t*>(args.x);
  const int num_items = shared.prefix[args.num_experts] * params.row_tiles;
  constexpr int kRowsPerThread =
      kTileTokens<kType> / 16;  // thread: 16-byte chunk thread % 8 of rows thread / 8 + 16 i
  const int chunk = thread % 8;
  const uint32_t target = (thread / 8) * 128 + ((chunk ^ (thread / 8 % 8)) << 4);
  Stage stage;
  int issued = 0;  // stages; the last kLag of them are not announced yet

  for (int item = blockIdx.x; item < num_items; item += gridDim.x) {
    const ExpertTile tile = FindExpertTile<kTileTokens<kType>>(args.expert_offsets, args.num_experts,
                                                               shared.prefix, item / params.row_tiles);
    const int row_tile = item % params.row_tiles;
    int64_t source[kRowsPerThread];  // byte offset of the row's chunk; -1: no such token

#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const int token = thread / 8 + 16 * i;
      source[i] = -1;
      if (token < tile.num_tokens) {
        const int slot = tile.first_slot + token;
        source[i] = InputRow(args, slot) * args.x_stride * kElementBytes<kType> + chunk * 16;
      }
    }
    const float* x_scales = nullptr;  // of the token that this thread brings the scales of
    if (kType == ExpertType::kE4m3 && thread < tile.num_tokens) {
      x_scales = args.x_scales + InputRow(args, tile.first_slot + thread) * args.x_scales_stride;
    }
    for (int k0 = 0; k0 < params.k_bytes; k0 += kStageK) {
      ptx::BarrierWait(ptx::SmemAddress(&shared.empty[stage.index]), stage.phase ^ 1);
      if (thread == 0) {
        const uint32_t full = ptx::SmemAddress(&shared.full[stage.index]);
        ptx::BarrierArriveExpect(full, kWeightBytes);
        ptx::TensorCopy5d(ptx::SmemAddress(shared.weights[stage.index]), map, k0 / kElementBytes<kType>, 0, 0,
                          row_tile * (kTileRows / 16), tile.expert, full, policy);
      }
      const uint32_t tokens = ptx::SmemAddress(shared.tokens[stage.index]) + target;
      const bool inside =
          k0 + chunk * 16 < params.k_bytes;  // beyond the end of k the weights are zero: so must x be
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i) {
        if (source[i] >= 0) {
          ptx::CopyAsync16(tokens + i * 16 * 128, inside ? x + source[i] + k0 : x, inside);
        }
      }
      if (x_scales != nullptr) {
        ptx::CopyAsync4(ptx::SmemAddress(&shared.x_scales[stage.index][thread]), x_scales + k0 / kStageK);
      }
      ptx::CopyAsyncCommit();
      if (issued >= kLag) {
        ptx::CopyAsyncWait<kLag>();
        ptx::FenceAsyncProxy();  // wgmma reads what these ordinary copies wrote
        ptx::BarrierArrive(ptx::SmemAddress(&shared.full[(issued - kLag) % kStages]));
      }
      ++issued;
      stage.Advance();
    }
  }
  ptx::CopyAsyncWait<0>();
  ptx::FenceAsyncProxy();
  for (int i = max(issued - kLag, 0); i < issued; ++i) {
    ptx::BarrierArrive(ptx::SmemAddress(&shared.full[i % kStages]));
  }
}

// 16-byte chunk `chunk` of token row `token` of a consumer's output tile.
__device__ __forceinline__ uint32_t OutAddress(uint32_t base, int token, int chunk) {
  return base + token * 128 + ((chunk ^ (token & 7)) << 4);
}

// Copies the staged [kColumns tokens][64 outputs] to global rows, from output `first` on; `count` of them
// exist. Warp w writes tokens 32 w .. 32 w + 31; lane l brings the output row of token 32 w + l.
template <int kColumns>
__device__ __forceinline__ void WriteOut(const GroupedGemmArgs& args, int num_tokens, uint32_t staged,
                                         int warp, int lane, int64_t out_row, int first, int count) {
  if (warp * 32 >= kColumns) return;
  const int chunk = lane % 8;
#pragma unroll
  for (int i = 0; i < 32; i += 4) {
    const int token = warp * 32 + i + lane / 8;
    const int64_t row = __shfl_sync(0xffffffffu, out_row, i + lane / 8);
    if (token >= num_tokens || chunk * 8 >= count) continue;
    const uint4 value = ptx::LoadShared16(OutAddress(staged, token, chunk));
    *reinterpret_cast<uint4*>(args.out + row * args.out_stride + first + chunk * 8) = value;
  }
}

__device__ __forceinline__ float SiluTimes(float gate, float up) {
  return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

constexpr int kBlocks = kRowsPerConsumer / 64;  // of 64 weight rows, one wgmma each

// sums += weights x tokens over all of k, in the tensor cores' own sums.
template <int kColumns>
__device__ __forceinline__ void MultiplyBf16(const Params& params, Shared<ExpertType::kBf16>& shared,
                                             int group, int thread, Stage& stage,
                                             float (&sums)[kBlocks][kColumns / 2]) {
  int previous = -1;
  for (int k0 = 0; k0 < params.k_bytes; k0 += kStageK) {
    ptx::BarrierWait(ptx::SmemAddress(&shared.full[stage.index]), stage.phase);
    const uint64_t a = ptx::WgmmaDescriptor(
        ptx::SmemAddress(shared.weights[stage.index]) + group * kRowsPerConsumer * 128, 16, 1024);
    const uint64_t b = ptx::WgmmaDescriptor(ptx::SmemAddress(shared.tokens[stage.index]), 16, 1024);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) ptx::FenceOperands(sums[block]);
    ptx::WgmmaFence();
#pragma unroll
    for (int step = 0; step < kStageK / 32; ++step) {
#pragma unroll
      for (int block = 0; block < kBlocks;
           ++block) {  // +32 bytes per step, +64 rows per block, in 16-byte units
        ptx::Wgmma<kColumns>::Bf16(sums[block], a + block * 512 + step * 2, b + step * 2, true);
      }
    }
    ptx::WgmmaCommit();
    if (previous >= 0) {
      ptx::WgmmaWait<1>();
      if (thread % 32 == 0) ptx::BarrierArrive(ptx::SmemAddress(&shared.empty[previous]));
    }
    previous = stage.index;
    stage.Advance();
  }
  ptx::WgmmaWait<0>();
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) ptx::FenceOperands(sums[block]);
  if (thread % 32 == 0) ptx::BarrierArrive(ptx::SmemAddress(&shared.empty[previous]));
}

// The same for e4m3: each stage is one block of scales, summed by itself, then scaled and added in fp32.
template <bool kGateUp, int kColumns>
__device__ __forceinline__ void MultiplyE4m3(const Params& params, Shared<ExpertType::kE4m3>& shared,
                                             const ExpertTile& tile, int row0, int group, int thread,
                                             Stage& stage, float (&sums)[kBlocks][kColumns / 2]) {
  const GroupedGemmArgs& args = params.args;
  const int k_blocks = args.k / kScaleBlock;
  const int row_blocks = args.rows / kScaleBlock;  // of an expert, gates and ups together
  // The 128 rows of this warpgroup lie in one block of rows (of gates and of ups, if interleaved).
  const int row_block =
      min(kGateUp ? row0 / 2 : row0, (kGateUp ? args.rows / 2 : args.rows) - 1) / kScaleBlock;
  const float* upper =
      args.weight_scales + (static_cast<int64_t>(tile.expert) * row_blocks + row_block) * k_blocks;
  const float* lower = kGateUp ? upper + row_blocks / 2 * k_blocks : upper;
  const int column = 2 * (thread & 3);
  for (int k_block = 0; k_block < k_blocks; ++k_block) {
    const float upper_scale = __ldg(upper + k_block);  // asked for before the wait, which hides them
    const float lower_scale = __ldg(lower + k_block);
    ptx::BarrierWait(ptx::SmemAddress(&shared.full[stage.index]), stage.phase);
    const uint64_t a = ptx::WgmmaDescriptor(
        ptx::SmemAddress(shared.weights[stage.index]) + group * kRowsPerConsumer * 128, 16, 1024);
    const uint64_t b = ptx::WgmmaDescriptor(ptx::SmemAddress(shared.tokens[stage.index]), 16, 1024);
    const float* x_scales = shared.x_scales[stage.index];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      float part[kColumns / 2] = {};
      ptx::FenceOperands(part);
      ptx::WgmmaFence();
#pragma unroll
      for (int step = 0; step < kStageK / 32; ++step) {
        ptx::Wgmma<kColumns>::E4m3(part, a + block * 512 + step * 2, b + step * 2, true);
      }
      ptx::WgmmaCommit();
      ptx::WgmmaWait<0>();
      ptx::FenceOperands(part);
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        const float2 token = *reinterpret_cast<const float2*>(x_scales + j * 8 + column);
        sums[block][4 * j] = fmaf(part[4 * j], upper_scale * token.x, sums[block][4 * j]);
        sums[block][4 * j + 1] = fmaf(part[4 * j + 1], upper_scale * token.y, sums[block][4 * j + 1]);
        sums[block][4 * j + 2] = fmaf(part[4 * j + 2], lower_scale * token.x, sums[block][4 * j + 2]);
        sums[block][4 * j + 3] = fmaf(part[4 * j + 3], lower_scale * token.y, sums[block][4 * j + 3]);
      }
    }
    __syncwarp();  // every lane has read the scales
    if (thread % 32 == 0) ptx::BarrierArrive(ptx::SmemAddress(&shared.empty[stage.index]));
    stage.Advance();
  }
}

// A tile of one consumer warpgroup: 128 weight rows by kColumns tokens.
template <ExpertType kType, bool kGateUp, int kColumns>
__device__ __forceinline__ void ConsumeTile(const Params& params, Shared<kType>& shared,
                                            const ExpertTile& tile, int row_tile, int group, int thread,
                                            Stage& stage) {
  const GroupedGemmArgs& args = params.args;
  const int row0 = row_tile * kTileRows + group * kRowsPerConsumer;
  // Thread t looks up what belongs to token t now: the loads pass while the tensor cores work.
  int64_t out_row = 0;
  float slot_scale = 1.0f;
  if (thread < tile.num_tokens) {
    const int slot = tile.first_slot + thread;
    out_row = args.out_rows != nullptr ? __ldg(args.out_rows + slot) : slot;
    if (!kGateUp && args.slot_scale != nullptr) slot_scale = __ldg(args.slot_scale + slot);
  }
  float sums[kBlocks][kColumns / 2] = {};  // zeroed: left undefined, ptxas keeps all widths live at once
  if constexpr (kType == ExpertType::kBf16) {
    MultiplyBf16<kColumns>(params, shared, group, thread, stage, sums);
  } else {
    MultiplyE4m3<kGateUp, kColumns>(params, shared, tile, row0, group, thread, stage, sums);
  }

  const int warp = thread / 32;
  const int lane = thread % 32;
  const int barrier = 1 + group;
  const uint32_t staged = ptx::SmemAddress(shared.out[group]);
  if constexpr (kGateUp) {
    // 32 outputs per block of 64 rows: chunk (4 block + warp) holds this warp's 8.
    ptx::NamedBarrierSync(barrier, 128);  // the previous tile has left `staged`
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int j = 0; j < kColumns / 8; j += 4) {
        uint32_t packed[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* d = sums[block] + (j + i) * 4;  // 8 gates, then their 8 ups
          packed[i] = ptx::PackBf16(SiluTimes(d[0], d[2]), SiluTimes(d[1], d[3]));
        }
        ptx::StoreMatrix4Transposed(OutAddress(staged, j * 8 + lane, block * 4 + warp), packed[0], packed[1],
                                    packed[2], packed[3]);
      }
    }
    ptx::NamedBarrierSync(barrier, 128);  // `staged` is whole
    WriteOut<kColumns>(args, tile.num_tokens, staged, warp, lane, out_row, row0 / 2, (args.rows - row0) / 2);
  } else {
    // The previous tile's scales have been read: its last barrier came after.
    if (thread < kColumns) shared.slot_scales[group][thread] = slot_scale;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      ptx::NamedBarrierSync(barrier,
                            128);  // the previous block or tile has left `staged`; the scales are there

#pragma unroll
      for (int j = 0; j < kColumns / 8; j += 2) {
        uint32_t packed[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float* d = sums[block] + (j + i) * 4;
          const float2 scale =
              *reinterpret_cast<const float2*>(&shared.slot_scales[group][(j + i) * 8 + 2 * (lane & 3)]);
          packed[2 * i] = ptx::PackBf16(d[0] * scale.x, d[1] * scale.y);
          packed[2 * i + 1] = ptx::PackBf16(d[2] * scale.x, d[3] * scale.y);
        }
        // Fragments: tokens j..j+7 rows 0-7, the same rows 8-15, tokens j+8.. rows 0-7, rows 8-15.
        const int token = (j + lane / 16) * 8 + lane % 8;
        ptx::StoreMatrix4Transposed(OutAddress(staged, token, warp * 2 + lane / 8 % 2), packed[0], packed[1],
                                    packed[2], packed[3]);
      }
      ptx::NamedBarrierSync(barrier, 128);  // `staged` is whole
      WriteOut<kColumns>(args, tile.num_tokens, staged, warp, lane, out_row, row0 + block * 64,
                         args.rows - row0 - block * 64);
    }
  }
}

template <ExpertType kType, bool kGateUp>
__global__ void __launch_bounds__(kThreads, 1)
    GroupedGemmPrefill(const Params params, const __grid_constant__ CUtensorMap map) {
  extern __shared__ uint8_t raw[];
  auto& shared = *reinterpret_cast<Shared<kType>*>(raw);  // aligned: no static shared memory lies before it

  const GroupedGemmArgs& args = params.args;
  if (threadIdx.x < 32) {
    if (threadIdx.x == 0) {
      ptx::TensorMapPrefetch(&map);
      for (int i = 0; i < kStages; ++i) {
        ptx::BarrierInit(ptx::SmemAddress(&shared.full[i]), 1 + 128);
        ptx::BarrierInit(ptx::SmemAddress(&shared.empty[i]), 4 * kConsumers);
      }
      ptx::BarrierInitFence();
    }
    __syncwarp();
    BuildExpertTiles<kTileTokens<kType>>(args.expert_offsets, args.num_experts, threadIdx.x, shared.prefix);
  }
  __syncthreads();  // barriers and tile list are ready

  const int warpgroup = threadIdx.x / 128;
  const int thread = threadIdx.x % 128;
  if (warpgroup == 0) {
    ptx::RegistersDecrease<40>();
    Produce<kType>(params, &map, shared, thread);
  } else {
    ptx::RegistersIncrease<232>();
    const int num_items = shared.prefix[args.num_experts] * params.row_tiles;
    Stage stage;
    for (int item = blockIdx.x; item < num_items; item += gridDim.x) {
      const ExpertTile tile = FindExpertTile<kTileTokens<kType>>(args.expert_offsets, args.num_experts,
                                                                 shared.prefix, item / params.row_tiles);
      const int row_tile = item % params.row_tiles;
      const int group = warpgroup - 1;
      switch ((tile.num_tokens + 31) / 32) {
        case 1:
          ConsumeTile<kType, kGateUp, 32>(params, shared, tile, row_tile, group, thread, stage);
          break;
        case 2:
          ConsumeTile<kType, kGateUp, 64>(params, shared, tile, row_tile, group, thread, stage);
          break;
        case 3:
          ConsumeTile<kType, kGateUp, 96>(params, shared, tile, row_tile, group, thread, stage);
          break;
        default:
          if constexpr (kType == ExpertType::kBf16) {
            ConsumeTile<kType, kGateUp, 128>(params, shared, tile, row_tile, group, thread, stage);
          }
      }
    }
  }
}

template <ExpertType kType, bool kGateUp>
cudaError_t Launch(const GroupedGemmArgs& args, int num_sms, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<kType>);

  auto kernel = GroupedGemmPrefill<kType, kGateUp>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  CUtensorMap map;
  error = EncodeExpertWeights(args.weights, kElementBytes<kType>, args.num_experts, args.rows, args.k,
                              kTileRows, kGateUp, &map);
  if (error != cudaSuccess) return error;
  const Params params = {args, (args.rows + kTileRows - 1) / kTileRows, args.k * kElementBytes<kType>};
  kernel<<<num_sms, kThreads, kBytes, stream>>>(params, map);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchGroupedGemmPrefill(const GroupedGemmArgs& args, cudaStream_t stream) {
  if (!ValidGroupedGemm(args)) return cudaErrorInvalidValue;

  int device = 0;
  int num_sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const bool gate_up = args.matrix == ExpertMatrix::kGateUp;
  if (args.type == ExpertType::kBf16) {
    return gate_up ? Launch<ExpertType::kBf16, true>(args, num_sms, stream)
                   : Launch<ExpertType::kBf16, false>(args, num_sms, stream);
  }
  return gate_up ? Launch<ExpertType::kE4m3, true>(args, num_sms, stream)
                 : Launch<ExpertType::kE4m3, false>(args, num_sms, stream);
}

}  // namespace millrace::engine::cuda
