#include "engine/kv/prefix_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "engine/kv/page_keys.h"
#include "tests/engine/test_engine.h"

namespace millrace::engine {
namespace {

using Pages = std::vector<PageId>;

// The cache with sequences of whole pages on top.
struct CacheUser {
  explicit CacheUser(int32_t num_pages) : cache(num_pages, nullptr) {}

  Pages Match(const std::vector<int32_t>& tokens, uint64_t root = 1) {
    std::vector<uint64_t> keys;
    ExtendPageKeys(root, tokens, &keys);
    Pages pages;
    for (const CachedPage* node : cache.Match(root, tokens, keys)) pages.push_back(node->page);
    return pages;
  }
  // Holds what is there of `tokens`, computes the rest, caches all.
  Pages Use(const std::vector<int32_t>& tokens, uint64_t root = 1) {
    std::vector<uint64_t> keys;
    ExtendPageKeys(root, tokens, &keys);
    Pages pages = Match(tokens, root);
    for (const PageId page : pages) cache.Hold(page, PageHolder::kRequest);
    const auto missing = static_cast<int32_t>(keys.size() - pages.size());
    EXPECT_TRUE(cache.Allocate(missing, PageHolder::kRequest, &pages));
    CachedPage* tail = nullptr;
    for (size_t i = 0; i < keys.size(); ++i) {
      tail = cache.Insert(tail, root, keys[i], std::span(tokens).subspan(i * kPageTokens, kPageTokens),
                          pages[i]);
    }
    cache.CheckInvariants();
    return pages;
  }
  void Drop(const Pages& pages) {
    for (auto page = pages.rbegin(); page != pages.rend(); ++page) cache.Release(*page, PageHolder::kRequest);
    cache.CheckInvariants();
  }
  PrefixCache cache;
};

std::vector<int32_t> Joined(std::vector<int32_t> a, const std::vector<int32_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

TEST(PrefixCache, FindsTheLongestBeginning) {
  CacheUser user(10);
  const auto text = RandomTokens(4 * kPageTokens, 1);
  const Pages pages = user.Use(text);
  EXPECT_EQ(user.Match(text), pages);
  EXPECT_EQ(user.Match({text.begin(), text.begin() + 130}), Pages(pages.begin(), pages.begin() + 2));
  auto other = text;
  other[100] ^= 1;
  EXPECT_EQ(user.Match(other), Pages{pages[0]});
  EXPECT_EQ(user.Match({text.begin() + kPageTokens, text.end()}), Pages{}) << "another position";
  EXPECT_EQ(user.Match(text, /*root=*/2), Pages{}) << "another salt or model";
}

TEST(PrefixCache, EvictsLeastRecentlyUsedAndEndsFirst) {
  CacheUser user(4);
  const auto a = RandomTokens(2 * kPageTokens, 1), b = RandomTokens(2 * kPageTokens, 2);
  user.Drop(user.Use(a));
  user.Drop(user.Use(b));
  user.Drop(user.Use(a));
  EXPECT_EQ(user.cache.num_available(), 4);
  Pages taken;
  ASSERT_TRUE(user.cache.Allocate(1, PageHolder::kRequest, &taken));
  EXPECT_EQ(user.Match(a).size(), 2u);
  EXPECT_EQ(user.Match(b).size(), 1u);
  ASSERT_TRUE(user.cache.Allocate(2, PageHolder::kRequest, &taken));
  EXPECT_EQ(user.Match(a).size(), 1u);
  EXPECT_EQ(user.Match(b).size(), 0u);
  EXPECT_FALSE(user.cache.Allocate(2, PageHolder::kRequest, &taken));
  user.cache.CheckInvariants();
}

TEST(PrefixCache, KeepsWhatARequestOrATicketHolds) {
  CacheUser user(4);
  const auto text = RandomTokens(2 * kPageTokens, 1);
  const Pages pages = user.Use(text);
  user.cache.Hold(pages[1], PageHolder::kTicket);
  user.Drop(pages);
  EXPECT_EQ(user.cache.num_available(), 3);
  Pages taken;
  ASSERT_TRUE(user.cache.Allocate(3, PageHolder::kRequest, &taken));
  EXPECT_EQ(std::count(taken.begin(), taken.end(), pages[1]), 0) << "a transfer may still read it";
  // The page before it is gone, so nobody can find it any more: free as soon as the ticket lets go.
  EXPECT_EQ(user.Match(text), Pages{});
  user.cache.Release(pages[1], PageHolder::kTicket);
  EXPECT_EQ(user.cache.pool().num_free(), 1);
  user.cache.CheckInvariants();
}

TEST(PrefixCache, ComparesTokensBecauseKeysCanCollide) {
  CacheUser user(4);
  const auto text = RandomTokens(kPageTokens, 1), other = RandomTokens(kPageTokens, 2);
  const std::vector<uint64_t> key = {77};
  Pages pages;
  ASSERT_TRUE(user.cache.Allocate(2, PageHolder::kRequest, &pages));
  ASSERT_NE(user.cache.Insert(nullptr, 1, 77, text, pages[0]), nullptr);
  EXPECT_EQ(user.cache.Insert(nullptr, 1, 77, other, pages[1]), nullptr);
  EXPECT_EQ(user.cache.Match(1, other, key).size(), 0u);
  EXPECT_EQ(user.cache.Match(1, text, key).size(), 1u);
  EXPECT_EQ(user.cache.Match(2, text, key).size(), 0u);
}

TEST(PageKeys, DependOnModelSaltAndAllTokensBefore) {
  const auto text = RandomTokens(3 * kPageTokens + 5, 1);
  std::vector<uint64_t> keys, grown, other;
  ExtendPageKeys(CacheRoot("model", ""), text, &keys);
  EXPECT_EQ(keys.size(), 3u) << "part-full pages have no name";
  ExtendPageKeys(CacheRoot("model", ""), std::span(text).first(70), &grown);
  ExtendPageKeys(CacheRoot("model", ""), text, &grown);
  EXPECT_EQ(grown, keys);
  ExtendPageKeys(CacheRoot("model", "s"), text, &other);
  EXPECT_NE(other[0], keys[0]);
  EXPECT_NE(CacheRoot("model2", ""), CacheRoot("model", ""));
}

// --- in the engine ---

int32_t PromptTokensComputed(TestEngine* engine) {
  return static_cast<int32_t>(engine->Settled().prompt_tokens);
}

TEST(EnginePrefixCache, ComputesOnlyWhatIsNew) {
  TestEngine engine(40);
  EngineRequest request = Request(1, 300, 20);
  const auto first = engine.Generate(request);
  ExpectAnswer(request, *first);
  EXPECT_EQ(first->cached_tokens(), 0);
  EXPECT_EQ(PromptTokensComputed(&engine), 300);
  request.id = 2;
  const auto again = engine.Generate(request);
  ExpectAnswer(request, *again);
  EXPECT_EQ(again->cached_tokens(), 256);
  EXPECT_EQ(PromptTokensComputed(&engine), 300 + 44);
  engine.ExpectAllFree();
}

TEST(EnginePrefixCache, TheNextTurnOfAConversationFindsTheAnswerToo) {
  TestEngine engine(40);
  EngineRequest request = Request(1, 100, 60);
  ExpectAnswer(request, *engine.Generate(request));
  EngineRequest next = Request(2, 1, 30);
  next.prompt = Joined(Joined(request.prompt, ExpectedAnswer(request).tokens), RandomTokens(40, 9));
  const auto answer = engine.Generate(next);
  ExpectAnswer(next, *answer);
  EXPECT_EQ(answer->cached_tokens(), 128) << "two pages are full of prompt and answer";
}

TEST(EnginePrefixCache, NeverFindsTheWholePrompt) {
  TestEngine engine(40);
  for (const RequestId id : {1, 2}) {
    EngineRequest request = Request(7, 128, 3);
    request.id = id;
    const auto answer = engine.Generate(request);
    ExpectAnswer(request, *answer);
    EXPECT_EQ(answer->cached_tokens(), id == 1 ? 0 : 64) << "somebody has to make the logits";
  }
}

TEST(EnginePrefixCache, SaltKeepsCallersApart) {
  TestEngine engine(40);
  EngineRequest request = Request(1, 200, 3);
  request.cache_salt = "a";
  ExpectAnswer(request, *engine.Generate(request));
  for (const auto& [salt, cached] : std::map<std::string, int32_t>{{"", 0}, {"a", 192}, {"b", 0}}) {
    ++request.id;
    request.cache_salt = salt;
    const auto answer = engine.Generate(request);
    ExpectAnswer(request, *answer);
    EXPECT_EQ(answer->cached_tokens(), cached) << salt;
  }
}

TEST(EnginePrefixCache, OffMeansOff) {
  EngineOptions options = Options();
  options.prefix_cache = false;
  TestEngine engine(40, options);
  for (const RequestId id : {1, 2}) {
    EngineRequest request = Request(7, 200, 3);
    request.id = id;
    const auto answer = engine.Generate(request);
    ExpectAnswer(request, *answer);
    EXPECT_EQ(answer->cached_tokens(), 0);
  }
  EXPECT_EQ(PromptTokensComputed(&engine), 400);
  EXPECT_EQ(engine.Settled().pages_cached, 0);
}

TEST(EnginePrefixCache, EqualPromptsAtOnceShareTheirPages) {
  TestEngine engine(40);
  engine.backend->Close();
  std::vector<std::pair<EngineRequest, std::shared_ptr<Recording>>> live;
  for (RequestId id = 1; id <= 4; ++id) {
    EngineRequest request = Request(5, 250, 100);
    request.id = id;
    live.emplace_back(request, engine.Generate(request));
  }
  engine.backend->Open();
  for (auto& [request, recording] : live) ExpectAnswer(request, *recording);
  const EngineStats stats = engine.Settled();
  EXPECT_EQ(stats.pages_cached, (250 + 99) / kPageTokens) << "one copy, of all but the last token";
  engine.ExpectAllFree();
}

TEST(EnginePrefixCache, PreemptedAnswersResumeFromWhatIsLeft) {
  TestEngine engine(10);
  std::vector<std::pair<EngineRequest, std::shared_ptr<Recording>>> live;
  for (RequestId id = 1; id <= 6; ++id) {
    const EngineRequest request = Request(id, 100, 140);
    live.emplace_back(request, engine.Generate(request));
  }
  for (auto& [request, recording] : live) ExpectAnswer(request, *recording);
  EXPECT_GT(engine.Settled().cache_found_tokens, 0u);
  engine.ExpectAllFree();
}

// A prefill worker does not compute what it has, but hands it over all the same.
TEST(EnginePrefixCache, PrefillTellsCachedPagesAsAChunk) {
  TestEngine prefill(30);
  EngineRequest request = Request(1, 300, 5);
  EXPECT_EQ(prefill.Prefill(request)->AwaitEnd(), OkStatus());
  prefill.engine->ReleaseTicket(1);
  EXPECT_EQ(prefill.Settled().pages_cached, 4);
  request.id = 2;
  const auto again = prefill.Prefill(request);
  EXPECT_EQ(again->AwaitEnd(), OkStatus());
  EXPECT_EQ(again->tokens()[0], ExpectedAnswer(request).tokens[0]);
  EXPECT_EQ(again->cached_tokens(), 256);
  const auto layers = again->layers();
  ASSERT_EQ(layers.size(), 2u * (kFakeLayers + 1));
  for (int32_t layer = 0; layer <= kFakeLayers; ++layer) {
    EXPECT_EQ(layers[static_cast<size_t>(layer)].layer, layer);
    EXPECT_EQ(layers[static_cast<size_t>(layer)].first_page, 0);
    EXPECT_EQ(layers[static_cast<size_t>(layer)].pages.size(), 4u);
    EXPECT_EQ(layers[static_cast<size_t>(layer + kFakeLayers + 1)].first_page, 4);
  }
  EXPECT_EQ(prefill.Settled().pages_ticket_only, 5) << "the ticket holds cached pages too";
  EXPECT_EQ(PromptTokensComputed(&prefill), 300 + 44);
  prefill.engine->ReleaseTicket(2);
  prefill.ExpectAllFree();
}

// A decode worker asks only for the pages that it lacks, and nobody can write to those that it has.
TEST(EnginePrefixCache, ImportIsGrantedOnlyMissingPages) {
  TestEngine decode(30);
  const EngineRequest before = Request(1, 300, 5);
  ExpectAnswer(before, *decode.Generate(before));
  EngineRequest request = before;
  request.id = 2;
  request.prompt = Joined({before.prompt.begin(), before.prompt.begin() + 200}, RandomTokens(150, 3));
  const auto answer = decode.BeginImport(request);
  const auto first = decode.GrantLater(2, 2).get();
  ASSERT_TRUE(first.ok());
  EXPECT_EQ(first->first_page, 3);
  EXPECT_EQ(first->pages.size(), 2u);
  const auto rest = decode.GrantLater(2, 4).get();
  ASSERT_TRUE(rest.ok());
  EXPECT_EQ(rest->first_page, 5);
  ASSERT_EQ(rest->pages.size(), 1u) << "the sequence needs no more";
  Pages granted = first->pages;
  granted.push_back(rest->pages[0]);
  FakePrefill(decode.engine->kv_layout(), decode.engine->kv_memory(), request.prompt, granted, 3);
  SampledToken token;
  token.token = ExpectedAnswer(request).tokens[0];
  decode.engine->FinishImport(2, token, false);
  decode.engine->ReleaseTicket(2);
  ExpectAnswer(request, *answer);
  EXPECT_EQ(answer->cached_tokens(), 192);
  decode.ExpectAllFree();

  // What came from elsewhere is cached here from then on.
  request.id = 3;
  const auto again = decode.Generate(request);
  ExpectAnswer(request, *again);
  EXPECT_EQ(again->cached_tokens(), 320);
}

TEST(EnginePrefixCache, PagesOfAFailedImportAreNotCached) {
  TestEngine decode(10);
  EngineRequest request = Request(1, 200, 5);
  const auto answer = decode.BeginImport(request);
  ASSERT_TRUE(decode.Grant(1, 4).ok());  // whatever P wrote there
  decode.engine->Cancel(1);
  decode.engine->ReleaseTicket(1);
  EXPECT_EQ(decode.Settled().pages_cached, 0);
  request.id = 2;
  const auto again = decode.Generate(request);
  ExpectAnswer(request, *again);
  EXPECT_EQ(again->cached_tokens(), 0);
}

}  // namespace
}  // namespace millrace::engine
