#define MILLRACE_KERNEL_NAMESPACE pack_avx2
#include "engine/backend/cpu/pack_group.h"
#include "engine/backend/cpu/pack_group_impl.h"

namespace millrace::engine {

void PackInt8Avx2(const float* const* rows, char* codes, uint16_t* scales) {
  pack_avx2::PackInt8(rows, codes, scales);
}
void PackInt4Avx2(const float* const* rows, char* codes, uint16_t* scales) {
  pack_avx2::PackInt4(rows, codes, scales);
}

}  // namespace millrace::engine
