// One step of the engine: expire, hand out pages, schedule, forward, sample.

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "engine/core/engine_core.h"
#include "engine/sampling/sampler.h"

namespace millrace::engine {

bool EngineCore::Prepare() {
  batch_.segments.clear();
  runs_.clear();
  last_batch_tokens_ = 0;
  Expire();
  HandOutPages();
  BuildBatch();
  return !runs_.empty();
}

Status EngineCore::Run() {
  if (!broken_.ok()) return broken_;
  if (const Status status = RunBatch(); !status.ok()) Break(status);
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
  for (size_t slot = 0; slot < running.size(); ++slot) {
    const Sequence& sequence = *running[slot];
    if (sequence.num_pages() < PagesFor(sequence.num_tokens())) continue;  // found no page to grow into
    entries.push_back({static_cast<int32_t>(slot), sequence.num_pending(), sequence.is_decoding(),
                       sequence.request.priority, sequence.arrival});
  }
  if (entries.empty()) return;
  for (const ScheduledRun& run : Schedule(entries, {options_.batch_tokens_max, options_.running_max})) {
    Sequence* const sequence = running[static_cast<size_t>(run.slot)];
    Segment& segment = batch_.segments.emplace_back();
    segment.tokens =
        std::span(sequence->tokens)
            .subspan(static_cast<size_t>(sequence->num_computed), static_cast<size_t>(run.num_tokens));
    segment.position = sequence->num_computed;
    segment.pages = sequence->pages;
    segment.num_logits = run.num_tokens == sequence->num_pending() ? 1 : 0;
    segment.exported = sequence->prefill_sink != nullptr && !sequence->ticket_released;
    runs_.push_back(sequence);
    last_batch_tokens_ += run.num_tokens;
  }
}

Status EngineCore::RunBatch() {
  ++steps_;
  int32_t layers_told = 0;
  const auto tell_until = [&](int32_t end) {
    for (; layers_told < end; ++layers_told) TellLayer(layers_told);
  };
  MR_ASSIGN_OR_RETURN(const StepOutput output,
                      backend_->Forward(batch_, [&](int32_t layer) { tell_until(layer + 1); }));
  // A layer that this batch leaves alone (MTP without next tokens) is as final as it gets.
  tell_until(layout_.num_layers);

  const auto vocab_size = static_cast<size_t>(backend_->config().vocab_size);
  size_t row = 0;
  for (size_t i = 0; i < runs_.size(); ++i) {
    Sequence* const sequence = runs_[i];
    const Segment& segment = batch_.segments[i];
    const auto num_tokens = static_cast<int32_t>(segment.tokens.size());
    if (!sequence->is_decoding()) prompt_tokens_ += static_cast<uint64_t>(num_tokens);
    sequence->num_computed += num_tokens;
    if (segment.num_logits == 0) continue;
    SampleInput input;
    input.logits = output.logits.subspan(row++ * vocab_size, vocab_size);
    input.prompt = sequence->prompt();
    input.output = sequence->output();
    input.end_tokens = sequence->end_tokens;
    input.num_tokens_in_vocabulary = options_.num_vocabulary_tokens;
    ++output_tokens_;
    AppendToken(sequence, Sample(input, sequence->request.sampling), /*send=*/true);
  }
  return OkStatus();
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
