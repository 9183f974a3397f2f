#include "engine/tokenizer/tokenizer_file.h"

#include <algorithm>
#include <array>
#include <string_view>
#include <unordered_map>
#include <unordered_set>

#include "base/file.h"
#include "base/json.h"
#include "engine/tokenizer/pretokenizer.h"

namespace millrace::engine {
namespace {

constexpr size_t kFileBytesMax = size_t{256} << 20;
constexpr int64_t kIdMax = (1 << 24) - 1;

using VocabIndex = std::unordered_map<std::string_view, TokenId>;

// object[key], or null when it is missing.
const Json& Field(const Json& object, const char* key) {
  static const Json null;
  if (!object.is_object()) return null;
  const auto found = object.find(key);
  return found == object.end() ? null : *found;
}

// The "type" of a component, "null" for none.
std::string TypeOf(const Json& component) {
  if (component.is_null()) return "null";
  const Json& type = Field(component, "type");
  return type.is_string() ? type.get<std::string>() : "(no type)";
}

Status RequireBool(const Json& object, const char* key, bool required, bool if_missing,
                   std::string_view where) {
  auto value = GetBool(object, key);
  if (!value.ok()) return Annotate(value.status(), where);
  if (value->value_or(if_missing) == required) return OkStatus();
  return Unimplemented("{}.{}: only {} is implemented", where, key, required);
}

StatusOr<TokenId> ReadId(const Json& value, std::string_view where) {
  if (!value.is_number_integer() || value < 0 || value > kIdMax) {
    return InvalidArgument("{}: a token id must be an integer from 0 to {}", where, kIdMax);
  }
  return value.get<TokenId>();
}

Status ReadNormalizer(const Json& normalizer, TokenizerFile& file) {
  const std::string type = TypeOf(normalizer);
  if (type == "null") return OkStatus();
  if (type == "NFC") {
    file.nfc = true;
    return OkStatus();
  }
  const Json& parts = Field(normalizer, "normalizers");
  if (type != "Sequence" || !parts.is_array()) {
    return Unimplemented("normalizer: {} is not implemented (null and NFC are)", type);
  }
  for (const Json& part : parts) {
    if (TypeOf(part) != "NFC")
      return Unimplemented("normalizer: {} is not implemented (NFC is)", TypeOf(part));
    file.nfc = true;
  }
  return OkStatus();
}

Status CheckPreTokenizer(const Json& pre_tokenizer) {
  const Json& parts = Field(pre_tokenizer, "pretokenizers");
  if (TypeOf(pre_tokenizer) != "Sequence" || !parts.is_array() || parts.size() != 2 ||
      TypeOf(parts[0]) != "Split" || TypeOf(parts[1]) != "ByteLevel") {
    return Unimplemented("pre_tokenizer: only a Sequence of Split and ByteLevel is implemented, found {}",
                         TypeOf(pre_tokenizer));
  }
  const Json& pattern = Field(Field(parts[0], "pattern"), "Regex");
  if (!pattern.is_string() || pattern.get_ref<const std::string&>() != kLingSplitPattern) {
    return Unimplemented(
        "pre_tokenizer.pretokenizers[0].pattern: only the Ling pattern is implemented, found {}",
        DumpJson(Field(parts[0], "pattern")));
  }
  if (Field(parts[0], "behavior") != "Isolated") {
    return Unimplemented("pre_tokenizer.pretokenizers[0].behavior: only \"Isolated\" is implemented");
  }
  MR_RETURN_IF_ERROR(RequireBool(parts[0], "invert", false, false, "pre_tokenizer.pretokenizers[0]"));
  MR_RETURN_IF_ERROR(
      RequireBool(parts[1], "add_prefix_space", false, true, "pre_tokenizer.pretokenizers[1]"));
  return RequireBool(parts[1], "use_regex", false, true, "pre_tokenizer.pretokenizers[1]");
}

// Only post-processors that leave the ids of a single text as they are.
Status CheckPostProcessor(const Json& processor) {
  const std::string type = TypeOf(processor);
  if (type == "null" || type == "ByteLevel") return OkStatus();
  if (type == "Sequence" && Field(processor, "processors").is_array()) {
    for (const Json& part : Field(processor, "processors")) MR_RETURN_IF_ERROR(CheckPostProcessor(part));
    return OkStatus();
  }
  const Json& single = Field(processor, "single");
  if (type == "TemplateProcessing" && single.is_array() && single.size() == 1 &&
      single[0].contains("Sequence")) {
    return OkStatus();
  }
  return Unimplemented("post_processor: {} that adds tokens is not implemented", type);
}

Status CheckModelOptions(const Json& model) {
  if (TypeOf(model) != "BPE")
    return Unimplemented("model.type: {} is not implemented (BPE is)", TypeOf(model));
  auto dropout = GetNumber(model, "dropout");
  if (!dropout.ok()) return Annotate(dropout.status(), "model");
  if (dropout->value_or(0.0) != 0.0)
    return Unimplemented("model.dropout: merges left out at random are not implemented");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    auto affix = GetString(model, key);
    if (!affix.ok()) return Annotate(affix.status(), "model");
    if (!affix->value_or("").empty()) return Unimplemented("model.{}: not implemented", key);
  }
  return OkStatus();
}

Status ReadVocab(const Json& vocab, TokenizerFile& file) {
  if (!vocab.is_object() || vocab.empty())
    return InvalidArgument("model.vocab: must be an object with entries");
  std::unordered_set<TokenId> ids;
  file.vocab.reserve(vocab.size());
  for (const auto& [name, value] : vocab.items()) {
    MR_ASSIGN_OR_RETURN(const TokenId id, ReadId(value, "model.vocab"));
    if (!ids.insert(id).second) return InvalidArgument("model.vocab: id {} is given to two tokens", id);
    file.vocab.emplace_back(name, id);
  }
  return OkStatus();
}

// A merge is ["a", "b"] or "a b".
StatusOr<std::array<std::string_view, 2>> SplitMerge(const Json& merge, size_t rank) {
  if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
    return std::array<std::string_view, 2>{merge[0].get_ref<const std::string&>(),
                                           merge[1].get_ref<const std::string&>()};
  }
  if (merge.is_string()) {
    const std::string_view text = merge.get_ref<const std::string&>();
    const size_t space = text.find(' ');
    if (space != std::string_view::npos && text.find(' ', space + 1) == std::string_view::npos) {
      return std::array<std::string_view, 2>{text.substr(0, space), text.substr(space + 1)};
    }
  }
  return InvalidArgument("model.merges[{}]: must be two strings, or one string with one space", rank);
}

