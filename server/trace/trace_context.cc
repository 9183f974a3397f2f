#include "server/trace/trace_context.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>

namespace millrace::server {
namespace {

// version "-" trace-id "-" parent-id "-" trace-flags
constexpr size_t kVersionEnd = 2;
constexpr size_t kTraceBegin = 3;
constexpr size_t kSpanBegin = 36;
constexpr size_t kFlagsBegin = 53;
constexpr size_t kLength = 55;
constexpr size_t kStateBytesMax = 512;  // what everybody passes on
constexpr uint64_t kSampledFlag = 1;

// Lower-case digits only, as the format wants them.
std::optional<uint64_t> Hex(std::string_view digits) {
  uint64_t value = 0;
  for (const char c : digits) {
    const bool letter = c >= 'a' && c <= 'f';
    if (!letter && (c < '0' || c > '9')) return std::nullopt;
    value = value << 4 | static_cast<uint64_t>(letter ? c - 'a' + 10 : c - '0');
  }
  return value;
}

bool IsPlain(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return c >= ' ' && c <= '~'; });
}

}  // namespace

std::string TraceContext::traceparent() const {
  if (!valid()) return {};
  return fmt::format("00-{:016x}{:016x}-{:016x}-{:02x}", trace_high, trace_low, span, sampled ? 1 : 0);
}

TraceContext ParseTraceContext(std::string_view traceparent, std::string_view tracestate) {
  const std::string_view text = traceparent;
  if (text.size() < kLength || text[kVersionEnd] != '-' || text[kSpanBegin - 1] != '-' ||
      text[kFlagsBegin - 1] != '-')
    return {};
  const auto version = Hex(text.substr(0, kVersionEnd));
  // Later versions may say more after the flags.
  const bool long_enough = text.size() == kLength || (version != 0 && text[kLength] == '-');
  if (!version || *version == 0xff || !long_enough) return {};
  const auto high = Hex(text.substr(kTraceBegin, 16));
  const auto low = Hex(text.substr(kTraceBegin + 16, 16));
  const auto span = Hex(text.substr(kSpanBegin, 16));
  const auto flags = Hex(text.substr(kFlagsBegin, 2));
  if (!high || !low || !span || !flags) return {};
  TraceContext context{*high, *low, *span, (*flags & kSampledFlag) != 0, {}};
  if (!context.valid()) return {};
  if (tracestate.size() <= kStateBytesMax && IsPlain(tracestate)) context.state = tracestate;
  return context;
}

}  // namespace millrace::server
