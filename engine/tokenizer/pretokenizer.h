#pragma once
// The Ling split: text to the pieces inside which BPE merges. A hand-written scanner instead of a regex
// engine, because it is linear in the text whatever the text is.

#include <cstddef>
#include <string_view>

namespace millrace::engine {

// The pattern that NextPieceBytes implements, as tokenizer.json spells it.
inline constexpr std::string_view kLingSplitPattern =
    R"('(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+)";

// Bytes of the first piece of `rest`, which is not empty and valid UTF-8. Every character belongs to a piece,
// so calling it again on what follows splits a whole text. Pure; amortised linear.
size_t NextPieceBytes(std::string_view rest);

}  // namespace millrace::engine
