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

// A measurement that is to be believed as it stands.
Measured Trusted(double value) { return {value, 1'000'000'000, Duration(0)}; }

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
  workers[1].prefill_rate = Trusted(1000);
  workers[2].prefill_rate = Trusted(4000);
  workers[3].prefill_rate = Trusted(4000);
  workers[2].waiting = 1;
  workers[2].running = 3;  // five prompts at 4000 a second: slower than one at 1000
  EXPECT_EQ(Pick(workers, {.prompt_tokens = 100}).prefill, (Addresses{"p3", "p1", "p2"}));
}

TEST(PickRoute, UnmeasuredWorkersCountAsTheMedian) {
  std::vector<WorkerSnapshot> workers = {Ready("d", WorkerRole::kDecode), Ready("p1", WorkerRole::kPrefill),
                                         Ready("p2", WorkerRole::kPrefill),
                                         Ready("p3", WorkerRole::kPrefill)};
  workers[1].prefill_rate = Trusted(1000);
  workers[3].prefill_rate = Trusted(3000);
  EXPECT_EQ(Pick(workers, {.prompt_tokens = 100}).prefill, (Addresses{"p3", "p1", "p2"}));
  workers[2].waiting = 0;
  workers[1].waiting = 1;
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
  for (auto& worker : workers) worker.prefill_rate = Trusted(1000);
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

TEST(PickRoute, ABadMeasurementStarvesNobody) {
  struct Case {
    const char* what;
    Measured p1;     // p2 is trusted with 10,000 a second
    bool gets_work;  // when two prompts are ahead of this one at p2 and none at p1
  };
  using std::chrono::seconds;
  for (const Case& c :
       {Case{"one slow first prompt", {100, 1, seconds(0)}, true},
        Case{"slow again and again", {100, 100, seconds(0)}, false},
        Case{"that was a while ago", {100, 100, seconds(10)}, true},
        Case{"half as fast, and sure", {5000, 100, seconds(0)}, true}, Case{"never measured", {}, true}}) {
    std::vector<WorkerSnapshot> workers = {Ready("d", WorkerRole::kDecode), Ready("p1", WorkerRole::kPrefill),
                                           Ready("p2", WorkerRole::kPrefill)};
    workers[1].prefill_rate = c.p1;
    workers[2].prefill_rate = Trusted(10'000);
    workers[2].waiting = 2;
    EXPECT_EQ(Pick(workers, {.prompt_tokens = 400}).prefill.front(), c.gets_work ? "p1" : "p2") << c.what;
  }
}

TEST(PickRoute, DecodeWorkersThatAreSlowGetLess) {
  struct Case {
    const char* what;
    Measured gap;     // of d1; its peers' is 10 ms
    int32_t running;  // on d2 and d3
    const char* decode;
  };
  using std::chrono::seconds;
  for (const Case& c :
       {Case{"as fast", Trusted(0.010), 1, "d1"}, Case{"a little slower", Trusted(0.018), 1, "d1"},
        Case{"four times slower", Trusted(0.040), 1, "d2"},
        Case{"four times slower, the others busy", Trusted(0.040), 10, "d1"},
        Case{"one slow token", {0.040, 1, seconds(0)}, 1, "d1"},
        Case{"was slow", {0.040, 1000, seconds(20)}, 1, "d1"}, Case{"never measured", {}, 1, "d1"}}) {
    std::vector<WorkerSnapshot> workers = {Ready("d1", WorkerRole::kDecode), Ready("d2", WorkerRole::kDecode),
                                           Ready("d3", WorkerRole::kDecode)};
    workers[0].token_gap = c.gap;
    workers[1].token_gap = workers[2].token_gap = Trusted(0.010);
    workers[1].running = workers[2].running = c.running;
    EXPECT_EQ(Pick(workers, {.prompt_tokens = 100}).decode, c.decode) << c.what;
  }
}

TEST(PickRoute, DoubtfulWorkersComeLastButBeforeNobody) {
  struct Case {
    const char* what;
    void (*spoil)(WorkerSnapshot*);
    bool doubtful;
  };
  for (const Case& c : {Case{"failed lately", [](WorkerSnapshot* w) { w->avoid = true; }, true},
                        Case{"silent for two turns",
                             [](WorkerSnapshot* w) { w->silent = std::chrono::milliseconds(1600); }, true},
                        Case{"spoke just now",
                             [](WorkerSnapshot* w) { w->silent = std::chrono::milliseconds(600); }, false}}) {
    std::vector<WorkerSnapshot> workers = {Ready("d1", WorkerRole::kDecode), Ready("d2", WorkerRole::kDecode),
                                           Ready("p1", WorkerRole::kPrefill),
                                           Ready("p2", WorkerRole::kPrefill)};
    workers[1].running = workers[3].running = 9;
    c.spoil(&workers[0]);
    c.spoil(&workers[2]);
    const Route route = Pick(workers, {.prompt_tokens = 100});
    EXPECT_EQ(route.decode, c.doubtful ? "d2" : "d1") << c.what;
    EXPECT_EQ(route.prefill, (c.doubtful ? Addresses{"p2", "p1"} : Addresses{"p1", "p2"})) << c.what;
    EXPECT_EQ(Pick(workers, {.prompt_tokens = 100, .exclude = {"d2", "p2"}}).decode, "d1") << c.what;
  }
}

TEST(PickRoute, PrefillWorkersBehindSickRailsAndThoseThatFailedThisDecodeWorkerComeLast) {
  struct Case {
    const char* what;
    std::vector<WorkerLink> links;    // of p1
    std::vector<std::string> avoids;  // of d
    int32_t waiting;                  // at p2
    const char* first;
  };
  for (const Case& c :
       {Case{"nothing known", {}, {}, 0, "p1"}, Case{"all paths up", {{7, 2, 2}}, {}, 0, "p1"},
        Case{"one of two down", {{7, 2, 1}}, {}, 0, "p2"},
        Case{"one of two down, the other is busy", {{7, 2, 1}}, {}, 2, "p1"},
        Case{"all down", {{7, 2, 0}}, {}, 50, "p2"},
        Case{"all down to somebody else", {{8, 2, 0}}, {}, 0, "p1"},
        Case{"it failed this decode worker", {}, {"p1"}, 50, "p2"}}) {
    std::vector<WorkerSnapshot> workers = {Ready("d", WorkerRole::kDecode), Ready("p1", WorkerRole::kPrefill),
                                           Ready("p2", WorkerRole::kPrefill)};
    workers[0].epoch = 7;
    workers[0].avoids = c.avoids;
    workers[1].links = c.links;
    workers[2].waiting = c.waiting;
    EXPECT_EQ(Pick(workers, {.prompt_tokens = 100}).prefill.front(), c.first) << c.what;
    EXPECT_EQ(Pick(workers, {.prompt_tokens = 100}).prefill.size(), 2u) << c.what;
  }
}

TEST(PickRoute, AnAnswerGoesOnWithTheSameWeights) {
  std::vector<WorkerSnapshot> workers = {Ready("d1", WorkerRole::kDecode), Ready("d2", WorkerRole::kDecode)};
  workers[0].model_digest = "another";
  EXPECT_EQ(Pick(workers, {.prompt_tokens = 100}).decode, "d1");
  EXPECT_EQ(Pick(workers, {.prompt_tokens = 100, .model_digest = "m"}).decode, "d2");
  EXPECT_EQ(Message(PickRoute(workers, {.prompt_tokens = 1, .model_digest = "x"}).status()),
            "no decode worker can hold a prompt of 1 tokens for model x: 2 ready");
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
