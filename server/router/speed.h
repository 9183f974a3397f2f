#pragma once
// How far to believe a measured speed. Pure.

#include <cstdint>
#include <vector>

#include "base/clock.h"

namespace millrace::server {

// A rate or a time per thing, as a worker measured it on itself.
struct Measured {
  double value = 0;            // 0 = not measured yet
  uint64_t samples = 0;        // measurements that went into it
  Duration age = Duration(0);  // since the last of them
};

// Half of what speaks for a measurement is gone after so long without a new one, and it takes this many
// samples until a value counts for half.
inline constexpr Duration kBeliefHalfLife = std::chrono::seconds(5);
inline constexpr double kBeliefSamples = 4;

// The measured value, drawn towards the median of what the peers say as far as it rests on few samples or on
// old ones: one bad measurement cannot starve a worker of the work that would correct it, nor can a bad time
// that is over. The median when nothing was measured, the value when there is no median (0).
double Believed(const Measured& own, double median);

// The medians of what the others say, for each of many.
class Medians {
 public:
  explicit Medians(std::vector<double> values);  // 0 = not measured: left out
  // Without one value that equals `own`; 0 when there is none left. The lower of the middle two.
  double Without(double own) const;

 private:
  std::vector<double> sorted_;
};

}  // namespace millrace::server
