#include "server/worker/worker.h"

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

#include "engine/kv/page_keys.h"
#include "server/router/membership.h"
#include "tests/server/client.h"
#include "tests/server/fake_node.h"

namespace millrace::server {
namespace {

using std::chrono::seconds;

// What one engine alone answers.
std::vector<int32_t> Expected(rpc::GenerateRequest request) {
  request.clear_prefill();
  Node alone(WorkerRole::kBoth);
  const Running running = Ask(alone.address(), request);
  EXPECT_TRUE(running.answer->Wait().ok());
  return running.answer->tokens();
}

class WorkerTest : public testing::Test {
 protected:
  void ExpectAnswer(const Running& running, const rpc::GenerateRequest& request) {
    const grpc::Status status = running.answer->Wait();
    EXPECT_TRUE(status.ok()) << status.error_message();
    EXPECT_EQ(running.answer->tokens(), Expected(request));
    ExpectNothingHeld();
  }
  void ExpectNothingHeld() {
    EXPECT_TRUE(Eventually([&] { return decode.AllFree(); }));
    EXPECT_TRUE(Eventually([&] { return prefill.AllFree(); }));
  }
  rpc::GenerateRequest Split(int32_t prompt_tokens, int32_t max_tokens = 6) {
    return Request(prompt_tokens, {prefill.address()}, max_tokens);
  }

  Node decode{WorkerRole::kDecode};
  Node prefill{WorkerRole::kPrefill};
};

TEST_F(WorkerTest, SplitAnswersEqualThoseOfOneEngine) {
  for (const int32_t length : {1, 63, 64, 65, 300, 1500}) {
    SCOPED_TRACE(length);
    const rpc::GenerateRequest request = Split(length);
    const Running running = Ask(decode.address(), request);
    ExpectAnswer(running, request);
    EXPECT_EQ(running.answer->phases_count(), 1);
    EXPECT_EQ(running.answer->phases().prefill_worker(), prefill.address());
  }
  EXPECT_EQ(decode.engine.prefills, 0);
  EXPECT_EQ(prefill.engine.prefills, 6);
}

TEST_F(WorkerTest, DecodeWorkerPrefillsWhenNobodyIsNamed) {
  const rpc::GenerateRequest request = Request(100);
  const Running running = Ask(decode.address(), request);
  ExpectAnswer(running, request);
  EXPECT_EQ(decode.engine.prefills, 1);
  EXPECT_EQ(running.answer->phases_count(), 1);
  EXPECT_EQ(running.answer->phases().prefill_worker(), "");
}

TEST_F(WorkerTest, ContinuesAnAnswerFromItsNextToken) {
  rpc::GenerateRequest request = Split(130, 9);
  request.add_output(5);
  request.add_output(6);
  const Running running = Ask(decode.address(), request);
  const grpc::Status status = running.answer->Wait();
  EXPECT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(running.answer->tokens().size(), 7u);  // their indexes are checked as they come
}

TEST_F(WorkerTest, OneTokenNeedsNoTransfer) {
  prefill.transfer.writes_paused = true;
  const rpc::GenerateRequest request = Split(200, 1);
  ExpectAnswer(Ask(decode.address(), request), request);
}

TEST_F(WorkerTest, ConcurrentAnswersDoNotMix) {
  std::vector<rpc::GenerateRequest> requests;
  std::vector<Running> running;
  for (int32_t i = 0; i < 12; ++i) {
    requests.push_back(Split(50 + 37 * i));
    running.push_back(Ask(decode.address(), requests.back()));
  }
  for (size_t i = 0; i < running.size(); ++i) {
    SCOPED_TRACE(i);
    EXPECT_TRUE(running[i].answer->Wait().ok());
    EXPECT_EQ(running[i].answer->tokens(), Expected(requests[i]));
  }
  ExpectNothingHeld();
}

TEST_F(WorkerTest, TakesTheNextPrefillWorkerWhenOneIsUnreachable) {
  std::string gone;
  {
    Node stopped(WorkerRole::kPrefill);
    gone = stopped.address();
  }
  const rpc::GenerateRequest request = Request(300, {gone, prefill.address()});
  const Running running = Ask(decode.address(), request);
  ExpectAnswer(running, request);
  EXPECT_EQ(running.answer->phases().prefill_worker(), prefill.address());
  EXPECT_EQ(decode.engine.prefills, 0);
}

TEST_F(WorkerTest, PrefillsItselfWhenPrefillWorkersRefuse) {
  prefill.engine.full = true;
  const rpc::GenerateRequest request = Split(300);
  ExpectAnswer(Ask(decode.address(), request), request);
  EXPECT_EQ(decode.engine.prefills, 1);
}

TEST_F(WorkerTest, TriesNoMorePrefillWorkersThanAllowed) {
  prefill.engine.full = true;
  const std::string p = prefill.address();
  const rpc::GenerateRequest request = Request(10, {p, p, p, p, p});
  ExpectAnswer(Ask(decode.address(), request), request);
  EXPECT_NE(decode.metrics.Text().find("millrace_worker_prefill_attempts_total{outcome=\"failed\"} 3"),
            std::string::npos);
}

TEST_F(WorkerTest, PairsOnlyWithPrefillWorkersThatFit) {
  Node decodes(WorkerRole::kDecode);
  Node other_layout(WorkerRole::kPrefill, /*head_dim=*/8);
  const rpc::GenerateRequest request = Request(100, {decodes.address(), other_layout.address()});
  ExpectAnswer(Ask(decode.address(), request), request);
  EXPECT_EQ(decodes.engine.prefills + other_layout.engine.prefills, 0);
  EXPECT_EQ(decode.engine.prefills, 1);
}

// Accepts connections and never says a word.
class SilentListener {
 public:
  SilentListener() : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in where{};
    where.sin_family = AF_INET;
    where.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(where);
    EXPECT_EQ(bind(fd_, reinterpret_cast<sockaddr*>(&where), size), 0);
    EXPECT_EQ(listen(fd_, 8), 0);
    EXPECT_EQ(getsockname(fd_, reinterpret_cast<sockaddr*>(&where), &size), 0);
    address = "127.0.0.1:" + std::to_string(ntohs(where.sin_port));
  }
  ~SilentListener() { close(fd_); }
  std::string address;

