#pragma once
// What a step's kernels read besides weights and KV: one block of 32-bit integers, filled on the host and
// copied to the device at once. Its arrays begin at places that depend on the padded counts alone, so that a
// captured graph finds them again.

#include <cstdint>

#include "engine/batch.h"

namespace millrace::engine::cuda {

// Rows are the tokens of the batch in order, then padding up to `rows`.
struct RowInputs {
  int32_t* valid_rows = nullptr;  // one number: rows that are no padding
  int32_t* tokens = nullptr;      // [rows]; padding: 0
  int32_t* positions = nullptr;   // [rows]; padding: 0
  int32_t* kv_slots = nullptr;    // [rows] page * 64 + token in the page; padding: -1
  int32_t* num_keys = nullptr;    // [rows] position + 1; padding: 0
  int32_t* page_begin = nullptr;  // [rows] of the row's sequence, in StepInputs::pages
  int32_t* logit_rows = nullptr;  // [logits] rows whose logits are wanted; padding: 0
};

struct StepInputs {
  RowInputs main;
  RowInputs mtp;                  // rows of segments with next tokens; tokens = the next tokens
  int32_t* mtp_source = nullptr;  // [mtp rows] their row in `main`
  int32_t* pages = nullptr;       // page tables of all segments; last, because its length varies most

  // Pointers into a block that starts at `base`, for so many padded rows and logits.
  static StepInputs Place(int32_t* base, int32_t rows, int32_t logits, int32_t mtp_rows, int32_t mtp_logits);
};

struct StepCounts {
  int32_t rows = 0;  // of the batch, without padding
  int32_t logits = 0;
  int32_t mtp_rows = 0;
  int32_t mtp_logits = 0;
  int32_t pages = 0;
};
StepCounts CountBatch(const Batch& batch);

// Fills a host block. `inputs` was placed for at least the batch's counts; `padded` are the counts it was
// placed for.
void FillInputs(const Batch& batch, const StepCounts& padded, const StepInputs& inputs);

}  // namespace millrace::engine::cuda
