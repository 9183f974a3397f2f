#pragma once
// From 16 rows of 64 fp32 weights to a group of an integer strip (kernels.h has the layout), one file per
// instruction set. All give the same bytes.

#include <cstdint>

namespace millrace::engine {

// rows[r]: the 64 values of row r. Writes 1024 or 512 bytes of codes and the 16 bf16 scales.
void PackInt8Portable(const float* const* rows, char* codes, uint16_t* scales);
void PackInt4Portable(const float* const* rows, char* codes, uint16_t* scales);
void PackInt8Avx2(const float* const* rows, char* codes, uint16_t* scales);
void PackInt4Avx2(const float* const* rows, char* codes, uint16_t* scales);
void PackInt8Avx512(const float* const* rows, char* codes, uint16_t* scales);
void PackInt4Avx512(const float* const* rows, char* codes, uint16_t* scales);

}  // namespace millrace::engine