 private:
  const int fd_;
};

TEST_F(WorkerTest, DoesNotWaitForASilentPrefillWorker) {
  SilentListener silent;
  const rpc::GenerateRequest request = Request(300, {silent.address, prefill.address()});
  const auto begin = std::chrono::steady_clock::now();
  const Running running = Ask(decode.address(), request);
  ExpectAnswer(running, request);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, seconds(5));
  EXPECT_EQ(running.answer->phases().prefill_worker(), prefill.address());
}

TEST_F(WorkerTest, PrefillWorkerEndsWhileComputing) {
  Node second(WorkerRole::kPrefill);
  prefill.engine.prefill_paused = true;
  const rpc::GenerateRequest request = Request(300, {prefill.address(), second.address()});
  const Running running = Ask(decode.address(), request);
  ASSERT_TRUE(Eventually([&] { return prefill.engine.Stats().running == 1; }));
  prefill.worker->Shutdown(Duration(0));
  ExpectAnswer(running, request);
  EXPECT_EQ(running.answer->phases().prefill_worker(), second.address());
}

TEST_F(WorkerTest, FirstTokenComesAtOnceAndOnlyOnce) {
  prefill.transfer.writes_paused = true;
  const rpc::GenerateRequest request = Split(300);
  const Running running = Ask(decode.address(), request);
  ASSERT_TRUE(Eventually([&] { return running.answer->HasTokens(1); }));
  prefill.worker->Shutdown(Duration(0));  // after the token, before the KV
  ExpectAnswer(running, request);
  EXPECT_EQ(decode.engine.prefills, 1);
}

TEST_F(WorkerTest, TwoDifferentFirstTokensFailTheRequest) {
  prefill.transfer.writes_paused = true;
  prefill.engine.first_token_shift = 1;
  const Running running = Ask(decode.address(), Split(300));
  ASSERT_TRUE(Eventually([&] { return running.answer->HasTokens(1); }));
  prefill.worker->Shutdown(Duration(0));
  EXPECT_EQ(running.answer->Wait().error_code(), grpc::StatusCode::DATA_LOSS);
  EXPECT_EQ(running.answer->tokens().size(), 1u);
  ExpectNothingHeld();
}

TEST_F(WorkerTest, NeverDecodesOverDamagedPages) {
  decode.transfer.corrupt_at_close = true;
  const rpc::GenerateRequest request = Split(300);
  ExpectAnswer(Ask(decode.address(), request), request);
  EXPECT_EQ(decode.engine.prefills, 1);
  const std::string text = decode.metrics.Text();
  EXPECT_EQ(text.find("outcome=\"committed\""), std::string::npos);
  EXPECT_NE(text.find("millrace_worker_prefill_attempts_total{outcome=\"failed\"} 1"), std::string::npos);
}

TEST_F(WorkerTest, AFailedWriteIsNeverTakenForDone) {
  prefill.transfer.fail_writes = 1;
  const rpc::GenerateRequest request = Split(300);
  ExpectAnswer(Ask(decode.address(), request), request);
  EXPECT_EQ(decode.engine.prefills, 1);
}

