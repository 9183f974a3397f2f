#pragma once
// What this machine can do at best, measured now: what a benchmark's figures are a share of.

namespace millrace::bench {

struct MachineLimits {
  double read_gb_per_s = 0;     // memory, several streams per thread, 2 MiB pages
  double int8_gop_per_s = 0;    // vpdpbusd; 0 without AVX-512 VNNI
  double fp32_gflop_per_s = 0;  // 512-bit FMA, else 256-bit
};

// Best of a few short runs on `threads` threads; takes about a third of a second.
MachineLimits MeasureLimits(int threads);

}  // namespace millrace::bench
