#pragma once
// What a step's kernels read besides weights and KV: blocks of 32-bit integers, filled on the host and copied
// to the device. Arrays begin at places that depend on counts alone, so that a captured graph finds them
// again.
//
// Inside a step, rows are the tokens of the batch with single-token segments first (in order), then the
// others (in order), then padding. Logits come out in segment order all the same: logit_rows says where they
// are.

#include <cstddef>
#include <cstdint>

#include "engine/batch.h"

namespace millrace::engine::cuda {

struct PassCounts {
  int32_t rows = 0;
  int32_t logits = 0;
  int32_t singles = 0;  // single-token segments: one row and one sequence each
  int32_t longer = 0;   // segments of more tokens
  int32_t sequences() const { return singles + longer; }
};

// One run through layers: the main model's, or the MTP layer's over the segments that have next tokens.
struct PassInputs {
  int32_t* valid_rows = nullptr;  // one number: rows that are no padding
  int32_t* tokens = nullptr;      // [rows]; in the MTP pass the next tokens; padding: 0
  int32_t* positions = nullptr;   // [rows]; padding: 0
  int32_t* kv_slots = nullptr;    // [rows] page * 64 + token in the page; padding: -1
  int32_t* logit_rows = nullptr;  // [logits] rows whose logits are wanted; padding: 0
  int32_t* lengths = nullptr;     // [sequences] tokens attended to at the end of the segment; padding: 0
  int32_t* row_begin =
      nullptr;  // [longer + 1] first row of each longer segment, counted from the first such row
  int32_t* source = nullptr;  // [rows] MTP pass: the row of the main pass; padding: 0
  int32_t* end = nullptr;     // where the block ends
};
PassInputs PlaceInputs(int32_t* base, const PassCounts& counts);
size_t InputsSize(const PassCounts& counts);  // integers of such a block

// Which segments a pass covers.
enum class PassKind { kMain, kMtp };
PassCounts CountPass(const Batch& batch, PassKind kind);
// The most pages of any segment.
int32_t PagesMax(const Batch& batch);

// Fills a host block that was placed for `padded` counts (at least the batch's), and the page table,
// [sequences] rows `table_stride` apart.
void FillPass(const Batch& batch, PassKind kind, const PassCounts& padded, const PassInputs& inputs,
              int32_t* page_table, int64_t table_stride);

}  // namespace millrace::engine::cuda