TEST_F(WorkerTest, CancelGivesEverythingBackInEveryPhase) {
  struct Phase {
    const char* name;
    std::function<void(bool)> pause;
    std::function<bool(const Running&)> reached;
  };
  const auto computing = [&](const Running&) { return prefill.engine.Stats().running == 1; };
  const auto first_token = [&](const Running& running) { return running.answer->HasTokens(1); };
  const std::vector<Phase> phases = {
      {"waiting for pages", [&](bool on) { decode.engine.grants_paused = on; },
       [&](const Running&) { return decode.engine.Stats().running == 1; }},
      {"computing", [&](bool on) { prefill.engine.prefill_paused = on; }, computing},
      {"before the first token", [&](bool on) { prefill.engine.token_paused = on; },
       [&](const Running&) { return decode.transfer.bytes_received > 0; }},
      {"streaming", [&](bool on) { prefill.transfer.writes_paused = on; }, first_token},
      {"decoding", [&](bool on) { decode.engine.decode_paused = on; },
       [&](const Running& running) { return running.answer->phases_count() == 1; }},
  };
  for (const Phase& phase : phases) {
    SCOPED_TRACE(phase.name);
    decode.transfer.bytes_received = 0;
    phase.pause(true);
    const Running running = Ask(decode.address(), Split(500));
    EXPECT_TRUE(Eventually([&] { return phase.reached(running); }));
    running.call->Cancel();
    EXPECT_EQ(running.answer->Wait().error_code(), grpc::StatusCode::CANCELLED);
    ExpectNothingHeld();
    phase.pause(false);
    ExpectNothingHeld();
  }
}

TEST_F(WorkerTest, CancelStormsLeaveNothingBehind) {
  Random random(3);
  for (int i = 0; i < 60; ++i) {
    const Running running = Ask(decode.address(), Split(1 + static_cast<int32_t>(random.Below(700)), 20));
    std::this_thread::sleep_for(std::chrono::microseconds(random.Below(8000)));
    running.call->Cancel();
    if (i % 8 == 7) running.answer->Wait();
  }
  ExpectNothingHeld();
  const rpc::GenerateRequest request = Split(400);
  ExpectAnswer(Ask(decode.address(), request), request);
}

