#include "engine/model/checkpoint.h"

#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "base/file.h"
#include "base/json.h"
#include "engine/model/fp8_scales.h"
#include "engine/model/safetensors.h"

namespace millrace::engine {
namespace {

constexpr size_t kIndexBytesMax = size_t{256} << 20;
constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";

using TensorMap = absl::flat_hash_map<std::string, TensorView>;

float Bf16ToFloat(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

float F16ToFloat(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000U) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fU;
  const uint32_t mantissa = bits & 0x3ffU;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in fp32
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t wide_exponent = exponent == 0x1f ? 0xff : exponent + (127 - 15);
  return std::bit_cast<float>(sign | (wide_exponent << 23) | (mantissa << 13));
}

// E4M3 in its "fn" form: bias 7, no infinities, all ones is NaN; largest 448.
constexpr std::array<float, 256> MakeE4M3Table() {
  std::array<float, 256> table{};
  for (int code = 0; code < 256; ++code) {
    const int exponent = (code >> 3) & 0xf;
    const int mantissa = code & 0x7;
    float value = static_cast<float>(exponent == 0 ? mantissa : mantissa + 8) * 0x1p-9f;
    for (int i = 1; i < exponent; ++i) value *= 2;
    if ((code & 0x7f) == 0x7f) value = std::numeric_limits<float>::quiet_NaN();
    table[static_cast<size_t>(code)] = code & 0x80 ? -value : value;
  }
  return table;
}
constexpr std::array<float, 256> kE4M3 = MakeE4M3Table();

// Tensor data has no alignment to count on, hence memcpy.
template <typename Raw, float (*kConvert)(Raw)>
void Convert(const std::byte* from, std::span<float> out) {
  for (size_t i = 0; i < out.size(); ++i) {
    Raw raw;
    std::memcpy(&raw, from + i * sizeof(Raw), sizeof(Raw));
    out[i] = kConvert(raw);
  }
}

void ScaledE4M3(const TensorView& tensor, const TensorView& scales, int64_t row, std::span<float> out) {
  const int64_t cols = tensor.shape[1];
  const int64_t scale_cols = scales.shape[1];
  const int64_t rows = cols == 0 ? 0 : static_cast<int64_t>(out.size()) / cols;
  for (int64_t r = 0; r < rows; ++r) {
    const std::byte* from = tensor.bytes.data() + (row + r) * cols;
    const std::byte* scale_row = scales.bytes.data() + ((row + r) / kFp8Block) * scale_cols * 4;
    float* to = out.data() + r * cols;
    for (int64_t block = 0; block < scale_cols; ++block) {
      float scale;
      std::memcpy(&scale, scale_row + block * 4, 4);
      const int64_t end = std::min(cols, (block + 1) * kFp8Block);
      for (int64_t c = block * kFp8Block; c < end; ++c) to[c] = kE4M3[static_cast<uint8_t>(from[c])] * scale;
    }
  }
}

// Adds the tensors of one safetensors file. Their bytes stay valid as long as the mapping does.
Status AddFile(const MappedFile& file, TensorMap* tensors) {
  const std::span<const std::byte> bytes = file.bytes();
  if (bytes.size() < 8)
    return DataLoss("{}: {} bytes are too few for a safetensors file", file.path(), bytes.size());
  uint64_t header_bytes = 0;
  for (size_t i = 0; i < 8; ++i) header_bytes |= static_cast<uint64_t>(bytes[i]) << (8 * i);
  if (header_bytes > std::min<uint64_t>(bytes.size() - 8, kSafetensorsHeaderBytesMax)) {
    return DataLoss("{}: header length {} does not fit a file of {} bytes (truncated, or not safetensors)",
                    file.path(), header_bytes, bytes.size());
  }
  const std::string_view header(reinterpret_cast<const char*>(bytes.data()) + 8, header_bytes);
  const std::span<const std::byte> data = bytes.subspan(8 + header_bytes);
  StatusOr<std::vector<SafetensorsEntry>> entries = ParseSafetensorsHeader(header, data.size());
  if (!entries.ok()) return Annotate(entries.status(), file.path());
  for (SafetensorsEntry& entry : *entries) {
    TensorView view{entry.name, file.path(), entry.dtype, std::move(entry.shape),
                    data.subspan(entry.begin, entry.end - entry.begin)};
    const auto [existing, added] = tensors->try_emplace(entry.name, std::move(view));
    if (!added) {
      return DataLoss("{}: tensor '{}' is also in {}", file.path(), entry.name, existing->second.file);
    }
  }
  return OkStatus();
}

// Shard name -> the tensors that the index expects in it.
StatusOr<std::map<std::string, std::vector<std::string>>> ReadIndex(const std::string& path) {
  MR_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kIndexBytesMax));
  const StatusOr<Json> json = ParseJson(text);
  if (!json.ok()) return Annotate(json.status(), path);
  if (!json->is_object() || !json->contains("weight_map") || !(*json)["weight_map"].is_object()) {
    return DataLoss("{}: weight_map: must be an object", path);
  }
  std::map<std::string, std::vector<std::string>> shards;
  for (const auto& item : (*json)["weight_map"].items()) {
    if (!item.value().is_string())
      return DataLoss("{}: weight_map.{}: must be a file name", path, item.key());
    const std::string shard = item.value().get<std::string>();
    if (shard.empty() || shard == "." || shard == ".." || shard.find('/') != std::string::npos ||
        shard.find('\0') != std::string::npos) {
      return DataLoss("{}: weight_map.{}: '{}' is not a plain file name", path, item.key(), shard);
    }
    shards[shard].push_back(item.key());
  }
  if (shards.empty()) return DataLoss("{}: weight_map: is empty", path);
  return shards;
}

}  // namespace

