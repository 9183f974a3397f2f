#pragma once
// Safetensors checkpoints by mmap: model.safetensors or shards with model.safetensors.index.json.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "engine/model/config.h"
#include "engine/model/tensor_source.h"

namespace millrace::engine {

int DTypeBytes(DType dtype);  // 0 for kOther
std::string DTypeName(DType dtype);

// A tensor inside a mapped file; valid while its Checkpoint lives. Row-major.
struct TensorView {
  std::string name;
  std::string file;  // for messages
  DType dtype = DType::kOther;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;
  int64_t elements() const;
};

// Immutable after Open; any thread. Every header is bounds-checked when opened: offsets inside the file, no
// overlap, byte count = shape * dtype. Errors name the file and the tensor (DataLoss for damage, NotFound for
// absence).
class Checkpoint : public TensorSource {
 public:
  static StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& directory);
  ~Checkpoint() override;
  StatusOr<TensorView> Tensor(const std::string& name) const;
  bool Has(const std::string& name) const;
  std::vector<std::string> Names() const;  // sorted
  int64_t total_bytes() const;
  const std::string& directory() const;

  // Of the files: names, sizes and times of change. With ModelDigest, which samples, it tells a changed file.
  const std::string& files_identity() const;

  StatusOr<DType> TypeOf(const std::string& name) const override;
  // Block-FP8 tensors ("<name>_scale_inv" present) are multiplied by their scales, exactly in fp32.
  Status ReadRows(const std::string& name, int64_t row, int64_t rows, std::span<float> out) const override;
  void Forget(const std::string& name, int64_t row, int64_t rows) const override;

 private:
  struct Data;
  explicit Checkpoint(std::unique_ptr<Data> data);
  std::unique_ptr<Data> data_;
};

// Checks that every tensor the config calls for is there with its exact shape and a usable dtype, detects the
// MTP layer (the layer that owns eh_proj.weight), and sets config->num_layers / num_mtp_layers accordingly.
// Lists tensors that nothing uses in `unused`.
Status CheckTensors(const Checkpoint& checkpoint, ModelConfig* config, std::vector<std::string>* unused);

// Digest of config and weights' identity (names, shapes, dtypes, sizes and sampled content), 32 hex
// characters: equal on every host that serves the same files. P and D pair only when theirs are equal.
std::string ModelDigest(const Checkpoint& checkpoint, const ModelConfig& config);

}  // namespace millrace::engine
