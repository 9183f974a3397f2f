#define MILLRACE_KERNEL_NAMESPACE kernels_avx512
#include "engine/backend/cpu/kernels_impl.h"

namespace millrace::engine {

const KernelTable& Avx512Kernels() {
  static constexpr KernelTable table = kernels_avx512::MakeTable("avx512");
  return table;
}

}  // namespace millrace::engine
