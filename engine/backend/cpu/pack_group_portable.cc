#define MILLRACE_KERNEL_NAMESPACE pack_portable
#include "engine/backend/cpu/pack_group.h"
#include "engine/backend/cpu/pack_group_impl.h"

namespace millrace::engine {

void PackInt8Portable(const float* const* rows, char* codes, uint16_t* scales) {
  pack_portable::PackInt8(rows, codes, scales);
}
void PackInt4Portable(const float* const* rows, char* codes, uint16_t* scales) {
  pack_portable::PackInt4(rows, codes, scales);
}

}  // namespace millrace::engine
