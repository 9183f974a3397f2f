#define MILLRACE_KERNEL_NAMESPACE kernels_avx512
namespace millrace::engine::kernels_avx512 {
// What the registers hold: strips x tokens of sums in a product, queries x vectors of 16 keys in attention.
constexpr int kTileStrips = 2;
constexpr int kTileTokens = 12;
constexpr int kAttendQueries = 6;
constexpr int kAttendVectors = 4;
constexpr bool kTransposeInRegisters = true;
}  // namespace millrace::engine::kernels_avx512

#include "engine/backend/cpu/gemm_int.h"
#include "engine/backend/cpu/kernels_impl.h"
#include "engine/backend/cpu/pack_group.h"

namespace millrace::engine {

const KernelTable& Avx512Kernels() {
  static constexpr KernelTable table =
      kernels_avx512::MakeTable("avx512", GemmInt8Avx512, GemmInt4Avx512, PackInt8Avx512, PackInt4Avx512);
  return table;
}

}  // namespace millrace::engine
