#pragma once
// Whether drafts pay: measured, per number of sequences that decode.

#include <array>
#include <cstdint>

#include "base/clock.h"

namespace millrace::engine {

// Engine thread only. Answers do not depend on what it says.
class SpeculationGauge {
 public:
  // Whether the next step should verify drafts and make new ones. Tries both ways for a while, then takes the
  // one that makes more tokens per second, and looks at the other again now and then: each time that this
  // changes nothing, it waits twice as long for the next.
  bool Use(int32_t num_decoding);
  // A step in which nobody prefilled: `num_drafts` of its sequences had a draft; `drafting` is what Use said.
  void OnStep(int32_t num_sequences, int32_t num_drafts, bool drafting, int32_t num_tokens, Duration time);
  // Whether a prompt that begins now should get the MTP layer's rows, without which nothing is drafted for
  // it: not while drafts are known not to pay wherever the load has been lately.
  bool Fill() const;

  // Tokens per second with and without drafts at that many sequences; 0 = not measured.
  double rate(int32_t num_decoding, bool drafting) const;

 private:
  struct Measured {
    double tokens = 0;  // these decay
    double seconds = 0;
    double weight = 0;  // of steps
    int32_t steps = 0;
    double rate() const { return seconds > 0 ? tokens / seconds : 0; }
  };
  struct Bucket {
    Measured with;
    Measured without;
    int32_t since_probe = 0;
    int32_t probe_every = 0;
    int32_t probe_left = 0;  // steps of the other way still to be measured
    bool better = true;      // what Use says outside of trials and probes
    int64_t last_use = -1;

    bool in_trial() const;
    Measured& of(bool drafting) { return drafting ? with : without; }
  };
  static size_t BucketOf(int32_t num_sequences);

  std::array<Bucket, 32> buckets_;  // by the logarithm of the number of sequences
  int64_t uses_ = 0;
};

}  // namespace millrace::engine
