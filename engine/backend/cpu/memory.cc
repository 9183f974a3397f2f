#include "engine/backend/cpu/memory.h"

#include <sys/mman.h>

namespace millrace::engine {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

}  // namespace

StatusOr<HugeMemory> HugeMemory::Allocate(size_t bytes, const char* what) {
  if (bytes == 0) return HugeMemory();
  // Room to begin on a huge page: a mapping that does not would get none at its ends.
  const size_t mapped = bytes < kHugePage ? bytes : bytes + kHugePage;
  void* const address = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) return ResourceExhausted("{}: cannot allocate {} bytes", what, bytes);
  auto* const begin = static_cast<std::byte*>(address);
  size_t skip = 0;
  if (mapped != bytes) skip = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  madvise(begin + skip, bytes, MADV_HUGEPAGE);  // a wish: works without
  return HugeMemory({begin + skip, bytes}, {begin, mapped});
}

HugeMemory::~HugeMemory() {
  if (!mapping_.empty()) munmap(mapping_.data(), mapping_.size());
}

}  // namespace millrace::engine
