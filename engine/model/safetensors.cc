#include "engine/model/safetensors.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "base/json.h"

namespace millrace::engine {
namespace {

constexpr size_t kRankMax = 8;
constexpr int kMetadataDepthMax = 16;

struct DTypeInfo {
  std::string_view name;
  DType dtype;
  int64_t bytes;
};
constexpr DTypeInfo kDTypes[] = {
    {"F32", DType::kF32, 4},        {"F16", DType::kF16, 2},       {"BF16", DType::kBf16, 2},
    {"F8_E4M3", DType::kF8E4M3, 1}, {"I64", DType::kI64, 8},       {"I32", DType::kI32, 4},
    {"F64", DType::kOther, 8},      {"F8_E5M2", DType::kOther, 1}, {"F8_E8M0", DType::kOther, 1},
    {"I16", DType::kOther, 2},      {"I8", DType::kOther, 1},      {"U64", DType::kOther, 8},
    {"U32", DType::kOther, 4},      {"U16", DType::kOther, 2},     {"U8", DType::kOther, 1},
    {"BOOL", DType::kOther, 1},
};

// Takes the header's events one by one. A document tree would lose what matters here: a name that comes
// twice.
class HeaderReader : public nlohmann::json_sax<Json> {
 public:
  Status status;
  std::vector<SafetensorsEntry> entries;
  uint64_t data_bytes = 0;

  bool null() override { return Value("null"); }
  bool boolean(bool) override { return Value("a boolean"); }
  bool number_integer(number_integer_t) override { return Value("a negative number"); }
  bool number_float(number_float_t, const string_t&) override { return Value("a fraction"); }
  bool binary(binary_t&) override { return Value("binary"); }

  bool number_unsigned(number_unsigned_t number) override {
    if (place_ == Place::kShape) {
      if (entry_.shape.size() == kRankMax) return Fail("more than {} dimensions", kRankMax);
      if (number > static_cast<uint64_t>(INT64_MAX)) return Fail("dimension {} is too large", number);
      entry_.shape.push_back(static_cast<int64_t>(number));
      return true;
    }
    if (place_ == Place::kOffsets) {
      if (num_offsets_ == 2) return Fail("data_offsets has more than two numbers");
      (num_offsets_++ == 0 ? entry_.begin : entry_.end) = number;
      return true;
    }
    return Value("a number");
  }

  bool string(string_t& text) override {
    if (place_ != Place::kField || field_ != "dtype") return Value("a string");
    dtype_ = text;
    return true;
  }

  bool start_object(std::size_t) override {
    if (place_ == Place::kStart) return Enter(Place::kTensors);
    if (place_ == Place::kTensors) return Enter(Place::kField);
    if (place_ == Place::kMetadata) return Deeper();
    return Value("an object");
  }

  bool key(string_t& text) override {
    if (place_ == Place::kMetadata) return true;
    if (place_ == Place::kField) {
      if (text != "dtype" && text != "shape" && text != "data_offsets")
        return Fail("unknown field '{}'", text);
      if (!fields_.insert(text).second) return Fail("field '{}' comes twice", text);
      field_ = text;
      return true;
    }
    entry_ = SafetensorsEntry();
    entry_.name = text;
    dtype_.clear();
    field_.clear();
    fields_.clear();
    num_offsets_ = 0;
    if (!names_.insert(text).second) return Fail("comes twice");
    if (text == "__metadata__") place_ = Place::kMetadata;
    return true;
  }

  bool end_object() override {
    if (place_ == Place::kMetadata) return Shallower();
    if (place_ == Place::kField) {
      place_ = Place::kTensors;
      return Finish();
    }
    place_ = Place::kEnd;
    return true;
  }

  bool start_array(std::size_t) override {
    if (place_ == Place::kMetadata) return Deeper();
    if (place_ == Place::kField && field_ == "shape") return Enter(Place::kShape);
    if (place_ == Place::kField && field_ == "data_offsets") return Enter(Place::kOffsets);
    return Value("a list");
  }

  bool end_array() override {
    if (place_ == Place::kMetadata) return Shallower();
    place_ = Place::kField;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception&) override {
    if (status.ok()) status = DataLoss("header is not valid JSON at byte {}", position);
    return false;
  }

