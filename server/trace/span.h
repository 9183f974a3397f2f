#pragma once
// Spans: what an operation of a trace was called, how long it took and how it ended. Never text of prompts or
// answers.

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "server/trace/trace_context.h"

namespace millrace::server {

using SpanValue = std::variant<std::string, int64_t, double, std::vector<std::string>>;

enum class SpanKind { kInternal, kServer, kClient };

struct SpanRecord {
  TraceContext context;  // its span is this one
  uint64_t parent = 0;   // 0: the trace's first
  std::string name;
  SpanKind kind = SpanKind::kInternal;
  TimePoint begin;
  TimePoint end;
  std::vector<std::pair<std::string, SpanValue>> attributes;
  Status status;  // failed when neither OK nor kCancelled
};

// Where ended spans go.
class SpanSink {
 public:
  virtual ~SpanSink() = default;
  virtual void Take(SpanRecord span) = 0;  // any thread; never waits
};

// Whether and where a process that clients ask records.
struct Tracing {
  SpanSink* spans = nullptr;  // null: nowhere; outlives whoever uses it
  double sample = 1;          // of the traces that begin here; in others their beginner decides
};

// One operation. One thread at a time. Without a sink, or in a trace that is not recorded, it only carries
// the context on, and the rest does nothing.
class Span {
 public:
  Span() = default;
  Span(Span&&) noexcept = default;
  // Ends the one that was here.
  Span& operator=(Span&& other) noexcept;
  ~Span() { End(); }

  // For those who work for this operation.
  const TraceContext& context() const { return context_; }
  bool recording() const { return record_ != nullptr; }
  Span Child(std::string_view name, SpanKind kind, TimePoint begin) const;
  void Set(std::string_view key, SpanValue value);
  // The first one counts.
  void End(const Status& status = OkStatus()) { End(Clock::System().Now(), status); }
  void End(TimePoint at, const Status& status);

 private:
  friend Span BeginSpan(SpanSink* sink, TraceContext parent, std::string_view name, SpanKind kind,
                        TimePoint begin);
  friend Span BeginTrace(const Tracing& tracing, const TraceContext& parent, std::string_view name,
                         SpanKind kind, TimePoint begin);
  static Span Record(SpanSink* sink, TraceContext context, uint64_t parent, std::string_view name,
                     SpanKind kind, TimePoint begin);

  SpanSink* sink_ = nullptr;
  TraceContext context_;
  std::unique_ptr<SpanRecord> record_;  // null: not recording, or ended
};

// An operation that `parent` asked for. `sink` (null: nobody wants spans) outlives the span.
Span BeginSpan(SpanSink* sink, TraceContext parent, std::string_view name, SpanKind kind, TimePoint begin);

// The same for what comes from outside: without a valid `parent` a new trace begins, if it is one to be
// recorded; in those that are not, nobody records.
Span BeginTrace(const Tracing& tracing, const TraceContext& parent, std::string_view name, SpanKind kind,
                TimePoint begin);

}  // namespace millrace::server
