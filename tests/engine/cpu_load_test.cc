// Loading: the cache of packed weights, and the memory that a load takes.

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>

#include "engine/backend/cpu/cpu_weights.h"
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

}  // namespace
}  // namespace millrace::engine
