// Loading: the cache of packed weights, and the memory that a load takes.

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <mutex>

#include "engine/backend/cpu/bfloat16.h"
#include "engine/backend/cpu/cpu_weights.h"
#include "engine/model/checkpoint.h"
#include "tests/bench/random_model.h"
#include "tests/engine/tiny_model.h"

namespace millrace::engine {
namespace {

// Counts what is read of it.
class CountingTensors : public RandomTensors {
 public:
  CountingTensors() : RandomTensors(5) {}
  Status ReadRows(const std::string& name, int64_t row, int64_t rows, std::span<float> out) const override {
    if (name.find("experts") != std::string::npos) ++expert_reads;
    return RandomTensors::ReadRows(name, row, rows, out);
  }
  mutable std::atomic<int> expert_reads{0};
};

ModelConfig Small() {
  ModelConfig config = *ShapeNamed("ling-bench-s", 2);
  config.vocab_size = 1000;
  return config;
}

std::shared_ptr<const CpuWeights> Load(const TensorSource& source, const CpuWeightsOptions& options) {
  const auto weights = LoadCpuWeights(source, Small(), options);
  EXPECT_TRUE(weights.ok()) << weights.status();
  return std::dynamic_pointer_cast<const CpuWeights>(*weights);
}

bool SameBytes(const CpuWeights& a, const CpuWeights& b) {
  return std::ranges::equal(a.memory_.bytes(), b.memory_.bytes());
}

std::vector<std::filesystem::path> Files(const std::string& directory) {
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) files.push_back(entry.path());
  return files;
}

TEST(WeightCache, SecondLoadReadsNoTensorAndGivesTheSameBytes) {
  const TempDirectory directory;
  const CountingTensors source;
  CpuWeightsOptions options;
  options.cache_directory = directory.path() + "/made/on/demand";
  options.source_digest = "one";
  for (const Quantization quantization : {Quantization::kNone, Quantization::kInt8, Quantization::kInt4}) {
    options.quantization = quantization;
    source.expert_reads = 0;
    const auto first = Load(source, options);
    EXPECT_GT(source.expert_reads, 0);
    source.expert_reads = 0;
    size_t last = 0, all = 1;
    options.progress = [&](size_t done, size_t total) {
      EXPECT_GE(done, last);
      last = done;
      all = total;
    };
    const auto second = Load(source, options);
    options.progress = nullptr;
    EXPECT_EQ(last, all);
    EXPECT_EQ(source.expert_reads, 0);
    EXPECT_TRUE(SameBytes(*first, *second));
  }
  EXPECT_EQ(Files(options.cache_directory).size(), 3);  // no temporary file stays
  options.source_digest = "another";
  Load(source, options);
  EXPECT_GT(source.expert_reads, 0);
  EXPECT_EQ(Files(options.cache_directory).size(), 4);
}

TEST(WeightCache, DamageIsFoundAndMadeGood) {
  const TempDirectory directory;
  const CountingTensors source;
  CpuWeightsOptions options;
  options.quantization = Quantization::kInt4;
  options.cache_directory = directory.path();
  const auto good = Load(source, options);
  const std::filesystem::path file = Files(directory.path()).front();
  const auto size = static_cast<int64_t>(std::filesystem::file_size(file));
  // Magic, version, size, key, header digest, block digest, first and last byte of the data; then
  // truncations.
  for (const int64_t at : {int64_t{0}, int64_t{9}, int64_t{17}, int64_t{30}, int64_t{60}, int64_t{66},
                           int64_t{4096}, size - 1, -size, -int64_t{100}, int64_t{-1}}) {
    SCOPED_TRACE(at);
    if (at < 0) {
      std::filesystem::resize_file(file, static_cast<uintmax_t>(size + at));
    } else {
      std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
      stream.seekg(at);
      const auto byte = static_cast<char>(stream.get() ^ 1);
      stream.seekp(at);
      stream.put(byte);
    }
    source.expert_reads = 0;
    EXPECT_TRUE(SameBytes(*good, *Load(source, options)));
    EXPECT_GT(source.expert_reads, 0);  // made again ...
    source.expert_reads = 0;
    EXPECT_TRUE(SameBytes(*good, *Load(source, options)));
    EXPECT_EQ(source.expert_reads, 0);  // ... and kept again
  }
}

TEST(WeightCache, AnUnwritableDirectoryCostsNothing) {
  const TempDirectory directory;
  directory.Write("file", "not a directory");
  CpuWeightsOptions options;
  options.cache_directory = directory.path() + "/file";
  EXPECT_NE(Load(RandomTensors(5), options), nullptr);
}

TEST(Load, FirstErrorNamesTheTensorAndStops) {
  class Failing : public RandomTensors {
   public:
    Failing() : RandomTensors(5) {}
    Status ReadRows(const std::string& name, int64_t row, int64_t rows, std::span<float> out) const override {
      if (name.ends_with("experts.3.up_proj.weight")) return DataLoss("tensor '{}' is damaged", name);
      return RandomTensors::ReadRows(name, row, rows, out);
    }
  };
  const auto weights = LoadCpuWeights(Failing(), Small(), {});
  ASSERT_EQ(weights.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_NE(Message(weights.status()).find("experts.3.up_proj"), std::string_view::npos);
}

// Remembers which tensors a load asks for, and their shapes.
class RecordingTensors : public RandomTensors {
 public:
  RecordingTensors() : RandomTensors(5) {}
  Status ReadRows(const std::string& name, int64_t row, int64_t rows, std::span<float> out) const override {
    const std::lock_guard lock(mutex);
    auto& [all_rows, cols] = shapes[name];
    all_rows = std::max(all_rows, row + rows);
    cols = static_cast<int64_t>(out.size()) / rows;
    return RandomTensors::ReadRows(name, row, rows, out);
  }
  mutable std::mutex mutex;
  mutable std::map<std::string, std::pair<int64_t, int64_t>> shapes;  // rows, columns
};

// A file that holds those tensors in bf16, written row block by row block.
void WriteCheckpoint(const std::string& path, const RecordingTensors& source) {
  Json header;
  int64_t offset = 0;
  for (const auto& [name, shape] : source.shapes) {
    const auto [rows, cols] = shape;
    header[name] = {{"dtype", "BF16"},
                    {"shape", rows == 1 ? Json{cols} : Json{rows, cols}},
                    {"data_offsets", {offset, offset + 2 * rows * cols}}};
    offset += 2 * rows * cols;
  }
  std::ofstream file(path, std::ios::binary);
  file << WithHeader(DumpJson(header), "");
  for (const auto& [name, shape] : source.shapes) {
    const auto [rows, cols] = shape;
    for (int64_t row = 0; row < rows; row += 256) {
      const int64_t count = std::min<int64_t>(256, rows - row);
      std::vector<float> values(static_cast<size_t>(count * cols));
      ASSERT_EQ(source.RandomTensors::ReadRows(name, row, count, values), OkStatus());
      std::vector<uint16_t> narrow(values.size());
      std::transform(values.begin(), values.end(), narrow.begin(), ToBf16);
      file.write(reinterpret_cast<const char*>(narrow.data()), static_cast<int64_t>(narrow.size() * 2));
    }
  }
}

// This process's largest resident set since the last ResetPeak, file pages included.
int64_t PeakBytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmHWM:")) return std::stoll(line.substr(6)) * 1024;
  }
  return -1;
}
bool ResetPeak() {
  std::ofstream refs("/proc/self/clear_refs");
  refs << "5" << std::flush;
  return refs.good();
}

