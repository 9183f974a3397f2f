// One step of the engine: expire, hand out pages, schedule, forward, sample.

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "base/random.h"
#include "engine/core/engine_core.h"
#include "engine/sampling/sampler.h"

namespace millrace::engine {
namespace {

// What a backend needs to draw this sequence's next token; none when only Sample can.
std::optional<DrawParams> BackendDraw(const Sequence& sequence, int32_t num_vocabulary_tokens) {
  const SamplingParams& params = sequence.request.sampling;
  const bool masks = sequence.num_output() < params.min_tokens && !sequence.end_tokens.empty();
  if (masks || params.mask != nullptr || params.num_logprobs >= 0 || !params.logit_bias.empty() ||
      params.repetition_penalty != 1 || params.presence_penalty != 0 || params.frequency_penalty != 0) {
    return std::nullopt;
  }
  DrawParams draw;
  draw.uniform = UniformAt(params.seed, static_cast<uint64_t>(sequence.num_output()));
  draw.temperature = params.temperature;
  draw.top_p = params.top_p;
  draw.min_p = params.min_p;
  draw.top_k = params.top_k;
  draw.num_tokens = num_vocabulary_tokens;
  return draw;
}

}  // namespace

bool EngineCore::Prepare() {
  batch_.segments.clear();
  runs_.clear();
  last_batch_tokens_ = num_logits_ = num_drafts_ = 0;
  drafting_ = false;
  if (tiers_ != nullptr) tiers_->Poll();
  Expire();
  if (broken_.ok()) HandOutPages();
  if (!copy_error_.ok() && broken_.ok()) Break(copy_error_);
  BuildBatch();
  return !runs_.empty();
}

Status EngineCore::Run() {
  if (!broken_.ok()) return broken_;
  if (const Status status = RunBatch(); !status.ok()) Break(status);
  return broken_;
}

Status EngineCore::Join() {
  if (const StatusOr<StepOutput> output = backend_->Forward(Batch{}, {}); !output.ok())
    Break(output.status());
  return broken_;
}

void EngineCore::Break(const Status& status) {
  broken_ = Annotate(status, "the engine cannot go on computing");
  LogError("{}", Message(broken_));
  EndAll(broken_);
}

void EngineCore::Expire() {
  const TimePoint now = options_.clock->Now();
  std::vector<Sequence*> expired;
  for (const auto& [id, sequence] : sequences_) {
    if (sequence->request.deadline <= now) expired.push_back(sequence.get());
  }
  for (Sequence* sequence : expired) End(sequence, DeadlineExceeded("the request's time is up"));
}

void EngineCore::BuildBatch() {
  const std::vector<Sequence*> running(running_.begin(), running_.end());
  std::vector<ScheduleEntry> entries;
  entries.reserve(running.size());
  bool scores = false;
  for (size_t slot = 0; slot < running.size(); ++slot) {
    const Sequence& sequence = *running[slot];
    if (sequence.num_pages() < PagesFor(sequence.num_tokens())) continue;  // found no page to grow into
    int32_t num_pending = sequence.num_pending();
    if (sequence.is_scoring()) {
      if (scores) continue;  // one in a step, for that many rows there are
      scores = true;
      num_pending = std::min(num_pending, kScoredRowsMax);
    }
    entries.push_back({static_cast<int32_t>(slot), num_pending, sequence.is_decoding(),
                       sequence.request.priority, sequence.arrival});
  }
  if (entries.empty()) return;
  const auto num_decoding = static_cast<int32_t>(std::count_if(
      entries.begin(), entries.end(), [](const ScheduleEntry& entry) { return entry.decoding; }));
  const int32_t tokens_max = StepTokens(options_.batch_tokens_max, num_decoding, options_.token_gap_target,
                                        step_cost_.seconds_per_token());
  drafting_ = has_mtp_ && num_decoding > 0 && speculation_.Use(num_decoding);
  const std::vector<ScheduledRun> picked = Schedule(entries, {tokens_max, options_.running_max});
  for (const ScheduledRun& run : picked) {
    last_batch_tokens_ += run.num_tokens;
    num_logits_ += run.num_tokens == running[static_cast<size_t>(run.slot)]->num_pending() ? 1 : 0;
  }
  for (const ScheduledRun& run : picked) {
    Sequence* const sequence = running[static_cast<size_t>(run.slot)];
    AddRun(sequence, run.num_tokens);
    Segment& segment = batch_.segments.back();
    if (segment.num_logits == 1) segment.draw = BackendDraw(*sequence, options_.num_vocabulary_tokens);
  }
}

Status EngineCore::RunBatch() {
  ++steps_;
  const TimePoint begun = options_.clock->Now();
  int32_t layers_told = 0;
  const auto tell_until = [&](int32_t end) {
    for (; layers_told < end; ++layers_told) TellLayer(layers_told);
  };
  MR_ASSIGN_OR_RETURN(const StepOutput output,
                      backend_->Forward(batch_, [&](int32_t layer) { tell_until(layer + 1); }));
  // A layer that this batch leaves alone (MTP without next tokens) is as final as it gets.
  tell_until(layout_.num_layers);
  step_cost_.OnStep(last_batch_tokens_, options_.clock->Now() - begun);

  const uint64_t tokens_before = output_tokens_;
  const bool only_decoding =
      std::all_of(runs_.begin(), runs_.end(), [](const Sequence* s) { return s->is_decoding(); });
  DrawTokens(output);
  std::vector<Sequence*> live;
  for (size_t i = 0; i < runs_.size(); ++i) {
    if (TakeTokens(i, output)) live.push_back(runs_[i]);
  }
  MR_RETURN_IF_ERROR(DraftNext(live));
  // After the MTP layer: what is in the cache is not written to any more.
  for (Sequence* const sequence : live) CachePages(sequence);
  if (has_mtp_ && only_decoding) {
    speculation_.OnStep(static_cast<int32_t>(runs_.size()), num_drafts_, drafting_,
                        static_cast<int32_t>(output_tokens_ - tokens_before), options_.clock->Now() - begun);
  }
  return OkStatus();
}

// Fills draws_ and first_rows_. Each draw is a pure function of what the step began with, so that all runs
// can be drawn from at once.
void EngineCore::DrawTokens(const StepOutput& output) {
  first_rows_.clear();
  size_t num_rows = 0;
  for (const Segment& segment : batch_.segments) {
    first_rows_.push_back(num_rows);
    num_rows += static_cast<size_t>(segment.num_logits);
  }
  if (draws_.size() < runs_.size()) draws_.resize(runs_.size());
  backend_->RunParallel(static_cast<int64_t>(runs_.size()), SamplingWork(num_rows),
                        [&](int64_t run) { DrawRun(static_cast<size_t>(run), output); });
}

// Draws the tokens after one run: one, and behind a draft that was what had to come one more.
void EngineCore::DrawRun(size_t run, const StepOutput& output) {
  std::vector<SampledToken>& draws = draws_[run];
  draws.clear();
  const Sequence& sequence = *runs_[run];
  const auto num_tokens = static_cast<int32_t>(batch_.segments[run].tokens.size());
  const auto num_logits = static_cast<size_t>(batch_.segments[run].num_logits);
  const bool scoring = sequence.is_scoring();
  if (num_logits == 0 || (scoring && num_tokens < sequence.num_pending())) return;
  const size_t num_drafts = scoring ? 0 : num_logits - 1;
  const auto vocab_size = static_cast<size_t>(backend_->config().vocab_size);
  SampleInput input;
  input.prompt = sequence.prompt();
  input.end_tokens = sequence.end_tokens;
  input.num_tokens_in_vocabulary = options_.num_vocabulary_tokens;
  const std::span<const int32_t> answer = sequence.output();  // with the draft
  for (size_t i = 0; i <= num_drafts; ++i) {
    const size_t row = first_rows_[run] + num_logits - 1 - num_drafts + i;
    SampledToken& drawn = draws.emplace_back();
    if (row < output.drawn.size() && output.drawn[row] >= 0) {
      drawn.token = output.drawn[row];
    } else {
      input.logits = output.logits.subspan(row * vocab_size, vocab_size);
      input.output = answer.first(answer.size() - num_drafts + i);
      drawn = Sample(input, sequence.request.sampling);
    }
    if (drawn.token != sequence.tokens.back() || sequence.is_end(drawn.token)) return;
  }
}

// Adds what was drawn after one run to its sequence. False when that has ended.
bool EngineCore::TakeTokens(size_t run, const StepOutput& output) {
  Sequence* const sequence = runs_[run];
  const Segment& segment = batch_.segments[run];
  const auto num_tokens = static_cast<int32_t>(segment.tokens.size());
  const bool scoring = sequence->is_scoring();
  const int32_t num_drafts = !scoring && segment.num_logits > 1 ? 1 : 0;
  if (!sequence->is_decoding()) prompt_tokens_ += static_cast<uint64_t>(num_tokens);
  sequence->num_computed += num_tokens - num_drafts;
  if (num_drafts > 0) sequence->tokens.pop_back();
  size_t row = first_rows_[run];
  if (scoring) {
    const auto vocab_size = static_cast<size_t>(backend_->config().vocab_size);
    ScorePrompt(sequence, segment, output.logits.subspan(row * vocab_size));
    row += static_cast<size_t>(segment.num_logits - 1);
  }
  const auto hidden_size = output.hidden.empty() ? 0 : static_cast<size_t>(backend_->config().hidden_size);
  for (size_t i = 0; i < draws_[run].size(); ++i, ++row) {
    if (i > 0) {  // the draft was drawn: its row is as computed as any
      ++sequence->num_computed;
      ++accepted_tokens_;
    }
    KeepHidden(sequence, output.hidden.subspan(row * hidden_size, hidden_size));
    ++output_tokens_;
    if (!AppendToken(sequence, std::move(draws_[run][i]), /*send=*/true)) return false;
  }
  return true;
}

// `logits`: of the segment's rows, and whatever follows. A row tells of the token after its own. After a
// preemption some are known already.
void EngineCore::ScorePrompt(Sequence* sequence, const Segment& segment, std::span<const float> logits) {
  const auto vocab_size = static_cast<size_t>(backend_->config().vocab_size);
  const auto position = static_cast<size_t>(segment.position);
  const size_t known = sequence->prompt_scores.size();
  const size_t end =
      std::min(position + segment.tokens.size(), static_cast<size_t>(sequence->num_prompt) - 1);
  if (end <= known) return;
  MR_CHECK(known >= position, "request {}: prompt tokens {} to {} have no score", sequence->request.id, known,
           position);
  sequence->prompt_scores.resize(end);
  const size_t count = end - known;
  backend_->RunParallel(static_cast<int64_t>(count), SamplingWork(count), [&](int64_t i) {
    const size_t at = known + static_cast<size_t>(i);
    sequence->prompt_scores[at] =
        Score(logits.subspan((at - position) * vocab_size, vocab_size), options_.num_vocabulary_tokens,
              sequence->tokens[at + 1], sequence->request.sampling.num_logprobs);
  });
}

// For RunParallel: a logit that is looked at, with an exponential or without, against a multiply-add.
int64_t EngineCore::SamplingWork(size_t num_rows) const {
  constexpr int64_t kWorkPerLogit = 16;
  return static_cast<int64_t>(num_rows) * backend_->config().vocab_size * kWorkPerLogit;
}

// Tells the sinks of prefill requests which pages this step makes final in `layer`.
void EngineCore::TellLayer(int32_t layer) {
  for (size_t i = 0; i < runs_.size(); ++i) {
    const Sequence& sequence = *runs_[i];
    // After ReleaseTicket nobody may read the pages any more.
    if (sequence.prefill_sink == nullptr || sequence.ticket_released) continue;
    const Segment& segment = batch_.segments[i];
    MR_CHECK(segment.position % kPageTokens == 0, "request {}: a chunk starts at {}", sequence.request.id,
             segment.position);
    const int32_t first_page = segment.position / kPageTokens;
    const int32_t end_page = PagesFor(segment.position + static_cast<int64_t>(segment.tokens.size()));
    sequence.prefill_sink->OnLayer(
        layer, first_page,
        segment.pages.subspan(static_cast<size_t>(first_page), static_cast<size_t>(end_page - first_page)));
  }
}

}  // namespace millrace::engine