Status ReadMerges(const Json& merges, const VocabIndex& vocab, TokenizerFile& file) {
  if (!merges.is_array()) return InvalidArgument("model.merges: must be an array");
  file.merges.reserve(merges.size());
  std::string joined;
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    MR_ASSIGN_OR_RETURN(const auto pair, SplitMerge(merges[rank], rank));
    joined.assign(pair[0]).append(pair[1]);
    const std::array<VocabIndex::const_iterator, 3> found = {vocab.find(pair[0]), vocab.find(pair[1]),
                                                             vocab.find(joined)};
    if (std::find(found.begin(), found.end(), vocab.end()) != found.end()) {
      return InvalidArgument("model.merges[{}]: '{}' + '{}' is not wholly in model.vocab", rank, pair[0],
                             pair[1]);
    }
    file.merges.push_back({found[0]->second, found[1]->second, found[2]->second});
  }
  return OkStatus();
}

StatusOr<AddedToken> ReadAddedToken(const Json& json, std::string_view where) {
  if (!json.is_object()) return InvalidArgument("{}: must be an object", where);
  MR_ASSIGN_OR_RETURN(const TokenId id, ReadId(Field(json, "id"), fmt::format("{}.id", where)));
  auto content = GetString(json, "content");
  if (!content.ok()) return Annotate(content.status(), where);
  if (content->value_or("").empty())
    return InvalidArgument("{}.content: must be a string with characters", where);
  for (const char* key : {"single_word", "lstrip", "rstrip"}) {
    MR_RETURN_IF_ERROR(RequireBool(json, key, false, false, where));
  }
  auto special = GetBool(json, "special");
  if (!special.ok()) return Annotate(special.status(), where);
  auto normalized = GetBool(json, "normalized");
  if (!normalized.ok()) return Annotate(normalized.status(), where);
  const bool is_special = special->value_or(false);
  return AddedToken{id, **content, is_special, normalized->value_or(!is_special)};
}

