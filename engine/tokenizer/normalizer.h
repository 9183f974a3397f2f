#pragma once
// Unicode normalisation form C as the reference tokenizer computes it.

#include <string>
#include <string_view>

namespace millrace::engine {

// `text` must be valid UTF-8. O(n log n) even for long runs of combining marks. Characters that the
// reference's older Unicode data does not know as combining are left where they stand.
std::string NormalizeNfc(std::string_view text);

}  // namespace millrace::engine
