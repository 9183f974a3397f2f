// peer_bench: what engine_bench measures, of llama.cpp or of its fork ik_llama.cpp, over their C interface.
// README.md of this folder says how it is built; the project's own build has neither.
//
//   peer_bench MODEL.gguf THREADS UBATCH PREFILL[,..] STREAMS[,..] CONTEXT[,..] [repack] [noflash]
//
// Every token is random, and each stream has its own: equal ones would choose the same experts. A context is
// computed once and copied into each stream. Prints one JSON object per line: medians, with the lowest and
// the highest of the repeats. With one thread, its processor time counts.

#include <llama.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace {

constexpr size_t kPrefillRepeats = 5;
constexpr double kPrefillSeconds = 12;  // nothing is repeated after that
constexpr int kDecodeSteps = 12;

// Processor time with one thread, so that what else the machine does matters little; else the time of day.
bool cpu_time = false;
double Now() {
  timespec time{};
  clock_gettime(cpu_time ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

std::vector<int> Numbers(const char* text) {
  std::vector<int> numbers;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) numbers.push_back(std::stoi(part));
  return numbers;
}

void Require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "peer_bench: %s\n", what);
  std::exit(1);
}

#ifdef PEER_IK
llama_model* Load(const char* path, bool repack) {
  llama_model_params params = llama_model_default_params();
  params.repack_tensors = repack;
  if (repack) params.use_mmap = false;
  return llama_model_load_from_file(path, params);
}
llama_context* MakeContext(llama_model* model, llama_context_params params, bool flash) {
  params.flash_attn = flash;
  return llama_init_from_model(model, params);
}
void Clear(llama_context* context) { llama_kv_cache_clear(context); }
int Vocabulary(const llama_model* model) { return llama_n_vocab(model); }
size_t ReadState(llama_context* c, std::vector<uint8_t>* state) {
  state->resize(llama_state_seq_get_size(c, 0, 0));
  return llama_state_seq_get_data(c, state->data(), state->size(), 0, 0);
}
size_t WriteState(llama_context* c, const std::vector<uint8_t>& state, int sequence) {
  return llama_state_seq_set_data(c, state.data(), state.size(), sequence, 0);
}
#else
llama_model* Load(const char* path, bool) {
  return llama_model_load_from_file(path, llama_model_default_params());
}
llama_context* MakeContext(llama_model* model, llama_context_params params, bool flash) {
  if (!flash) params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
  return llama_init_from_model(model, params);
}
void Clear(llama_context* context) { llama_memory_clear(llama_get_memory(context), true); }
int Vocabulary(const llama_model* model) { return llama_vocab_n_tokens(llama_model_get_vocab(model)); }
size_t ReadState(llama_context* c, std::vector<uint8_t>* state) {
  state->resize(llama_state_seq_get_size(c, 0));
  return llama_state_seq_get_data(c, state->data(), state->size(), 0);
}
size_t WriteState(llama_context* c, const std::vector<uint8_t>& state, int sequence) {
  return llama_state_seq_set_data(c, state.data(), state.size(), sequence);
}
#endif

