#pragma once
// One engine step, as a backend sees it: plain data, no scheduler, no requests.

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "engine/kv/layout.h"

namespace millrace::engine {

// How the token after a segment is drawn, by the rules of engine/sampling/sampler.h. What those rules do to
// logits first (penalties, biases, masks), and log-probabilities, is not for backends.
struct DrawParams {
  double uniform = 0;  // [0, 1)
  float temperature = 1;
  float top_p = 1;
  float min_p = 0;
  int32_t top_k = 0;
  int32_t num_tokens = 0;  // ids from here on are never drawn
};

// A run of consecutive new tokens of one sequence. Their K and V are written to the sequence's pages; each
// attends to everything before it in the sequence and to itself.
struct Segment {
  std::span<const int32_t> tokens;  // at least one
  int32_t position = 0;             // of tokens[0] in the sequence
  std::span<const PageId> pages;    // the sequence's page table; covers [0, position + tokens.size())
  int32_t num_logits = 0;           // logits are wanted for the last num_logits tokens
  // For the MTP layer: the token that follows each row (same length as `tokens`), -1 where it is not known
  // and the layer's row is left alone; empty to leave the layer alone.
  std::span<const int32_t> next_tokens;
  // Somebody outside reads the pages that this segment writes: their bytes in kv_memory() are final, layer by
  // layer, before LayerDone tells of the layer.
  bool exported = false;
  // With num_logits = 1: a backend that can may draw the token itself and leave the logits where they are.
  std::optional<DrawParams> draw = {};
};

// A run of rows of the MTP layer alone, whose main layers have run in earlier Forwards. Their K and V of that
// layer are written to the sequence's pages.
struct MtpSegment {
  std::span<const float> hidden;         // [next_tokens.size(), hidden_size]: rows of StepOutput::hidden
  std::span<const int32_t> next_tokens;  // the token that follows each row; at least one
  int32_t position = 0;                  // of the first row in the sequence
  std::span<const PageId> pages;         // the sequence's page table
};

struct Batch {
  std::vector<Segment> segments;
};

// Outputs of a step. Owned by the backend, valid until its next Forward.
struct StepOutput {
  std::span<const float> logits;      // [sum of num_logits, vocab_size], in segment order
  std::span<const float> mtp_logits;  // [rows with logits and a next token, vocab_size]
  std::span<const float> hidden;      // [sum of num_logits, hidden_size], final; empty without an MTP layer
  // Per row of `logits` the token drawn, and then that row of logits is not valid; or -1, or empty: not
  // drawn.
  std::span<const int32_t> drawn = {};
};

}  // namespace millrace::engine
