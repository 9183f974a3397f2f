// Random operations on the engine without its thread: after each one the page tables and tickets must add up,
// and every answer must be what the model says, whatever was preempted, handed over or cancelled around it.

#include "engine/core/engine_core.h"

#include <gtest/gtest.h>
#include <malloc.h>

#include <algorithm>
#include <map>

#include "tests/engine/fake_backend.h"
#include "tests/engine/fake_page_file.h"
#include "tests/engine/recording_sink.h"

namespace millrace::engine {
namespace {

constexpr int32_t kPages = 14;

struct LiveRequest {
  EngineRequest request;
  SequenceRole role = SequenceRole::kGenerate;
  std::shared_ptr<Recording> recording;
  FakeAnswer expected;
  int32_t pages_asked = 0;
  std::shared_ptr<GrantedPages> granted = std::make_shared<GrantedPages>();  // shared with callbacks
  bool import_over = false;                                                  // finished or given up
  bool first_skipped = false;
};

class RandomEngine {
 public:
  explicit RandomEngine(uint64_t seed)
      : random_(seed << 40),
        backend_(kPages),
        core_(Options(&clock_, seed % 5 == 0), &backend_,
              std::make_unique<FakePageFile>(FakeLayout(1).page_bytes(), 9, seed, &faults_)) {}

  void Step() {
    if (!core_.Prepare()) return;
    ASSERT_EQ(core_.Run(), OkStatus());
  }

  void RandomOperation() {
    const uint64_t dice = random_.Below(100);
    if (dice < 50) {
      for (uint64_t steps = 1 + random_.Below(16); steps > 0; --steps) Step();
    } else if (dice < 62) {
      if (live_.size() < 12) Submit();
    } else if (live_.empty()) {
      return;
    } else {
      auto at = live_.begin();
      std::advance(at, static_cast<ptrdiff_t>(random_.Below(live_.size())));
      LiveRequest& live = at->second;
      if (dice < 65) {
        core_.Cancel(at->first);
      } else if (dice < 85) {
        AdvanceImport(&live);
      } else if (dice < 87 && live.role == SequenceRole::kImport && !live.import_over) {
        core_.ImportToGenerate(at->first);
        live.import_over = true;
      } else if (dice < 88) {
        clock_.Advance(std::chrono::seconds(1));
      } else if (live.recording->ended() || live.import_over) {
        core_.ReleaseTicket(at->first);
        if (live.recording->ended()) {
          CheckAnswer(live);
          live_.erase(at);
        }
      }
    }
    core_.CheckInvariants();
  }

  void Finish() {
    for (int i = 0; i < 300; ++i) Step();
    for (auto& [id, live] : live_) core_.Cancel(id);
    for (auto& [id, live] : live_) {
      EXPECT_TRUE(live.recording->ended());
      CheckAnswer(live);
      core_.ReleaseTicket(id);
    }
    core_.CheckInvariants();
    const EngineStats stats = core_.Stats();
    EXPECT_EQ(stats.pages_free, kPages);
    EXPECT_EQ(stats.tickets, 0);
    EXPECT_EQ(stats.waiting + stats.running + stats.importing, 0);
  }

  EngineStats Stats() const { return core_.Stats(); }
  int32_t answered() const { return answered_; }

 private:
  static EngineOptions Options(const Clock* clock, bool speculate) {
    EngineOptions options;
    options.batch_tokens_max = 128;
    options.running_max = 6;
    options.num_vocabulary_tokens = kFakeVocabularyTokens;
    options.clock = clock;
    options.speculate = speculate;
    options.host_tier_bytes = 5 * FakeLayout(1).page_bytes();
    return options;
  }

