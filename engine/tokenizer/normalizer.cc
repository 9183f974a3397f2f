#include "engine/tokenizer/normalizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <iterator>
#include <vector>

#include "base/check.h"
#include "engine/tokenizer/utf8.h"

namespace millrace::engine {
namespace {

struct Range {
  char32_t first, last;
};

// Characters that combine in today's Unicode, but not in the Unicode data of the reference tokenizer's
// normaliser. Models were trained on its output, so these characters neither move nor compose.
constexpr Range kOpaque[] = {
    {0x7FD, 0x7FD},     {0x898, 0x89F},     {0x8CA, 0x8D3},     {0x9FE, 0x9FE},     {0xC3C, 0xC3C},
    {0xD3B, 0xD3C},     {0xEBA, 0xEBA},     {0x1715, 0x1715},   {0x1ABF, 0x1ACE},   {0x1DF6, 0x1DFA},
    {0xA82C, 0xA82C},   {0x10D24, 0x10D27}, {0x10EAB, 0x10EAC}, {0x10EFD, 0x10EFF}, {0x10F46, 0x10F50},
    {0x10F82, 0x10F85}, {0x11070, 0x11070}, {0x1133B, 0x1133B}, {0x1145E, 0x1145E}, {0x11839, 0x1183A},
    {0x11930, 0x11930}, {0x1193D, 0x1193E}, {0x11943, 0x11943}, {0x119E0, 0x119E0}, {0x11A34, 0x11A34},
    {0x11A47, 0x11A47}, {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45}, {0x11D97, 0x11D97},
    {0x11F41, 0x11F42}, {0x16FF0, 0x16FF1}, {0x1E08F, 0x1E08F}, {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE},
    {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF},
};

bool IsOpaque(char32_t c) {
  const auto* range = std::upper_bound(std::begin(kOpaque), std::end(kOpaque), c,
                                       [](char32_t value, const Range& r) { return value < r.first; });
  return range != std::begin(kOpaque) && c <= std::prev(range)->last;
}

int CombiningClass(utf8proc_int32_t c) { return utf8proc_get_property(c)->combining_class; }

void AppendDecomposed(char32_t c, std::vector<utf8proc_int32_t>& segment) {
  utf8proc_int32_t parts[8];  // a canonical decomposition has at most 4
  int boundary_class = 0;
  const utf8proc_ssize_t count = utf8proc_decompose_char(
      static_cast<utf8proc_int32_t>(c), parts, std::size(parts),
      static_cast<utf8proc_option_t>(UTF8PROC_DECOMPOSE | UTF8PROC_STABLE), &boundary_class);
  MR_CHECK(count > 0 && count <= static_cast<utf8proc_ssize_t>(std::size(parts)));
  segment.insert(segment.end(), parts, parts + count);
}

// Puts each run of marks into canonical order. utf8proc's own ordering takes quadratic time on long runs.
void OrderMarks(std::vector<utf8proc_int32_t>& segment) {
  for (auto run = segment.begin(); run != segment.end();) {
    run = std::find_if(run, segment.end(), [](utf8proc_int32_t c) { return CombiningClass(c) != 0; });
    const auto end =
        std::find_if(run, segment.end(), [](utf8proc_int32_t c) { return CombiningClass(c) == 0; });
    std::stable_sort(run, end, [](utf8proc_int32_t a, utf8proc_int32_t b) {
      return CombiningClass(a) < CombiningClass(b);
    });
    run = end;
  }
}

void FlushComposed(std::vector<utf8proc_int32_t>& segment, std::string& out) {
  OrderMarks(segment);
  const utf8proc_ssize_t length =
      utf8proc_normalize_utf32(segment.data(), static_cast<utf8proc_ssize_t>(segment.size()),
                               static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_STABLE));
  MR_CHECK(length >= 0 && static_cast<size_t>(length) <= segment.size());
  for (utf8proc_ssize_t i = 0; i < length; ++i) {
    AppendUtf8(static_cast<char32_t>(segment[static_cast<size_t>(i)]), out);
  }
  segment.clear();
}

}  // namespace

std::string NormalizeNfc(std::string_view text) {
  // Lead bytes below 0xCC are code points below U+0300: none of those combines or decomposes under form C.
  const bool is_plain =
      std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0xCC; });
  if (is_plain) return std::string(text);
  std::string out;
  out.reserve(text.size());
  std::vector<utf8proc_int32_t> segment;
  while (!text.empty()) {
    const Utf8Step step = StepUtf8(text);
    MR_CHECK(step.state == Utf8Step::State::kValid);
    text.remove_prefix(step.bytes);
    if (IsOpaque(step.code_point)) {
      FlushComposed(segment, out);
      AppendUtf8(step.code_point, out);
    } else {
      AppendDecomposed(step.code_point, segment);
    }
  }
  FlushComposed(segment, out);
  return out;
}

}  // namespace millrace::engine
