#pragma once
// Randomness: a counter-based generator for sampling (pure function of key and counter) and ids for the
// process.

#include <cstdint>
#include <string>

namespace millrace {

// splitmix64's finaliser (Steele, Lea, Flood 2014): a bijective mix of 64 bits.
constexpr uint64_t Mix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

// Uniform in [0, 1) with 53 bits, a pure function of (seed, counter): the same on every host and in every
// batch.
constexpr double UniformAt(uint64_t seed, uint64_t counter) {
  return static_cast<double>(Mix64(Mix64(seed) ^ Mix64(counter * 0xd1342543de82ef95ULL + 1)) >> 11) *
         0x1.0p-53;
}

// A small sequential generator for tests, jitter and shuffles. Not thread-safe. Not for secrets.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Next() { return Mix64(state_++); }
  uint64_t Below(uint64_t bound) { return Next() % bound; }  // bound > 0; bias below 2^-32 for small bounds
  double Uniform() { return static_cast<double>(Next() >> 11) * 0x1.0p-53; }

 private:
  uint64_t state_;
};

// 64 bits from the operating system's generator, never 0. Any thread. For ids, epochs and default seeds.
uint64_t RandomId();

// "prefix" + 24 characters of [0-9a-z], from RandomId.
std::string RandomName(const char* prefix);

}  // namespace millrace
