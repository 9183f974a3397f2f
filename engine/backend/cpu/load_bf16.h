#pragma once
// 16 bf16 numbers widened, in the compiler's own vector types. Included after vector.h by the sets for which
// the compiler finds the right instructions.

#include "engine/backend/cpu/vector.h"

namespace millrace::engine::MILLRACE_KERNEL_NAMESPACE {

MILLRACE_INLINE V16 Load(const uint16_t* p) {
  U16x16 narrow;
  std::memcpy(&narrow, p, sizeof(narrow));
  return Bits<V16>(__builtin_convertvector(narrow, U16x32) << 16);
}

}  // namespace millrace::engine::MILLRACE_KERNEL_NAMESPACE
