#pragma once
// A real engine on a checkpoint, asked one thing at a time or many at once.

#include <memory>
#include <string>
#include <vector>

#include "engine/backend/cpu/cpu_backend.h"
#include "engine/core/engine.h"
#include "engine/tokenizer/tokenizer.h"

namespace millrace::engine {

// A checkpoint in memory. Ends the process with a message when it cannot be loaded.
struct BenchModel {
  explicit BenchModel(const std::string& directory);
  std::unique_ptr<Engine> Start(EngineOptions options, int32_t num_pages, int threads) const;
  size_t page_bytes(bool with_mtp) const;

  ModelConfig config;
  std::unique_ptr<Tokenizer> tokenizer;
  std::shared_ptr<const Weights> weights;
};

struct BenchAnswer {
  std::vector<int32_t> tokens;
  int32_t cached_tokens = 0;
  double first_token_seconds = 0;  // from submission
  double seconds = 0;              // to the last token
};

// Runs the requests at once and waits for all. Ends the process when one fails.
std::vector<BenchAnswer> AskAll(Engine* engine, const std::vector<EngineRequest>& requests);

double Percentile(std::vector<double> values, double share);

}  // namespace millrace::engine
