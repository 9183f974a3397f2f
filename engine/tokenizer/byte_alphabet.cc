#include "engine/tokenizer/byte_alphabet.h"

#include <array>

#include "base/check.h"
#include "engine/tokenizer/utf8.h"

namespace millrace::engine {
namespace {

constexpr bool StandsForItself(int byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

constexpr int kNumDisplaced = 68;

struct Alphabet {
  std::array<char32_t, 256> symbol_of_byte{};
  std::array<uint8_t, kNumDisplaced> displaced{};  // byte of U+0100 + i
};

constexpr Alphabet MakeAlphabet() {
  Alphabet alphabet;
  size_t num_displaced = 0;
  for (int byte = 0; byte < 256; ++byte) {
    if (StandsForItself(byte)) {
      alphabet.symbol_of_byte[static_cast<size_t>(byte)] = static_cast<char32_t>(byte);
    } else {
      alphabet.symbol_of_byte[static_cast<size_t>(byte)] = static_cast<char32_t>(0x100 + num_displaced);
      alphabet.displaced[num_displaced++] = static_cast<uint8_t>(byte);
    }
  }
  return alphabet;
}

constexpr Alphabet kAlphabet = MakeAlphabet();

}  // namespace

std::string ByteSymbol(uint8_t byte) {
  std::string symbol;
  AppendUtf8(kAlphabet.symbol_of_byte[byte], symbol);
  return symbol;
}

std::optional<std::string> BytesOfSymbols(std::string_view symbols) {
  std::string bytes;
  bytes.reserve(symbols.size());
  while (!symbols.empty()) {
    const Utf8Step step = StepUtf8(symbols);
    MR_CHECK(step.state == Utf8Step::State::kValid);
    symbols.remove_prefix(step.bytes);
    const char32_t c = step.code_point;
    if (c < 0x100) {
      if (!StandsForItself(static_cast<int>(c))) return std::nullopt;
      bytes.push_back(static_cast<char>(c));
    } else {
      if (c - 0x100 >= kNumDisplaced) return std::nullopt;
      bytes.push_back(static_cast<char>(kAlphabet.displaced[c - 0x100]));
    }
  }
  return bytes;
}

}  // namespace millrace::engine
