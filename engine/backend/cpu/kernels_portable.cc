#define MILLRACE_KERNEL_NAMESPACE kernels_portable
namespace millrace::engine::kernels_portable {
// What the registers hold: strips x tokens of sums in a product, queries x vectors of 16 keys in attention.
constexpr int kTileStrips = 1;
constexpr int kTileTokens = 2;
constexpr int kAttendQueries = 2;
constexpr int kAttendVectors = 2;
constexpr bool kTransposeInRegisters = false;
}  // namespace millrace::engine::kernels_portable

#include "engine/backend/cpu/load_bf16.h"

// Wants Load of bf16.
#include "engine/backend/cpu/gemm_int.h"
#include "engine/backend/cpu/kernels_impl.h"
#include "engine/backend/cpu/pack_group.h"

namespace millrace::engine {

const KernelTable& PortableKernels() {
  static constexpr KernelTable table = kernels_portable::MakeTable(
      "portable", GemmInt8Portable, GemmInt4Portable, PackInt8Portable, PackInt4Portable);
  return table;
}

}  // namespace millrace::engine
