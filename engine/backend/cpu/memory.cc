#include "engine/backend/cpu/memory.h"

#include <sys/mman.h>

namespace millrace::engine {

StatusOr<HugeMemory> HugeMemory::Allocate(size_t bytes, const char* what) {
  if (bytes == 0) return HugeMemory();
  void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) return ResourceExhausted("{}: cannot allocate {} bytes", what, bytes);
  madvise(address, bytes, MADV_HUGEPAGE);  // a wish: works without
  return HugeMemory({static_cast<std::byte*>(address), bytes});
}

HugeMemory::~HugeMemory() {
  if (!bytes_.empty()) munmap(bytes_.data(), bytes_.size());
}

}  // namespace millrace::engine
