#define MILLRACE_KERNEL_NAMESPACE kernels_portable
#include "engine/backend/cpu/kernels_impl.h"

namespace millrace::engine {

const KernelTable& PortableKernels() {
  static constexpr KernelTable table = kernels_portable::MakeTable("portable");
  return table;
}

}  // namespace millrace::engine
