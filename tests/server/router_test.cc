#include "server/router/router.h"

#include <gtest/gtest.h>

namespace millrace::server {
namespace {

WorkerSnapshot Ready(const std::string& address, WorkerRole role) {
  WorkerSnapshot worker;
  worker.address = address;
  worker.role = role;
  worker.connected = worker.ready = true;
  worker.model_digest = "m";
  worker.layout_hash = 7;
  worker.protocol_version = 1;
  worker.pages_total = worker.pages_free = 100;
  worker.context_max = 4096;
  return worker;
}

Route Pick(const std::vector<WorkerSnapshot>& workers, const RouteRequest& request) {
  const StatusOr<Route> route = PickRoute(workers, request);
  EXPECT_TRUE(route.ok()) << Message(route.status());
  return route.value_or(Route{});
}

using Addresses = std::vector<std::string>;

TEST(PickRoute, TakesTheLowerAddressOfEquals) {
  const std::vector<WorkerSnapshot> workers = {
      Ready("d2", WorkerRole::kDecode), Ready("p2", WorkerRole::kPrefill), Ready("d1", WorkerRole::kDecode),
      Ready("p1", WorkerRole::kPrefill)};
  const Route route = Pick(workers, {.prompt_tokens = 100});
  EXPECT_EQ(route.decode, "d1");
  EXPECT_EQ(route.prefill, (Addresses{"p1", "p2"}));
}

TEST(PickRoute, PrefersTheDecodeWorkerWithLessToDo) {
  std::vector<WorkerSnapshot> workers = {Ready("d1", WorkerRole::kDecode), Ready("d2", WorkerRole::kDecode)};
  workers[0].running = 3;
  EXPECT_EQ(Pick(workers, {.prompt_tokens = 100}).decode, "d2");
  workers[1].pages_free = 1;  // idle, but the prompt would have to wait for pages
  EXPECT_EQ(Pick(workers, {.prompt_tokens = 100}).decode, "d1");
}

TEST(PickRoute, ShortPromptsStayOnTheDecodeWorker) {
  const std::vector<WorkerSnapshot> workers = {Ready("d", WorkerRole::kDecode),
                                               Ready("p", WorkerRole::kPrefill)};
  EXPECT_EQ(Pick(workers, {.prompt_tokens = 64, .local_prefill_tokens_max = 64}).prefill, Addresses{});
  EXPECT_EQ(Pick(workers, {.prompt_tokens = 65, .local_prefill_tokens_max = 64}).prefill, Addresses{"p"});
}

TEST(PickRoute, OrdersPrefillWorkersByPredictedTime) {
  std::vector<WorkerSnapshot> workers = {Ready("d", WorkerRole::kDecode), Ready("p1", WorkerRole::kPrefill),
                                         Ready("p2", WorkerRole::kPrefill),
                                         Ready("p3", WorkerRole::kPrefill)};
  workers[1].prefill_tokens_per_second = 1000;
  workers[2].prefill_tokens_per_second = 4000;
  workers[3].prefill_tokens_per_second = 4000;
  workers[2].waiting = 1;
  workers[2].running = 3;  // five prompts at 4000 a second: slower than one at 1000
  EXPECT_EQ(Pick(workers, {.prompt_tokens = 100}).prefill, (Addresses{"p3", "p1", "p2"}));
}

TEST(PickRoute, UnmeasuredWorkersCountAsAverage) {
  std::vector<WorkerSnapshot> workers = {Ready("d", WorkerRole::kDecode), Ready("p1", WorkerRole::kPrefill),
                                         Ready("p2", WorkerRole::kPrefill),
                                         Ready("p3", WorkerRole::kPrefill)};
  workers[1].prefill_tokens_per_second = 1000;
  workers[3].prefill_tokens_per_second = 3000;
  EXPECT_EQ(Pick(workers, {.prompt_tokens = 100}).prefill, (Addresses{"p3", "p2", "p1"}));
}

TEST(PickRoute, LeavesOutIncompatiblePrefillWorkers) {
  std::vector<WorkerSnapshot> workers = {Ready("d", WorkerRole::kDecode)};
  for (int i = 0; i < 7; ++i) workers.push_back(Ready("p" + std::to_string(i), WorkerRole::kPrefill));
  workers[1].model_digest = "another";
  workers[2].layout_hash = 8;
  workers[3].protocol_version = 2;
  workers[4].connected = false;
  workers[5].ready = false;
  workers[6].pages_total = 1;
  EXPECT_EQ(Pick(workers, {.prompt_tokens = 100}).prefill, Addresses{"p6"});
  EXPECT_EQ(Pick(workers, {.prompt_tokens = 100, .exclude = {"p6"}}).prefill, Addresses{});
}

TEST(PickRoute, WeighsTheCacheOfDecodeWorkersAgainstTheirLoad) {
  struct Case {
    const char* what;
    int32_t cached;   // of 1000 tokens, on d2
    int32_t running;  // there
    const char* decode;
  };
  for (const Case& c : {Case{"nothing cached: the lower address", 0, 0, "d1"},
                        Case{"some cached", 64, 0, "d2"}, Case{"all cached, one sequence more", 960, 1, "d2"},
                        Case{"all cached, two sequences more", 960, 2, "d1"},
                        Case{"half cached, one sequence more", 448, 1, "d1"}}) {
    std::vector<WorkerSnapshot> workers = {Ready("d1", WorkerRole::kDecode),
                                           Ready("d2", WorkerRole::kDecode)};
    workers[1].cached_tokens = c.cached;
    workers[1].running = c.running;
    EXPECT_EQ(Pick(workers, {.prompt_tokens = 1000}).decode, c.decode) << c.what;
  }
}

TEST(PickRoute, CachedPagesNeedNoRoom) {
  std::vector<WorkerSnapshot> workers = {Ready("d1", WorkerRole::kDecode), Ready("d2", WorkerRole::kDecode)};
  workers[0].pages_free = workers[1].pages_free = 4;
  workers[1].cached_tokens = 896;
  workers[1].running = 5;
  EXPECT_EQ(Pick(workers, {.prompt_tokens = 1000}).decode, "d2") << "d1 would have to wait for pages";
}

TEST(PickRoute, PrefillWorkersWithTheLongestBeginningComeFirstUnlessTheyAreBusy) {
  std::vector<WorkerSnapshot> workers = {Ready("d", WorkerRole::kDecode), Ready("p1", WorkerRole::kPrefill),
                                         Ready("p2", WorkerRole::kPrefill),
                                         Ready("p3", WorkerRole::kPrefill)};
  for (auto& worker : workers) worker.prefill_tokens_per_second = 1000;
  workers[2].cached_tokens = 512;
  workers[3].cached_tokens = 960;
  EXPECT_EQ(Pick(workers, {.prompt_tokens = 1000}).prefill, (Addresses{"p3", "p2", "p1"}));
  workers[3].running = 1;  // a prompt ahead costs more than all that is cached saves
  EXPECT_EQ(Pick(workers, {.prompt_tokens = 1000}).prefill, (Addresses{"p2", "p1", "p3"}));
}

TEST(PickRoute, PromptsThatAreNearlyAllThereStayOnTheDecodeWorker) {
  std::vector<WorkerSnapshot> workers = {Ready("d", WorkerRole::kDecode), Ready("p", WorkerRole::kPrefill)};
  const RouteRequest request = {.prompt_tokens = 1000, .local_prefill_tokens_max = 64};
  EXPECT_EQ(Pick(workers, request).prefill, Addresses{"p"});
  workers[0].cached_tokens = 960;
  EXPECT_EQ(Pick(workers, request).prefill, Addresses{});
}

TEST(PickRoute, WorkersThatDoBothPrefillForDecodeWorkersOnly) {
  std::vector<WorkerSnapshot> workers = {Ready("a", WorkerRole::kDecode), Ready("b", WorkerRole::kBoth)};
  EXPECT_EQ(Pick(workers, {.prompt_tokens = 100}).prefill, Addresses{"b"});
  workers[0].role = WorkerRole::kBoth;
  EXPECT_EQ(Pick(workers, {.prompt_tokens = 100}).decode, "a");
  EXPECT_EQ(Pick(workers, {.prompt_tokens = 100}).prefill, Addresses{});
}

TEST(PickRoute, SaysWhyNobodyCanServe) {
  std::vector<WorkerSnapshot> workers = {Ready("d1", WorkerRole::kDecode), Ready("d2", WorkerRole::kDecode),
                                         Ready("p", WorkerRole::kPrefill)};
  EXPECT_EQ(Message(PickRoute(workers, {.prompt_tokens = 1, .exclude = {"d1", "d2"}}).status()),
            "no decode worker is left: 2 known, 2 ready, 2 failed this request already");
  EXPECT_EQ(Message(PickRoute(workers, {.prompt_tokens = 4096}).status()),
            "no decode worker can hold a prompt of 4096 tokens: 2 ready");
  workers[0].connected = workers[1].connected = false;
  const Status status = PickRoute(workers, {.prompt_tokens = 1}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(Message(status), "no decode worker is ready: 2 known, 0 connected");
}

}  // namespace
}  // namespace millrace::server