class Bench {
 public:
  Bench(llama_model* model, int threads, int ubatch, int streams_max, int tokens_max, bool flash)
      : vocabulary_(Vocabulary(model)), threads_(threads), ubatch_(ubatch) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = static_cast<uint32_t>(streams_max * ((tokens_max + 255) / 256 * 256));
    params.n_batch = 2048;
    params.n_ubatch = static_cast<uint32_t>(ubatch);
    params.n_seq_max = static_cast<uint32_t>(streams_max);
    params.n_threads = threads;
    params.n_threads_batch = threads;
    context_ = MakeContext(model, params, flash);
    Require(context_ != nullptr, "no context");
    batch_ = llama_batch_init(2048, 0, 1);
  }

  void Prefill(int tokens) {
    Clear(context_);
    Compute(std::min(tokens, 128));  // warms up
    std::vector<double> seconds;
    const double start = Now();
    while (seconds.empty() || (seconds.size() < kPrefillRepeats && Now() - start < kPrefillSeconds)) {
      Clear(context_);
      const double begin = Now();
      Compute(tokens);
      seconds.push_back(Now() - begin);
    }
    Report("prefill", tokens, 0, tokens, seconds);
  }

  // Leaves `state` with a sequence of that many tokens.
  void MakeState(int tokens, std::vector<uint8_t>* state) {
    Clear(context_);
    Compute(tokens);
    Require(ReadState(context_, state) > 0, "no state");
  }

  void Decode(int streams, int context, const std::vector<uint8_t>& state) {
    Clear(context_);
    for (int s = 0; s < streams && context > 0; ++s) {
      Require(WriteState(context_, state, s) > 0, "cannot copy a context");
    }
    std::vector<double> seconds;
    for (int step = 0; step <= kDecodeSteps; ++step) {
      batch_.n_tokens = 0;
      for (int s = 0; s < streams; ++s) Add(context + step, s, true);
      const double begin = Now();
      Run();
      if (step > 0) seconds.push_back(Now() - begin);
    }
    Report("decode", streams, context, streams, seconds);
  }

 private:
  void Add(int position, int sequence, bool logits) {
    const auto i = static_cast<size_t>(batch_.n_tokens++);
    batch_.token[i] = static_cast<int32_t>(random_() % static_cast<uint32_t>(vocabulary_ - 8));
    batch_.pos[i] = position;
    batch_.n_seq_id[i] = 1;
    batch_.seq_id[i][0] = sequence;
    batch_.logits[i] = logits ? 1 : 0;
  }
  void Run() {
    Require(llama_decode(context_, batch_) == 0, "llama_decode failed");
    const float* logits = llama_get_logits_ith(context_, batch_.n_tokens - 1);
    Require(logits != nullptr && logits[0] == logits[0], "logits are not numbers");
  }
  void Compute(int tokens) {
    for (int first = 0; first < tokens; first += 2048) {
      batch_.n_tokens = 0;
      const int count = std::min(2048, tokens - first);
      for (int i = 0; i < count; ++i) Add(first + i, 0, i + 1 == count);
      Run();
    }
  }
  void Report(const char* phase, int size, int context, int tokens, std::vector<double> seconds) const {
    std::sort(seconds.begin(), seconds.end());
    std::printf(
        "{\"phase\":\"%s\",\"size\":%d,\"context\":%d,\"threads\":%d,\"ubatch\":%d,\"tokens_per_s\":%.2f,"
        "\"tokens_per_s_low\":%.2f,\"tokens_per_s_high\":%.2f}\n",
        phase, size, context, threads_, ubatch_, tokens / seconds[seconds.size() / 2],
        tokens / seconds.back(), tokens / seconds.front());
    std::fflush(stdout);
  }

  const int vocabulary_;
  const int threads_;
  const int ubatch_;
  llama_context* context_ = nullptr;
  llama_batch batch_;
  std::mt19937 random_{1};
};

}  // namespace

int main(int argc, char** argv) {
  Require(argc >= 7, "see the head of peer_bench.cc for the arguments");
  cpu_time = std::atoi(argv[2]) == 1;
  const std::vector<int> prefills = Numbers(argv[4]);
  const std::vector<int> streams = Numbers(argv[5]);
  const std::vector<int> contexts = Numbers(argv[6]);
  llama_log_set(
      [](ggml_log_level level, const char* text, void*) {
        if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
      },
      nullptr);
  const auto given = [&](const char* word) {
    return std::any_of(argv + 7, argv + argc, [&](const char* arg) { return std::strcmp(arg, word) == 0; });
  };
  llama_model* const model = Load(argv[1], given("repack"));
  Require(model != nullptr, "cannot load the model");
  // Either engine's memory is divided evenly among as many streams as there may be.
  int tokens_max = *std::max_element(prefills.begin(), prefills.end());
  for (const int context : contexts) tokens_max = std::max(tokens_max, context + kDecodeSteps + 8);
  const int streams_max = std::max(1, *std::max_element(streams.begin(), streams.end()));
  Bench bench(model, std::atoi(argv[2]), std::atoi(argv[3]), streams_max, tokens_max, !given("noflash"));
  for (const int tokens : prefills) {
    if (tokens > 0) bench.Prefill(tokens);
  }
  for (const int context : contexts) {
    std::vector<uint8_t> state;
    if (context > 0) bench.MakeState(context, &state);
    for (const int count : streams) {
      if (count > 0) bench.Decode(count, context, state);
    }
  }
}
