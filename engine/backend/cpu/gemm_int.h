#pragma once
// The integer matrix products, one file per instruction set.

#include "engine/backend/cpu/kernels.h"

namespace millrace::engine {

void GemmInt8Portable(const GemmArgs& args);
void GemmInt4Portable(const GemmArgs& args);
void GemmInt8Avx2(const GemmArgs& args);
void GemmInt4Avx2(const GemmArgs& args);
void GemmInt8Avx512(const GemmArgs& args);
void GemmInt4Avx512(const GemmArgs& args);

}  // namespace millrace::engine