Status ReadAddedTokens(const Json& tokens, const VocabIndex& vocab, TokenizerFile& file) {
  if (tokens.is_null()) return OkStatus();
  if (!tokens.is_array()) return InvalidArgument("added_tokens: must be an array");
  std::unordered_map<TokenId, std::string_view> name_of_id;
  for (const auto& [name, id] : file.vocab) name_of_id[id] = name;
  VocabIndex seen;
  file.added_tokens.reserve(tokens.size());  // `seen` and `name_of_id` look into it
  for (size_t i = 0; i < tokens.size(); ++i) {
    const std::string where = fmt::format("added_tokens[{}]", i);
    MR_ASSIGN_OR_RETURN(AddedToken token, ReadAddedToken(tokens[i], where));
    file.added_tokens.push_back(std::move(token));
    const AddedToken& added = file.added_tokens.back();
    const auto in_vocab = vocab.find(added.content);
    if (in_vocab != vocab.end() && in_vocab->second != added.id) {
      return InvalidArgument("{}: '{}' has id {}, but {} in model.vocab", where, added.content, added.id,
                             in_vocab->second);
    }
    const auto [named, is_new_id] = name_of_id.try_emplace(added.id, added.content);
    if (!is_new_id && named->second != added.content) {
      return InvalidArgument("{}: id {} belongs to another token", where, added.id);
    }
    if (!seen.try_emplace(added.content, added.id).second) {
      return InvalidArgument("{}: '{}' is given twice", where, added.content);
    }
  }
  return OkStatus();
}

StatusOr<TokenizerFile> FromJson(const Json& root) {
  if (!root.is_object()) return InvalidArgument("must be a JSON object");
  TokenizerFile file;
  MR_RETURN_IF_ERROR(ReadNormalizer(Field(root, "normalizer"), file));
  MR_RETURN_IF_ERROR(CheckPreTokenizer(Field(root, "pre_tokenizer")));
  MR_RETURN_IF_ERROR(CheckPostProcessor(Field(root, "post_processor")));
  if (const std::string type = TypeOf(Field(root, "decoder")); type != "ByteLevel") {
    return Unimplemented("decoder: {} is not implemented (ByteLevel is)", type);
  }
  const Json& model = Field(root, "model");
  MR_RETURN_IF_ERROR(CheckModelOptions(model));
  auto ignore_merges = GetBool(model, "ignore_merges");
  if (!ignore_merges.ok()) return Annotate(ignore_merges.status(), "model");
  file.ignore_merges = ignore_merges->value_or(false);
  MR_RETURN_IF_ERROR(ReadVocab(Field(model, "vocab"), file));
  VocabIndex vocab;
  vocab.reserve(file.vocab.size());
  for (const auto& [name, id] : file.vocab) vocab.emplace(name, id);
  MR_RETURN_IF_ERROR(ReadMerges(Field(model, "merges"), vocab, file));
  MR_RETURN_IF_ERROR(ReadAddedTokens(Field(root, "added_tokens"), vocab, file));
  return file;
}

}  // namespace

StatusOr<TokenizerFile> ReadTokenizerFile(const std::string& path) {
  MR_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kFileBytesMax));
  auto root = ParseJson(text);
  if (!root.ok()) return Annotate(root.status(), path);
  auto file = FromJson(*root);
  if (!file.ok()) return Annotate(file.status(), path);
  return file;
}

}  // namespace millrace::engine
