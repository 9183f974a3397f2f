#define MILLRACE_KERNEL_NAMESPACE kernels_avx2
namespace millrace::engine::kernels_avx2 {
// What the registers hold: strips x tokens of sums in a product, queries x vectors of 16 keys in attention.
constexpr int kTileStrips = 1;
constexpr int kTileTokens = 4;
constexpr int kAttendQueries = 2;
constexpr int kAttendVectors = 2;
constexpr bool kTransposeInRegisters = false;
}  // namespace millrace::engine::kernels_avx2

#include "engine/backend/cpu/load_bf16.h"

// Wants Load of bf16.
#include "engine/backend/cpu/gemm_int.h"
#include "engine/backend/cpu/kernels_impl.h"
#include "engine/backend/cpu/pack_group.h"

namespace millrace::engine {

const KernelTable& Avx2Kernels() {
  static constexpr KernelTable table =
      kernels_avx2::MakeTable("avx2", GemmInt8Avx2, GemmInt4Avx2, PackInt8Avx2, PackInt4Avx2);
  return table;
}

}  // namespace millrace::engine
