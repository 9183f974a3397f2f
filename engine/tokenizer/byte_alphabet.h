#pragma once
// The printable alphabet in which tokenizer.json writes bytes: most Latin-1 characters stand for themselves,
// the other bytes, in order, for U+0100 and on.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace millrace::engine {

// The character that stands for `byte`, as UTF-8.
std::string ByteSymbol(uint8_t byte);

// The bytes that `symbols` (valid UTF-8) spells; nullopt if a character is not of the alphabet.
std::optional<std::string> BytesOfSymbols(std::string_view symbols);

}  // namespace millrace::engine