TEST(Load, HoldsLittleBesideThePackedWeights) {
#ifdef MILLRACE_SANITIZED
  GTEST_SKIP() << "a sanitizer's own memory is part of the resident set";
#endif
  const TempDirectory directory;
  const ModelConfig config = *ShapeNamed("ling-bench-s", 0);
  {
    const RecordingTensors source;
    ASSERT_TRUE(LoadCpuWeights(source, config, {}).ok());
    WriteCheckpoint(directory.path() + "/model.safetensors", source);
  }
  const auto checkpoint = Checkpoint::Open(directory.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  ASSERT_GT((*checkpoint)->total_bytes(), int64_t{160} << 20);
  CpuWeightsOptions options;
  options.quantization = Quantization::kInt4;
  if (!ResetPeak()) GTEST_SKIP() << "/proc/self/clear_refs cannot be written here";
  const int64_t before = PeakBytes();
  const auto weights = LoadCpuWeights(**checkpoint, config, options);
  ASSERT_TRUE(weights.ok()) << weights.status();
  const int64_t beside = PeakBytes() - before - static_cast<int64_t>((*weights)->bytes());
  // A few MiB per thread, and the huge pages' rounding. The file, 3 times the packed weights, was read on the
  // way and left again.
  EXPECT_LT(beside, int64_t{48} << 20) << "of a file of " << (*checkpoint)->total_bytes();
  RecordProperty("beside_mib", static_cast<int>(beside >> 20));
}

}  // namespace
}  // namespace millrace::engine
