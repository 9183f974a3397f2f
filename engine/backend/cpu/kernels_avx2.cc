#define MILLRACE_KERNEL_NAMESPACE kernels_avx2
#include "engine/backend/cpu/kernels_impl.h"

namespace millrace::engine {

const KernelTable& Avx2Kernels() {
  static constexpr KernelTable table = kernels_avx2::MakeTable("avx2");
  return table;
}

}  // namespace millrace::engine
