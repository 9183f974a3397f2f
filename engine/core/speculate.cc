// The MTP layer: what it needs, what it proposes, and how a proposal joins the next batch.
//
// With the main model's final state of a row and the token after it, the MTP layer guesses the token after
// that one. The guess is drawn as the engine will draw, from the same (seed, position), so that it is right
// as often as the two distributions agree. It runs in the next step as if it were known, one row behind the
// pending token; the main model's logits then say what had to come. Only an equal token counts, so the answer
// is what it would be without.

#include <algorithm>

#include "base/check.h"
#include "engine/core/engine_core.h"
#include "engine/sampling/sampler.h"

namespace millrace::engine {
namespace {

// Rows whose hidden states are kept while the MTP layer does not run.
constexpr int32_t kMtpRowsMax = 64;

}  // namespace

// The token has a row in the pages, is not the last of the answer, and fits into the step.
bool EngineCore::MayDraft(const Sequence& sequence) const {
  return drafting_ && sequence.is_decoding() && sequence.draft >= 0 &&
         sequence.num_tokens() < sequence.num_pages() * kPageTokens &&
         sequence.num_tokens() + 1 < sequence.tokens_max && num_logits_ < options_.running_max &&
         last_batch_tokens_ < options_.batch_tokens_max;
}

void EngineCore::AddRun(Sequence* sequence, int32_t num_tokens) {
  const bool last = num_tokens == sequence->num_pending();
  int32_t num_logits = sequence->is_scoring() ? num_tokens : last ? 1 : 0;
  if (MayDraft(*sequence)) {
    sequence->tokens.push_back(sequence->draft);  // until its logits are there
    ++num_tokens;
    ++num_logits;
    ++num_drafts_;
    ++num_logits_;
    ++last_batch_tokens_;
    ++drafted_tokens_;
  }
  Segment& segment = batch_.segments.emplace_back();
  const auto begin = static_cast<size_t>(sequence->num_computed);
  const auto count = static_cast<size_t>(num_tokens);
  segment.tokens = std::span(sequence->tokens).subspan(begin, count);
  segment.position = sequence->num_computed;
  segment.pages = sequence->pages;
  segment.num_logits = num_logits;
  segment.exported = sequence->prefill_sink != nullptr && !sequence->ticket_released;
  runs_.push_back(sequence);
  if (!has_mtp_ || sequence->is_decoding()) return;
  // A prefill's receiver decides for itself whether it drafts.
  if (!sequence->prefill_begun) sequence->mtp_fill = sequence->prefill_sink != nullptr || speculation_.Fill();
  sequence->prefill_begun = true;
  if (!sequence->mtp_fill) return;
  // The MTP layer's rows of a prompt are computed along with it, but for the last: nobody knows what follows.
  if (next_tokens_.size() < runs_.size()) next_tokens_.resize(runs_.size());
  std::vector<int32_t>& next = next_tokens_[runs_.size() - 1];
  next.assign(sequence->tokens.begin() + static_cast<ptrdiff_t>(begin) + 1,
              sequence->tokens.begin() + static_cast<ptrdiff_t>(begin + count) + (last ? 0 : 1));
  next.resize(count, -1);
  segment.next_tokens = next;
}

// `row` is the final hidden state of the last computed row, or empty.
void EngineCore::KeepHidden(Sequence* sequence, std::span<const float> row) {
  if (!has_mtp_ || row.empty()) return;
  if (sequence->mtp_fill && sequence->num_computed == sequence->num_prefill && sequence->mtp_begin < 0) {
    sequence->mtp_begin = sequence->num_computed - 1;  // the prompt's rows before are computed
  }
  if (sequence->mtp_begin < 0) return;
  sequence->mtp_hidden.insert(sequence->mtp_hidden.end(), row.begin(), row.end());
  if (sequence->num_computed - sequence->mtp_begin <= kMtpRowsMax) return;
  sequence->mtp_begin = -1;
  sequence->mtp_hidden.clear();
}

// Shows the MTP layer the rows that it lacks and lets it guess.
Status EngineCore::DraftNext(std::span<Sequence* const> sequences) {
  for (Sequence* const sequence : sequences) sequence->draft = -1;
  if (!drafting_) return OkStatus();
  std::vector<Sequence*> drafted;
  std::vector<MtpSegment> segments;
  int32_t num_rows = 0;
  for (Sequence* const sequence : sequences) {
    const int32_t missing = sequence->num_computed - sequence->mtp_begin;
    if (sequence->mtp_begin < 0 || missing < 1 || !sequence->is_decoding()) continue;
    if (num_rows + missing > options_.batch_tokens_max ||
        static_cast<int32_t>(segments.size()) == options_.running_max) {
      continue;
    }
    num_rows += missing;
    MtpSegment& segment = segments.emplace_back();
    segment.hidden = sequence->mtp_hidden;
    segment.next_tokens =
        std::span(sequence->tokens)
            .subspan(static_cast<size_t>(sequence->mtp_begin) + 1, static_cast<size_t>(missing));
    segment.position = sequence->mtp_begin;
    segment.pages = sequence->pages;
    drafted.push_back(sequence);
  }
  if (segments.empty()) return OkStatus();
  MR_ASSIGN_OR_RETURN(const std::span<const float> logits, backend_->ForwardMtp(segments));
  const auto vocab_size = static_cast<size_t>(backend_->config().vocab_size);
  backend_->RunParallel(static_cast<int64_t>(drafted.size()), SamplingWork(drafted.size()), [&](int64_t i) {
    Sequence* const sequence = drafted[static_cast<size_t>(i)];
    SampleInput input;
    input.logits = logits.subspan(static_cast<size_t>(i) * vocab_size, vocab_size);
    input.prompt = sequence->prompt();
    input.output = sequence->output();
    input.end_tokens = sequence->end_tokens;
    input.num_tokens_in_vocabulary = options_.num_vocabulary_tokens;
    sequence->draft = Sample(input, sequence->request.sampling).token;
    sequence->mtp_begin = sequence->num_computed;
    sequence->mtp_hidden.clear();
  });
  return OkStatus();
}

}  // namespace millrace::engine