struct Checkpoint::Data {
  std::string directory;
  std::vector<MappedFile> files;
  TensorMap tensors;  // names and views; the bytes are in `files`
  std::string files_identity;

  Status Add(MappedFile file) {
    struct stat status;
    if (stat(file.path().c_str(), &status) != 0)
      return NotFound("{}: vanished while it was opened", file.path());
    files_identity += fmt::format("{} {} {}.{:09d}\n", file.path().substr(file.path().rfind('/') + 1),
                                  file.bytes().size(), status.st_mtim.tv_sec, status.st_mtim.tv_nsec);
    MR_RETURN_IF_ERROR(AddFile(file, &tensors));
    files.push_back(std::move(file));
    return OkStatus();
  }
};

StatusOr<TensorView> Fp8Scales(const Checkpoint& checkpoint, const TensorView& tensor) {
  const std::string name = tensor.name + kFp8ScaleSuffix;
  const StatusOr<TensorView> scales = checkpoint.Tensor(name);
  if (!scales.ok()) {
    return DataLoss("{}: tensor '{}': is F8_E4M3 but its scales '{}' are missing", tensor.file, tensor.name,
                    name);
  }
  if (tensor.shape.size() != 2) {
    return DataLoss("{}: tensor '{}': is F8_E4M3 with shape {}, but '{}' scale blocks of a matrix",
                    tensor.file, tensor.name, ShapeText(tensor.shape), name);
  }
  const auto blocks = [](int64_t size) { return size / kFp8Block + (size % kFp8Block != 0 ? 1 : 0); };
  const std::vector<int64_t> shape = {blocks(tensor.shape[0]), blocks(tensor.shape[1])};
  if (scales->dtype != DType::kF32 || scales->shape != shape) {
    return DataLoss("{}: tensor '{}': is {} {}, but '{}' of shape {} needs F32 {}", scales->file, name,
                    DTypeName(scales->dtype), ShapeText(scales->shape), tensor.name, ShapeText(tensor.shape),
                    ShapeText(shape));
  }
  return *scales;
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

int DTypeBytes(DType dtype) {
  switch (dtype) {
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kF16:
    case DType::kBf16:
      return 2;
    case DType::kF8E4M3:
      return 1;
    case DType::kI64:
      return 8;
    case DType::kOther:
      return 0;
  }
  return 0;
}

std::string DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kF16:
      return "F16";
    case DType::kBf16:
      return "BF16";
    case DType::kF8E4M3:
      return "F8_E4M3";
    case DType::kI64:
      return "I64";
    case DType::kI32:
      return "I32";
    case DType::kOther:
      return "another dtype";
  }
  return "another dtype";
}

int64_t TensorView::elements() const {
  int64_t count = 1;
  for (const int64_t dim : shape) count *= dim;
  return count;
}

Checkpoint::Checkpoint(std::unique_ptr<Data> data) : data_(std::move(data)) {}
Checkpoint::~Checkpoint() = default;

StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& directory) {
  auto data = std::make_unique<Data>();
  data->directory = directory;
  StatusOr<MappedFile> single = MappedFile::Open(directory + "/" + kSingleFile);
  if (single.ok()) {
    MR_RETURN_IF_ERROR(data->Add(std::move(*single)));
    return std::unique_ptr<Checkpoint>(new Checkpoint(std::move(data)));
  }
  if (single.status().code() != absl::StatusCode::kNotFound) return single.status();

  const std::string index_path = directory + "/" + kIndexFile;
  const auto shards = ReadIndex(index_path);
  if (shards.status().code() == absl::StatusCode::kNotFound) {
    return NotFound("{}: has neither {} nor {}", directory, kSingleFile, kIndexFile);
  }
  MR_RETURN_IF_ERROR(shards.status());
  for (const auto& [shard, names] : *shards) {
    StatusOr<MappedFile> file = MappedFile::Open(directory + "/" + shard);
    if (file.status().code() == absl::StatusCode::kNotFound) {
      return NotFound("{}: shard '{}' is missing ({} tensors, among them '{}')", index_path, shard,
                      names.size(), names[0]);
    }
    MR_RETURN_IF_ERROR(file.status());
    MR_RETURN_IF_ERROR(data->Add(std::move(*file)));
    const std::string& path = data->files.back().path();
    for (const std::string& name : names) {
      const auto found = data->tensors.find(name);
      if (found == data->tensors.end() || found->second.file != path) {
        return DataLoss("{}: tensor '{}' is in the index but not in the file", path, name);
      }
    }
  }
  return std::unique_ptr<Checkpoint>(new Checkpoint(std::move(data)));
}

StatusOr<TensorView> Checkpoint::Tensor(const std::string& name) const {
  const auto found = data_->tensors.find(name);
  if (found == data_->tensors.end()) return NotFound("{}: tensor '{}' is missing", data_->directory, name);
  return found->second;
}

bool Checkpoint::Has(const std::string& name) const { return data_->tensors.contains(name); }

std::vector<std::string> Checkpoint::Names() const {
  std::vector<std::string> names;
  names.reserve(data_->tensors.size());
  for (const auto& [name, view] : data_->tensors) names.push_back(name);
  std::sort(names.begin(), names.end());
  return names;
}

int64_t Checkpoint::total_bytes() const {
  int64_t bytes = 0;
  for (const auto& [name, view] : data_->tensors) bytes += static_cast<int64_t>(view.bytes.size());
  return bytes;
}

const std::string& Checkpoint::directory() const { return data_->directory; }

const std::string& Checkpoint::files_identity() const { return data_->files_identity; }

StatusOr<DType> Checkpoint::TypeOf(const std::string& name) const {
  MR_ASSIGN_OR_RETURN(const TensorView tensor, Tensor(name));
  return tensor.dtype;
}

// Whole pages only: the neighbours' bytes on the edges may still be wanted.
void Checkpoint::Forget(const std::string& name, int64_t row, int64_t rows) const {
  const auto found = data_->tensors.find(name);
  if (found == data_->tensors.end() || found->second.shape.empty()) return;
  const TensorView& tensor = found->second;
  const int64_t row_bytes = tensor.shape.back() * DTypeBytes(tensor.dtype);
  constexpr uintptr_t kPage = 4096;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.bytes.data() + row * row_bytes);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t end = (begin + static_cast<uintptr_t>(rows * row_bytes)) / kPage * kPage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
}

Status Checkpoint::ReadRows(const std::string& name, int64_t row, int64_t rows, std::span<float> out) const {
  const auto found = data_->tensors.find(name);
  if (found == data_->tensors.end()) return NotFound("{}: tensor '{}' is missing", data_->directory, name);
  const TensorView& tensor = found->second;
  if (tensor.shape.empty() || tensor.shape.size() > 2) {
    return InvalidArgument("{}: tensor '{}': has {} dimensions, not one or two", tensor.file, name,
                           tensor.shape.size());
  }
  const int64_t all_rows = tensor.shape.size() == 2 ? tensor.shape[0] : 1;
  const int64_t cols = tensor.shape.back();
  if (row < 0 || rows < 0 || row > all_rows || rows > all_rows - row) {
    return InvalidArgument("{}: tensor '{}': rows {} + {} are outside its {}", tensor.file, name, row, rows,
                           all_rows);
  }
  if (static_cast<int64_t>(out.size()) != rows * cols) {
    return InvalidArgument("{}: tensor '{}': {} rows of {} do not fill {} places", tensor.file, name, rows,
                           cols, out.size());
  }
  const std::byte* from = tensor.bytes.data() + row * cols * DTypeBytes(tensor.dtype);
  switch (tensor.dtype) {
    case DType::kF32:
      if (!out.empty()) std::memcpy(out.data(), from, out.size_bytes());
      return OkStatus();
    case DType::kBf16:
      Convert<uint16_t, Bf16ToFloat>(from, out);
      return OkStatus();
    case DType::kF16:
      Convert<uint16_t, F16ToFloat>(from, out);
      return OkStatus();
    case DType::kF8E4M3: {
      MR_ASSIGN_OR_RETURN(const TensorView scales, Fp8Scales(*this, tensor));
      ScaledE4M3(tensor, scales, row, out);
      return OkStatus();
    }
    default:
      return Unimplemented("{}: tensor '{}': {} cannot be read as numbers", tensor.file, name,
                           DTypeName(tensor.dtype));
  }
}

}  // namespace millrace::engine
