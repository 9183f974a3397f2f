#include "server/trace/span.h"

#include "base/random.h"

namespace millrace::server {

Span& Span::operator=(Span&& other) noexcept {
  if (this == &other) return *this;
  End();
  sink_ = other.sink_;
  context_ = std::move(other.context_);
  record_ = std::move(other.record_);
  return *this;
}

Span Span::Record(SpanSink* sink, TraceContext context, uint64_t parent, std::string_view name, SpanKind kind,
                  TimePoint begin) {
  Span span;
  span.sink_ = sink;
  context.span = RandomId();
  span.context_ = context;
  span.record_ = std::make_unique<SpanRecord>();
  span.record_->context = std::move(context);
  span.record_->parent = parent;
  span.record_->name = name;
  span.record_->kind = kind;
  span.record_->begin = begin;
  return span;
}

Span Span::Child(std::string_view name, SpanKind kind, TimePoint begin) const {
  return BeginSpan(sink_, context_, name, kind, begin);
}

void Span::Set(std::string_view key, SpanValue value) {
  if (recording()) record_->attributes.emplace_back(key, std::move(value));
}

void Span::End(TimePoint at, const Status& status) {
  if (!recording()) return;
  record_->end = at;
  record_->status = status;
  sink_->Take(std::move(*std::exchange(record_, nullptr)));
}

Span BeginSpan(SpanSink* sink, TraceContext parent, std::string_view name, SpanKind kind, TimePoint begin) {
  if (sink != nullptr && parent.valid() && parent.sampled) {
    const uint64_t parent_span = parent.span;
    return Span::Record(sink, std::move(parent), parent_span, name, kind, begin);
  }
  Span span;
  span.context_ = std::move(parent);
  return span;
}

Span BeginTrace(const Tracing& tracing, const TraceContext& parent, std::string_view name, SpanKind kind,
                TimePoint begin) {
  if (parent.valid()) return BeginSpan(tracing.spans, parent, name, kind, begin);
  if (tracing.spans == nullptr) return {};
  const uint64_t id = RandomId();
  if (UniformAt(id, 0) >= tracing.sample) return {};
  return Span::Record(tracing.spans, {RandomId(), id, 0, true, {}}, 0, name, kind, begin);
}

}  // namespace millrace::server
