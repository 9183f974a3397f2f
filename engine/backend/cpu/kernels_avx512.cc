#define MILLRACE_KERNEL_NAMESPACE kernels_avx512
namespace millrace::engine::kernels_avx512 {
// What the registers hold: strips x tokens of sums in a product, queries x vectors of 16 keys in attention.
constexpr int kTileStrips = 2;
constexpr int kTileTokens = 12;
constexpr int kAttendQueries = 6;
constexpr int kAttendVectors = 4;
constexpr bool kTransposeInRegisters = true;
}  // namespace millrace::engine::kernels_avx512

#include <immintrin.h>

#include "engine/backend/cpu/vector.h"

namespace millrace::engine::kernels_avx512 {
// GCC 12 makes six instructions of the plain form, in load_bf16.h.
MILLRACE_INLINE V16 Load(const uint16_t* p) {
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return Bits<V16>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}
}  // namespace millrace::engine::kernels_avx512

// Wants Load of bf16.
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