TEST_F(WorkerTest, DeadlineEndsTheRequestOnBothSides) {
  prefill.engine.prefill_paused = true;
  rpc::GenerateRequest request = Split(300);
  request.set_timeout_us(100'000);
  const Running running = Ask(decode.address(), request);
  EXPECT_EQ(running.answer->Wait().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  ExpectNothingHeld();
}

TEST_F(WorkerTest, DecodeWorkerEndsWhileStreaming) {
  prefill.transfer.writes_paused = true;
  const Running running = Ask(decode.address(), Split(300));
  ASSERT_TRUE(Eventually([&] { return running.answer->HasTokens(1); }));
  decode.worker->Shutdown(Duration(0));
  EXPECT_EQ(running.answer->Wait().error_code(), grpc::StatusCode::UNAVAILABLE);
  ExpectNothingHeld();
}

TEST_F(WorkerTest, RefusesWhatItCannotServe) {
  rpc::GenerateRequest request = Request(10);
  request.set_model_digest("another");
  EXPECT_EQ(Ask(decode.address(), request).answer->Wait().error_code(),
            grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(Ask(prefill.address(), Request(10)).answer->Wait().error_code(),
            grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(Ask(decode.address(), Request(0)).answer->Wait().error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
  decode.engine.full = true;
  EXPECT_EQ(Ask(decode.address(), Request(10)).answer->Wait().error_code(),
            grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(Ask(decode.address(), Split(10)).answer->Wait().error_code(),
            grpc::StatusCode::RESOURCE_EXHAUSTED);
}

TEST_F(WorkerTest, ShutdownLetsRunningRequestsFinishAndRefusesNewOnes) {
  decode.engine.decode_paused = true;
  const rpc::GenerateRequest request = Split(300);
  const Running running = Ask(decode.address(), request);
  ASSERT_TRUE(Eventually([&] { return running.answer->phases_count() == 1; }));
  std::thread shutdown([&] { decode.worker->Shutdown(seconds(10)); });
  EXPECT_TRUE(Eventually([&] {
    return Ask(decode.address(), Request(5, {}, 1)).answer->Wait().error_code() ==
           grpc::StatusCode::UNAVAILABLE;
  }));
  decode.engine.decode_paused = false;
  ExpectAnswer(running, request);
  shutdown.join();
}

TEST_F(WorkerTest, APortInUseIsAnError) {
  FakeEngine engine(4);
  FakeTransfer transfer;
  WorkerOptions options;
  options.listen = decode.address();
  const auto second = Worker::Start(options, &engine, &transfer);
  ASSERT_FALSE(second.ok());
  EXPECT_EQ(Message(second.status()), decode.address() + ": address already in use");
}

// The answer of grpc.health.v1.Health/Check as bytes: field 1 (status), 1 = SERVING, 2 = NOT_SERVING.
std::string Health(const std::string& address, const std::string& service) {
  grpc::GenericStub stub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  std::string bytes;
  if (!service.empty()) bytes = std::string("\x0a") + static_cast<char>(service.size()) + service;
  const grpc::Slice slice(bytes);
  const grpc::ByteBuffer request(&slice, 1);
  grpc::ByteBuffer response;
  grpc::ClientContext context;
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  stub.UnaryCall(&context, "/grpc.health.v1.Health/Check", {}, &request, &response,
                 [&](const grpc::Status& status) {
                   EXPECT_TRUE(status.ok()) << status.error_message();
                   std::lock_guard lock(mutex);
                   done = true;
                   changed.notify_all();
                 });
  std::unique_lock lock(mutex);
  changed.wait(lock, [&] { return done; });
  grpc::Slice answer;
  EXPECT_TRUE(response.TrySingleSlice(&answer).ok());
  return std::string(reinterpret_cast<const char*>(answer.begin()), answer.size());
}

TEST_F(WorkerTest, AnswersHealthChecks) {
  EXPECT_EQ(Health(decode.address(), ""), "\x08\x01");
  EXPECT_EQ(Health(decode.address(), "millrace.worker.v1.Worker"), "\x08\x01");
}

TEST_F(WorkerTest, MembershipSeesWorkersComeAndGo) {
  MembershipOptions options;
  options.workers = {decode.address(), prefill.address()};
  const auto membership = *Membership::Create(options);
  ASSERT_TRUE(Eventually([&] {
    const auto all = membership->Snapshot();
    return all.size() == 2 && all[0].ready && all[1].ready;
  }));
  EXPECT_TRUE(membership->CanServe());
  const StatusOr<Route> route = PickRoute(membership->Snapshot(), {.prompt_tokens = 100});
  ASSERT_TRUE(route.ok()) << Message(route.status());
  EXPECT_EQ(route->decode, decode.address());
  EXPECT_EQ(route->prefill, std::vector<std::string>{prefill.address()});

  const std::string address = decode.address();
  decode.worker.reset();
  EXPECT_TRUE(Eventually([&] { return !membership->CanServe(); }));
  decode.options.listen = address;
  decode.worker = *Worker::Start(decode.options, &decode.engine, &decode.transfer);
  EXPECT_TRUE(Eventually([&] { return membership->CanServe(); }));
}

TEST_F(WorkerTest, MembershipKnowsWhatIsCachedWhere) {
  MembershipOptions options;
  options.workers = {decode.address(), prefill.address()};
  const auto membership = *Membership::Create(options);
  const rpc::GenerateRequest request = Request(300);
  const std::vector<int32_t> prompt(request.prompt().begin(), request.prompt().end());
  std::vector<uint64_t> keys;
  engine::ExtendPageKeys(engine::CacheRoot("digest", "salt"), prompt, &keys);
  const auto cached = [&](const std::string& address, const std::string& salt) {
    for (const WorkerSnapshot& worker : membership->Snapshot({prompt, salt})) {
      if (worker.address == address && worker.connected) return worker.cached_tokens;
    }
    return -1;
  };
  decode.engine.cache_log.OnCached(keys[0]);  // before anybody watches
  EXPECT_TRUE(Eventually([&] { return cached(decode.address(), "salt") == 64; }));
  decode.engine.cache_log.OnCached(keys[1]);
  decode.engine.cache_log.OnCached(keys[3]);  // of no use without the one before it
  EXPECT_TRUE(Eventually([&] { return cached(decode.address(), "salt") == 128; }));
  EXPECT_EQ(cached(decode.address(), "pepper"), 0);
  EXPECT_EQ(cached(prefill.address(), "salt"), 0);
  decode.engine.cache_log.OnForgotten(keys[0]);
  EXPECT_TRUE(Eventually([&] { return cached(decode.address(), "salt") == 0; }));
}

TEST_F(WorkerTest, MeasuresThePrefillRate) {
  MembershipOptions options;
  options.workers = {prefill.address()};
  const auto membership = *Membership::Create(options);
  const rpc::GenerateRequest request = Split(640);
  ExpectAnswer(Ask(decode.address(), request), request);
  EXPECT_TRUE(Eventually([&] {
    const auto all = membership->Snapshot();
    return all.size() == 1 && all[0].prefill_rate.value > 0;
  }));
}

}  // namespace
}  // namespace millrace::server
