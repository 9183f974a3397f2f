#pragma once
// W3C trace context: the trace that a request belongs to, and the operation in it that asked for this one.

#include <cstdint>
#include <string>
#include <string_view>

namespace millrace::server {

// Plain data. Not valid: the request belongs to no trace.
struct TraceContext {
  uint64_t trace_high = 0;  // the trace's id, 128 bits
  uint64_t trace_low = 0;
  uint64_t span = 0;     // the operation
  bool sampled = false;  // whoever began the trace wants it recorded
  std::string state;     // tracestate: notes of other systems, passed on as they came

  bool valid() const { return (trace_high | trace_low) != 0 && span != 0; }
  // The header's text; empty when not valid.
  std::string traceparent() const;
};

// From the two headers, or what came in their place. Not valid when `traceparent` is not well-formed: its
// sender then has no trace. A tracestate that is too long or not plain text is dropped alone.
TraceContext ParseTraceContext(std::string_view traceparent, std::string_view tracestate);

}  // namespace millrace::server