  void Submit() {
    LiveRequest live;
    EngineRequest& request = live.request;
    request.id = next_id_++;
    request.prompt.resize(1 + random_.Below(random_.Below(4) == 0 ? 500 : 100));
    for (int32_t& token : request.prompt) token = static_cast<int32_t>(random_.Below(kFakeVocabularyTokens));
    // Half of the prompts begin like others, some go on where an earlier answer ended.
    if (random_.Below(2) == 0) {
      Random shared(random_.Below(3));
      const size_t length = std::min<size_t>(request.prompt.size(), 64 * (1 + random_.Below(4)));
      for (size_t i = 0; i < length; ++i)
        request.prompt[i] = static_cast<int32_t>(shared.Below(kFakeVocabularyTokens));
    }
    request.cache_salt = random_.Below(8) == 0 ? "salt" : "";
    request.output.resize(random_.Below(3));
    request.sampling.max_tokens = 3 + static_cast<int32_t>(random_.Below(random_.Below(2) == 0 ? 400 : 60));
    request.sampling.seed = random_.Next();
    request.sampling.ignore_eos = random_.Below(4) != 0;
    request.priority = static_cast<int32_t>(random_.Below(3));
    if (random_.Below(10) == 0) request.deadline = clock_.Now() + std::chrono::seconds(random_.Below(3));
    live.role = static_cast<SequenceRole>(std::max(random_.Below(5), uint64_t{2}) - 2);
    live.expected = ExpectedAnswer(request);
    const bool is_prefill = live.role == SequenceRole::kPrefill;
    live.recording = std::make_shared<Recording>(static_cast<int32_t>(request.output.size()), is_prefill);
    ASSERT_EQ(CheckRequest(request, Options(&clock_, false), backend_.config(), backend_.kv_layout()),
              OkStatus());
    auto sink = std::make_unique<RecordingSink>(live.recording);
    PrefillSink* const prefill_sink = is_prefill ? sink.get() : nullptr;
    core_.Submit(live.role, request, std::move(sink), prefill_sink);
    live_.emplace(request.id, std::move(live));
  }

  void AdvanceImport(LiveRequest* live) {
    if (live->role != SequenceRole::kImport || live->import_over || live->recording->ended()) return;
    std::vector<int32_t> tokens = live->request.prompt;
    tokens.insert(tokens.end(), live->request.output.begin(), live->request.output.end());
    const int32_t needed = PagesFor(static_cast<int64_t>(tokens.size()));
    if (live->pages_asked < needed) {
      const int32_t count =
          1 + static_cast<int32_t>(random_.Below(static_cast<uint64_t>(needed - live->pages_asked)));
      live->pages_asked += count;
      core_.Grant(live->request.id, count, [granted = live->granted](StatusOr<GrantedPages> pages) {
        if (!pages.ok()) return;
        if (granted->pages.empty()) granted->first_page = pages->first_page;
        granted->pages.insert(granted->pages.end(), pages->pages.begin(), pages->pages.end());
      });
    } else if (live->granted->first_page + static_cast<int32_t>(live->granted->pages.size()) == needed) {
      FakePrefill(backend_.kv_layout(), backend_.kv_memory(), tokens, live->granted->pages,
                  live->granted->first_page);
      live->import_over = true;
      live->first_skipped = random_.Below(2) == 0;
      const bool ends = live->expected.tokens.size() == 1;
      if (live->first_skipped && !ends) live->recording->SkipIndex();
      live->first_skipped = live->first_skipped && !ends;
      SampledToken first;
      first.token = live->expected.tokens[0];
      core_.FinishImport(live->request.id, first, live->first_skipped);
    }
  }

  void CheckAnswer(const LiveRequest& live) {
    std::vector<int32_t> expected = live.expected.tokens;
    const Status status = live.recording->status();
    if (live.role == SequenceRole::kPrefill) expected.resize(1);
    if (live.first_skipped) expected.erase(expected.begin());
    const std::vector<int32_t> tokens = live.recording->tokens();
    if (status.ok()) {
      ++answered_;
    } else {
      // Exhausted: the answer outgrew the pool.
      ASSERT_TRUE(absl::IsCancelled(status) || absl::IsDeadlineExceeded(status) ||
                  absl::IsResourceExhausted(status))
          << status;
      ASSERT_LE(tokens.size(), expected.size());
      expected.resize(tokens.size());
    }
    EXPECT_EQ(tokens, expected) << "request " << live.request.id << " " << status;
  }

