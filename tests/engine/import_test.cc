// Prefill on one engine, decode on another: the hand-off as the engines see it.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "tests/engine/test_engine.h"

namespace millrace::engine {
namespace {

void CopyPages(TestEngine* from, const std::vector<PageId>& source, TestEngine* to,
               const std::vector<PageId>& destination) {
  const KvLayout& a = from->engine->kv_layout();
  const KvLayout& b = to->engine->kv_layout();
  ASSERT_EQ(source.size(), destination.size());
  for (int32_t layer = 0; layer < a.num_layers; ++layer) {
    for (size_t i = 0; i < source.size(); ++i) {
      std::memcpy(to->engine->kv_memory().data() + b.piece_offset(layer, destination[i]),
                  from->engine->kv_memory().data() + a.piece_offset(layer, source[i]), a.piece_bytes());
    }
  }
}

// The page table that the layer events tell; checks that every layer of every page came once, in order.
std::vector<PageId> PagesTold(const Recording& recording, int32_t num_layers) {
  std::vector<PageId> pages;
  int32_t layer = 0;
  for (const LayerEvent& event : recording.layers()) {
    EXPECT_EQ(event.layer, layer);
    if (layer == 0) {
      EXPECT_EQ(event.first_page, static_cast<int32_t>(pages.size()));
      pages.insert(pages.end(), event.pages.begin(), event.pages.end());
    }
    EXPECT_EQ(std::vector<PageId>(pages.begin() + event.first_page, pages.end()), event.pages);
    layer = (layer + 1) % num_layers;
  }
  EXPECT_EQ(layer, 0);
  return pages;
}

TEST(EngineImport, HandOffEqualsGenerate) {
  for (const int32_t prompt_tokens : {1, 63, 64, 65, 500}) {
    for (const int32_t output_tokens : {0, 3}) {
      TestEngine prefill(30), decode(25);
      EXPECT_EQ(decode.Generate(Request(99, 70, 1))->AwaitEnd(), OkStatus());  // so that page numbers differ
      EngineRequest request = Request(static_cast<RequestId>(prompt_tokens), prompt_tokens, 80);
      request.output = RandomTokens(output_tokens, 5);
      const int32_t num_pages = PagesFor(prompt_tokens + output_tokens);

      const auto first = prefill.Prefill(request);
      const auto answer = decode.BeginImport(request);
      answer->SkipIndex();
      std::vector<PageId> granted;
      for (int32_t i = 0; i < num_pages; ++i) {
        const auto pages = decode.Grant(request.id, 1);
        ASSERT_TRUE(pages.ok()) << pages.status();
        granted.insert(granted.end(), pages->begin(), pages->end());
      }
      ASSERT_EQ(first->AwaitEnd(), OkStatus());
      ASSERT_EQ(first->tokens().size(), 1u);
      const std::vector<PageId> computed = PagesTold(*first, kFakeLayers + 1);
      ASSERT_EQ(static_cast<int32_t>(computed.size()), num_pages);
      const EngineStats stats = prefill.Settled();
      EXPECT_EQ(stats.pages_ticket_only, num_pages) << "the ticket holds on";
      EXPECT_EQ(stats.tickets, 1);
      CopyPages(&prefill, computed, &decode, granted);
      prefill.engine->ReleaseTicket(request.id);
      prefill.ExpectAllFree();

      SampledToken token;
      token.token = first->tokens()[0];
      decode.engine->FinishImport(request.id, token, /*first_already_sent=*/true);
      decode.engine->ReleaseTicket(request.id);
      EXPECT_EQ(answer->AwaitEnd(), OkStatus());
      std::vector<int32_t> tokens = first->tokens();
      const std::vector<int32_t> rest = answer->tokens();
      tokens.insert(tokens.end(), rest.begin(), rest.end());
      EXPECT_EQ(tokens, ExpectedAnswer(request).tokens);
      decode.ExpectAllFree();
    }
  }
}

TEST(EngineImport, ImportSaysTheFirstTokenUnlessSentAndAlwaysWhenItIsTheLast) {
  TestEngine decode(10);
  for (const bool sent : {false, true}) {
    for (const int32_t max_tokens : {1, 2}) {
      EngineRequest request =
          Request(static_cast<RequestId>(10 + max_tokens * 2 + (sent ? 1 : 0)), 30, max_tokens);
      const auto answer = decode.BeginImport(request);
      if (sent && max_tokens == 2) answer->SkipIndex();
      const auto pages = decode.Grant(request.id, 1);
      ASSERT_TRUE(pages.ok());
      FakePrefill(decode.engine->kv_layout(), decode.engine->kv_memory(), request.prompt, *pages);
      const std::vector<int32_t> expected = ExpectedAnswer(request).tokens;
      SampledToken token;
      token.token = expected[0];
      decode.engine->FinishImport(request.id, token, sent);
      decode.engine->ReleaseTicket(request.id);
      EXPECT_EQ(answer->AwaitEnd(), OkStatus());
      EXPECT_EQ(answer->finish(), FinishReason::kLength);
      EXPECT_EQ(answer->tokens().size(), sent && max_tokens == 2 ? 1u : static_cast<size_t>(max_tokens));
    }
  }
  decode.ExpectAllFree();
}

TEST(EngineImport, FinishImportNeedsAllPages) {
  TestEngine decode(10);
  const EngineRequest request = Request(1, 100, 5);
  const auto answer = decode.BeginImport(request);
  ASSERT_TRUE(decode.Grant(1, 1).ok());
  EXPECT_EQ(decode.Grant(1, 2).status().code(), absl::StatusCode::kInvalidArgument)
      << "more than the prompt needs";
  decode.engine->FinishImport(1, {}, false);
  EXPECT_EQ(answer->AwaitEnd().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(decode.Settled().pages_ticket_only, 1);
  decode.engine->ReleaseTicket(1);
  decode.ExpectAllFree();
}

TEST(EngineImport, ImportToGenerateLeavesThePagesToTheTicket) {
  TestEngine decode(10);
  const EngineRequest request = Request(1, 100, 40);
  const auto answer = decode.BeginImport(request);
  const auto pages = decode.Grant(1, 2);
  ASSERT_TRUE(pages.ok());
  decode.engine->ImportToGenerate(1);
  EXPECT_EQ(decode.Grant(1, 1).status().code(), absl::StatusCode::kFailedPrecondition);
  // A late write to the pages must not matter.
  for (const PageId page : *pages) {
    const size_t offset = decode.engine->kv_layout().piece_offset(0, page);
    std::memset(decode.engine->kv_memory().data() + offset, 0xee, decode.engine->kv_layout().piece_bytes());
  }
  ExpectAnswer(request, *answer);
  EXPECT_EQ(decode.Settled().pages_ticket_only, 2);
  decode.engine->ReleaseTicket(1);
  decode.ExpectAllFree();
}

TEST(EngineImport, FailureToReachTheDeviceEndsTheEngine) {
  TestEngine decode(10);
  const auto answer = decode.BeginImport(Request(1, 10, 40));
  const auto other = decode.BeginImport(Request(2, 10, 40));
  ASSERT_TRUE(decode.Grant(1, 1).ok());
  decode.backend->FailCopiesWith(Internal("the copy engine is gone"));
  decode.engine->FinishImport(1, SampledToken{}, false);
  EXPECT_THAT(std::string(Message(answer->AwaitEnd())), testing::HasSubstr("the copy engine is gone"));
  EXPECT_EQ(other->AwaitEnd().code(), absl::StatusCode::kInternal);
  decode.engine->ReleaseTicket(1);
  decode.Settled();
  EXPECT_FALSE(decode.engine->MakingProgress(std::chrono::hours(1)));
}

TEST(EngineImport, ReleasedTicketTakesNoMorePages) {
  TestEngine decode(4);
  const auto blocker = decode.BeginImport(Request(1, 200, 40));
  ASSERT_TRUE(decode.Grant(1, 4).ok());
  const auto waiting = decode.BeginImport(Request(2, 100, 40));
  auto grant = decode.GrantLater(2, 2);
  EXPECT_EQ(decode.Settled().waiting, 1);
  decode.engine->ReleaseTicket(2);  // before its owner says what becomes of the request
  EXPECT_EQ(grant.get().status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(decode.Grant(2, 1).status().code(), absl::StatusCode::kFailedPrecondition);
  decode.engine->ImportToGenerate(2);
  decode.engine->Cancel(1);
  decode.engine->ReleaseTicket(1);
  EXPECT_EQ(blocker->AwaitEnd().code(), absl::StatusCode::kCancelled);
  ExpectAnswer(Request(2, 100, 40), *waiting);
  decode.ExpectAllFree();
}

}  // namespace
}  // namespace millrace::engine
