#include "engine/tokenizer/tokenizer.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "engine/tokenizer/added_tokens.h"
#include "engine/tokenizer/bpe.h"
#include "engine/tokenizer/byte_alphabet.h"
#include "engine/tokenizer/normalizer.h"
#include "engine/tokenizer/pretokenizer.h"
#include "engine/tokenizer/tokenizer_file.h"
#include "engine/tokenizer/utf8.h"

namespace millrace::engine {

struct Tokenizer::Data {
  struct Token {
    std::string bytes;
    bool exists = false;
    bool is_special = false;
  };
  std::vector<Token> tokens;  // by id
  std::unordered_map<std::string, TokenId> added;
  AddedTokenTrie raw_added;         // found in the text as it is
  AddedTokenTrie normalized_added;  // found in what is left, after normalisation
  Bpe bpe;
  bool nfc = false;

  void EncodeSegment(std::string_view segment, bool parse_special, Bpe::Scratch& scratch,
                     std::vector<TokenId>& ids) const;
  void EncodePlain(std::string_view plain, Bpe::Scratch& scratch, std::vector<TokenId>& ids) const;
};

namespace {

// Calls on_text(between) and on_token(id) in order over `text`; empty stretches are left out.
template <typename OnText, typename OnToken>
void SplitByAdded(const AddedTokenTrie& trie, std::string_view text, OnText on_text, OnToken on_token) {
  size_t position = 0;
  while (!trie.empty()) {
    const auto match = trie.FindNext(text, position);
    if (!match) break;
    if (match->begin > position) on_text(text.substr(position, match->begin - position));
    on_token(match->id);
    position = match->begin + match->bytes;
  }
  if (position < text.size()) on_text(text.substr(position));
}

// Every byte must have a token: then any text can be encoded, and no unknown token is ever needed.
Status FillBytes(const TokenizerFile& file, Bpe& bpe) {
  std::unordered_map<std::string_view, TokenId> ids;
  for (const auto& [name, id] : file.vocab) ids.emplace(name, id);
  for (int byte = 0; byte < 256; ++byte) {
    const std::string symbol = ByteSymbol(static_cast<uint8_t>(byte));
    const auto found = ids.find(symbol);
    if (found == ids.end())
      return InvalidArgument("model.vocab: no token '{}' for byte {:#04x}", symbol, byte);
    bpe.SetByte(static_cast<uint8_t>(byte), found->second);
  }
  return OkStatus();
}

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<Data> data) : data_(std::move(data)) {}
Tokenizer::~Tokenizer() = default;

StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& directory) {
  const std::string path = directory + "/tokenizer.json";
  MR_ASSIGN_OR_RETURN(const TokenizerFile file, ReadTokenizerFile(path));
  auto data = std::make_unique<Data>();
  data->nfc = file.nfc;
  if (Status status = FillBytes(file, data->bpe); !status.ok()) return Annotate(status, path);

  TokenId id_max = 0;
  for (const auto& [name, id] : file.vocab) id_max = std::max(id_max, id);
  for (const AddedToken& added : file.added_tokens) id_max = std::max(id_max, added.id);
  data->tokens.resize(static_cast<size_t>(id_max) + 1);

  for (const auto& [name, id] : file.vocab) {
    auto bytes = BytesOfSymbols(name);
    if (bytes && file.ignore_merges) data->bpe.SetWholePiece(*bytes, id);
    // A name outside the byte alphabet cannot come from text; it stands for itself.
    data->tokens[static_cast<size_t>(id)] = {bytes ? *std::move(bytes) : name, true, false};
  }
  for (size_t rank = 0; rank < file.merges.size(); ++rank) {
    const auto& merge = file.merges[rank];
    data->bpe.SetMerge(merge.left, merge.right, static_cast<int32_t>(rank), merge.result);
  }
  for (const AddedToken& added : file.added_tokens) {
    data->tokens[static_cast<size_t>(added.id)] = {added.content, true, added.is_special};
    data->added[added.content] = added.id;
    if (added.is_normalized) {
      data->normalized_added.Insert(file.nfc ? NormalizeNfc(added.content) : added.content, added.id);
    } else {
      data->raw_added.Insert(added.content, added.id);
    }
  }
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(data)));
}

void Tokenizer::Data::EncodePlain(std::string_view plain, Bpe::Scratch& scratch,
                                  std::vector<TokenId>& ids) const {
  while (!plain.empty()) {
    const size_t bytes = NextPieceBytes(plain);
    bpe.Encode(plain.substr(0, bytes), scratch, ids);
    plain.remove_prefix(bytes);
  }
}

void Tokenizer::Data::EncodeSegment(std::string_view segment, bool parse_special, Bpe::Scratch& scratch,
                                    std::vector<TokenId>& ids) const {
  std::string normalized;
  if (nfc) {
    normalized = NormalizeNfc(segment);
    segment = normalized;
  }
  if (!parse_special) return EncodePlain(segment, scratch, ids);
  SplitByAdded(
      normalized_added, segment, [&](std::string_view plain) { EncodePlain(plain, scratch, ids); },
      [&](TokenId id) { ids.push_back(id); });
}

StatusOr<std::vector<TokenId>> Tokenizer::Encode(std::string_view text, bool parse_special) const {
  for (size_t i = 0; i < text.size();) {
    const Utf8Step step = StepUtf8(text.substr(i));
    if (step.state != Utf8Step::State::kValid) return InvalidArgument("text is not UTF-8 at byte {}", i);
    i += step.bytes;
  }
  std::vector<TokenId> ids;
  Bpe::Scratch scratch;
  if (!parse_special) {
    data_->EncodeSegment(text, false, scratch, ids);
    return ids;
  }
  SplitByAdded(
      data_->raw_added, text,
      [&](std::string_view segment) { data_->EncodeSegment(segment, true, scratch, ids); },
      [&](TokenId id) { ids.push_back(id); });
  return ids;
}

std::string_view Tokenizer::Bytes(TokenId id) const {
  return HasToken(id) ? std::string_view(data_->tokens[static_cast<size_t>(id)].bytes) : std::string_view();
}

std::string Tokenizer::Decode(std::span<const TokenId> ids, bool skip_special) const {
  std::string bytes;
  for (const TokenId id : ids) {
    if (!(skip_special && IsSpecial(id))) bytes.append(Bytes(id));
  }
  return bytes;
}

bool Tokenizer::IsSpecial(TokenId id) const {
  return HasToken(id) && data_->tokens[static_cast<size_t>(id)].is_special;
}

bool Tokenizer::HasToken(TokenId id) const {
  return id >= 0 && id < size() && data_->tokens[static_cast<size_t>(id)].exists;
}

std::optional<TokenId> Tokenizer::Find(std::string_view token_text) const {
  const auto found = data_->added.find(std::string(token_text));
  if (found == data_->added.end()) return std::nullopt;
  return found->second;
}

int32_t Tokenizer::size() const { return static_cast<int32_t>(data_->tokens.size()); }

}  // namespace millrace::engine