  Random random_;
  FakeClock clock_;
  FakeBackend backend_;
  FileFaults faults_ = {.late_percent = 50, .fail_percent = 3, .corrupt_percent = 3};
  EngineCore core_;
  RequestId next_id_ = 1;
  std::map<RequestId, LiveRequest> live_;
  int32_t answered_ = 0;
};

// In all 10^5; a fifth of them under the sanitizers, which take ten times as long.
#ifdef MILLRACE_SANITIZED
constexpr int kOperationsPerSeed = 2'000;
#else
constexpr int kOperationsPerSeed = 10'000;
#endif
// Of what 10^5 operations bring at least.
constexpr uint64_t Share(uint64_t count) { return count * kOperationsPerSeed / 10'000; }

TEST(EngineCore, KeepsItsAccountsUnderRandomOperations) {
  uint64_t preemptions = 0, found = 0, loaded = 0, fetched = 0, accepted = 0;
  int32_t answered = 0;
  size_t bytes_early = 0;
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    RandomEngine engine(seed);
    for (int i = 0; i < kOperationsPerSeed && !::testing::Test::HasFailure(); ++i) engine.RandomOperation();
    engine.Finish();
    preemptions += engine.Stats().preemptions;
    found += engine.Stats().cache_found_tokens;
    loaded += engine.Stats().tiers.loaded;
    accepted += engine.Stats().accepted_tokens;
    fetched += engine.Stats().tiers.fetched;
    answered += engine.answered();
    if (seed == 2) bytes_early = mallinfo2().uordblks;
  }
  // Whatever grows with the number of operations would have grown fivefold since.
  EXPECT_LT(mallinfo2().uordblks, bytes_early + (64 << 10));
  EXPECT_GT(preemptions, Share(10)) << "the pool was too large to test anything";
  EXPECT_GT(answered, static_cast<int32_t>(Share(200)));
  EXPECT_GT(found, Share(5'000)) << "the cache was not used";
  EXPECT_GT(loaded, Share(100));
  EXPECT_GT(accepted, Share(500));
  EXPECT_GT(fetched, Share(20)) << "the file was not used";
}

TEST(EngineCore, ImportsThatShareThePoolAllComplete) {
  // Each needs 6 of 8 pages and asks page by page: careless grants would leave all with some and none with
  // enough.
  constexpr RequestId kImports = 5;
  FakeBackend backend(8);
  EngineOptions options;
  options.num_vocabulary_tokens = kFakeVocabularyTokens;
  EngineCore core(options, &backend);
  std::vector<std::shared_ptr<Recording>> recordings;
  std::vector<int32_t> granted(kImports + 1);
  EngineRequest request;
  request.prompt.assign(350, 1);
  request.sampling.max_tokens = 1;
  for (request.id = 1; request.id <= kImports; ++request.id) {
    recordings.push_back(std::make_shared<Recording>());
    request.priority = static_cast<int32_t>(request.id);
    core.Submit(SequenceRole::kImport, request, std::make_unique<RecordingSink>(recordings.back()), nullptr);
  }
  for (int page = 0; page < 6; ++page) {
    for (RequestId id = 1; id <= kImports; ++id) {
      core.Grant(id, 1,
                 [&count = granted[id]](StatusOr<GrantedPages> pages) { count += pages.ok() ? 1 : 0; });
      EXPECT_FALSE(core.Prepare());  // later arrivals rank higher and find pages taken
    }
  }
  for (RequestId done = 0; done < kImports; ++done) {
    EXPECT_FALSE(core.Prepare());
    core.CheckInvariants();
    const auto complete = std::find(granted.begin(), granted.end(), 6);
    ASSERT_NE(complete, granted.end()) << "after " << done << " imports all wait for each other";
    const auto id = static_cast<RequestId>(complete - granted.begin());
    core.FinishImport(id, {}, true);
    core.ReleaseTicket(id);
    *complete = 0;
    EXPECT_TRUE(recordings[id - 1]->ended());
  }
  EXPECT_EQ(core.Stats().pages_free, 8);
}

}  // namespace
}  // namespace millrace::engine