 private:
  // Where the next value stands.
  enum class Place { kStart, kTensors, kField, kShape, kOffsets, kMetadata, kEnd };

  bool Enter(Place place) {
    place_ = place;
    return true;
  }
  bool Deeper() { return ++metadata_depth_ <= kMetadataDepthMax || Fail("is nested too deeply"); }
  bool Shallower() {
    if (--metadata_depth_ == 0) place_ = Place::kTensors;
    return true;
  }

  // A scalar (or container) where it may stand only inside the metadata, whose content is nobody's business
  // here.
  bool Value(const char* what) {
    if (place_ == Place::kMetadata) {
      if (metadata_depth_ == 0) place_ = Place::kTensors;
      return true;
    }
    if (place_ == Place::kStart) {
      status = DataLoss("header is {}, not an object", what);
      return false;
    }
    return Fail("{} where it does not belong", what);
  }

  template <typename... Args>
  bool Fail(fmt::format_string<Args...> format, Args&&... args) {
    if (status.ok()) {
      status = DataLoss("tensor '{}': {}", entry_.name, fmt::format(format, std::forward<Args>(args)...));
    }
    return false;
  }

  // The entry is complete: checks it and keeps it.
  bool Finish() {
    for (const char* field : {"dtype", "shape", "data_offsets"}) {
      if (!fields_.contains(field)) return Fail("has no {}", field);
    }
    if (num_offsets_ != 2) return Fail("data_offsets must have two numbers");
    if (entry_.begin > entry_.end || entry_.end > data_bytes) {
      return Fail("data_offsets [{}, {}) are outside the file's {} bytes of data", entry_.begin, entry_.end,
                  data_bytes);
    }
    const auto info = std::find_if(std::begin(kDTypes), std::end(kDTypes),
                                   [this](const DTypeInfo& candidate) { return candidate.name == dtype_; });
    const bool known = info != std::end(kDTypes);
    int64_t bytes = known ? info->bytes : 1;
    for (const int64_t dim : entry_.shape) {
      if (__builtin_mul_overflow(bytes, dim, &bytes)) return Fail("shape is too large");
    }
    // Of a dtype that is not in the table only the place is known; CheckTensors refuses it where it would be
    // used.
    if (known) {
      entry_.dtype = info->dtype;
      if (static_cast<uint64_t>(bytes) != entry_.end - entry_.begin) {
        return Fail("{} bytes for a shape that needs {}", entry_.end - entry_.begin, bytes);
      }
    }
    entries.push_back(std::move(entry_));
    return true;
  }

  Place place_ = Place::kStart;
  SafetensorsEntry entry_;
  std::string dtype_;
  std::string field_;
  absl::flat_hash_set<std::string> fields_;
  absl::flat_hash_set<std::string> names_;
  int num_offsets_ = 0;
  int metadata_depth_ = 0;
};

Status CheckOverlap(const std::vector<SafetensorsEntry>& entries) {
  std::vector<const SafetensorsEntry*> sorted;
  for (const SafetensorsEntry& entry : entries) {
    if (entry.begin != entry.end) sorted.push_back(&entry);
  }
  std::sort(sorted.begin(), sorted.end(), [](const auto* a, const auto* b) { return a->begin < b->begin; });
  for (size_t i = 1; i < sorted.size(); ++i) {
    if (sorted[i]->begin < sorted[i - 1]->end) {
      return DataLoss("tensor '{}': overlaps tensor '{}'", sorted[i]->name, sorted[i - 1]->name);
    }
  }
  return OkStatus();
}

}  // namespace

StatusOr<std::vector<SafetensorsEntry>> ParseSafetensorsHeader(std::string_view header, uint64_t data_bytes) {
  HeaderReader reader;
  reader.data_bytes = data_bytes;
  if (!Json::sax_parse(header.begin(), header.end(), &reader)) {
    return reader.status.ok() ? DataLoss("header is not valid JSON") : reader.status;
  }
  MR_RETURN_IF_ERROR(CheckOverlap(reader.entries));
  return std::move(reader.entries);
}

}  // namespace millrace::engine
