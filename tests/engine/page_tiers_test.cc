#include "engine/kv/page_tiers.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "engine/core/engine_core.h"
#include "tests/engine/fake_page_file.h"
#include "tests/engine/slow_backend.h"
#include "tests/engine/test_engine.h"

namespace millrace::engine {
namespace {

TEST(PageFile, GivesBackWhatWasWritten) {
  auto file = CreatePageFile(::testing::TempDir(), 4096, 5);
  ASSERT_TRUE(file.ok()) << file.status();
  std::vector<std::vector<std::byte>> pages;
  for (int i = 0; i < 5; ++i) pages.emplace_back(4096, static_cast<std::byte>(i + 1));
  const auto drain = [&](size_t count) {
    std::vector<PageFile::Done> done;
    while (done.size() < count) (*file)->Poll(&done);
    for (const auto& each : done) EXPECT_TRUE(each.ok);
  };
  for (int i = 0; i < 5; ++i) ASSERT_TRUE((*file)->Write(4 - i, pages[static_cast<size_t>(i)], 7));
  drain(5);
  std::vector<std::byte> back(4096);
  for (int i = 0; i < 5; ++i) {
    ASSERT_TRUE((*file)->Read(4 - i, back, 8));
    drain(1);
    EXPECT_EQ(back, pages[static_cast<size_t>(i)]);
  }
}

TEST(PageFile, SaysWhatIsWrong) {
  EXPECT_THAT(std::string(Message(CreatePageFile("/nonexistent", 4096, 5).status())),
              ::testing::HasSubstr("/nonexistent"));
}

size_t PageBytes() { return FakeLayout(1).page_bytes(); }

// Three texts of four full pages each, and a pool that holds little more than one of them.
void ExpectSecondRoundFinds(const EngineOptions& options, int32_t tokens_found, TierStats* tiers) {
  TestEngine engine(8, options);
  for (const bool again : {false, true}) {
    for (RequestId text = 1; text <= 3; ++text) {
      EngineRequest request = Request(text, 300, 4);
      request.id = text + (again ? 10 : 0);
      const auto answer = engine.Generate(request);
      ExpectAnswer(request, *answer);
      EXPECT_EQ(answer->cached_tokens(), again ? tokens_found : 0) << "text " << text;
    }
  }
  engine.ExpectAllFree();
  *tiers = engine.Settled().tiers;
}

TEST(PageTiers, HostMemoryKeepsWhatThePoolCannot) {
  EngineOptions options = Options();
  TierStats tiers;
  ExpectSecondRoundFinds(options, 0, &tiers);
  options.host_tier_bytes = 20 * PageBytes();
  ExpectSecondRoundFinds(options, 256, &tiers);
  EXPECT_GE(tiers.loaded, 8u);
  EXPECT_EQ(tiers.fetched, 0u);
}

TEST(PageTiers, RefusesTiersThatCannotWork) {
  const auto create = [](EngineOptions options) {
    return std::string(Message(Engine::Create(options, std::make_unique<FakeBackend>(4), nullptr).status()));
  };
  EngineOptions options = Options();
  options.host_tier_bytes = 3;
  EXPECT_THAT(create(options), ::testing::HasSubstr("3 bytes cannot hold pages of"));
  options.host_tier_bytes = 0;
  options.disk_tier_bytes = 10 * PageBytes();
  EXPECT_THAT(create(options), ::testing::HasSubstr("through host memory"));
  options.host_tier_bytes = 10 * PageBytes();
  options.disk_tier_directory = "/nonexistent";
  EXPECT_THAT(create(options), ::testing::HasSubstr("/nonexistent"));
}

// The engine without its thread, on a clock that each turn moves by `turn`.
struct TieredCore {
  explicit TieredCore(std::unique_ptr<PageFile> file, Duration each_turn = std::chrono::milliseconds(1))
      : backend(8, &clock, std::chrono::microseconds(100)), turn(each_turn) {
    options.num_vocabulary_tokens = kFakeVocabularyTokens;
    options.clock = &clock;
    options.host_tier_bytes = 6 * PageBytes();
    core = std::make_unique<EngineCore>(options, &backend, std::move(file));
  }
  // Runs text number `seed`; how many of its tokens were found.
  int32_t Run(uint64_t seed) {
    EngineRequest request = Request(seed, 300, 2);
    request.id = next_id++;
    auto recording = std::make_shared<Recording>();
    core->Submit(SequenceRole::kGenerate, request, std::make_unique<RecordingSink>(recording), nullptr);
    for (waited = 0; waited < 100'000 && !recording->ended(); ++waited) {
      if (core->Prepare()) {
        EXPECT_EQ(core->Run(), OkStatus());
      }
      core->CheckInvariants();
      clock.Advance(turn);
    }
    EXPECT_EQ(recording->tokens(), ExpectedAnswer(request).tokens) << "text " << seed;
    return recording->cached_tokens();
  }
  FakeClock clock;
  EngineOptions options;
  SlowBackend backend;
  std::unique_ptr<EngineCore> core;
  RequestId next_id = 1;
  const Duration turn;
  int waited = 0;  // turns of the last run
};

std::unique_ptr<PageFile> FaultyFile(FileFaults* faults) {
  return std::make_unique<FakePageFile>(PageBytes(), 30, 1, faults);
}

// A page takes 6.4 ms to compute, by the clock of the turns, and much less to read.
TEST(PageTiers, TheFileKeepsWhatHostMemoryCannot) {
  auto file = CreatePageFile(::testing::TempDir(), PageBytes(), 30);
  ASSERT_TRUE(file.ok()) << file.status();
  TieredCore tiered(*std::move(file), std::chrono::microseconds(2));
  int32_t found = 0;
  for (const bool again : {false, true}) {
    for (uint64_t text = 1; text <= 5; ++text) {
      found += tiered.Run(text);
      while (tiered.core->waits_for_file()) tiered.core->Prepare();
      EXPECT_TRUE(again || found == 0);
    }
  }
  const TierStats tiers = tiered.core->Stats().tiers;
  EXPECT_GE(found, 3 * 64);
  EXPECT_GT(tiers.written, 0u);
  EXPECT_GT(tiers.fetched, 0u);
  EXPECT_EQ(tiers.disk_failures, 0u);
  EXPECT_LE(tiers.host_pages, 6);
  EXPECT_LE(tiers.disk_pages, 30);
}

TEST(PageTiers, WrongBytesAreNeverUsed) {
  FileFaults faults;
  TieredCore tiered(FaultyFile(&faults));
  for (uint64_t text = 1; text <= 5; ++text) tiered.Run(text);
  faults.corrupt_percent = 100;
  for (uint64_t text = 1; text <= 5; ++text) tiered.Run(text);
  EXPECT_GT(tiered.core->Stats().tiers.disk_failures, 0u);
  EXPECT_EQ(tiered.core->Stats().tiers.fetched, 0u);
}

TEST(PageTiers, AFileThatFailsCostsNothingButItsPages) {
  FileFaults faults;
  TieredCore tiered(FaultyFile(&faults));
  for (uint64_t text = 1; text <= 5; ++text) tiered.Run(text);
  faults.fail_percent = 100;
  for (uint64_t text = 1; text <= 10; ++text) tiered.Run(text);
  EXPECT_GT(tiered.core->Stats().tiers.disk_failures, 0u);
}

// What does not come in the time that computing takes is computed.
TEST(PageTiers, AFileThatHangsHoldsNobodyBackForLong) {
  FileFaults faults;
  TieredCore tiered(FaultyFile(&faults));
  for (uint64_t text = 1; text <= 5; ++text) tiered.Run(text);
  faults.late_percent = 100;
  for (uint64_t text = 1; text <= 5; ++text) {
    tiered.Run(text);
    EXPECT_LT(tiered.waited, 6 * 7 + 5)
        << "milliseconds; a page takes 6.4 to compute, six fit into host memory";
  }
  faults.late_percent = 0;  // for the destructor's sake
}

}  // namespace
}  // namespace millrace::engine
