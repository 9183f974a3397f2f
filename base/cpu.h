#pragma once
// What this processor can do, by cpuid. Kernels are chosen from it once, at start.

#include <string>

namespace millrace {

struct CpuFeatures {
  bool avx2_fma = false;     // AVX2 + FMA3 + F16C, and the OS saves ymm
  bool avx512 = false;       // AVX-512 F, BW, VL, DQ, and the OS saves zmm
  bool avx512_vnni = false;  // avx512 and VNNI
  bool amx_int8 = false;     // AMX tiles with int8; the kernel's permission is not asked for here
  std::string model_name;    // as the processor says it
};

const CpuFeatures& GetCpuFeatures();  // read once; any thread

// Processors that this process may run on (its affinity mask), at least 1.
int UsableCpuCount();

}  // namespace millrace
