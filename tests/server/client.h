#pragma once
// A client of one worker, for tests: asks, and checks that tokens come with gap-free numbers.

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "server/rpc/channel.h"
#include "server/rpc/convert.h"
#include "server/rpc/generate_client.h"

namespace millrace::server {

// Waits for what other threads bring about; the bound only ends a failing test.
template <typename Condition>
bool Eventually(Condition condition) {
  const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > limit) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

class Answer : public GenerateObserver {
 public:
  void OnEvent(const rpc::GenerateEvent& event) override {
    std::lock_guard lock(mutex_);
    if (event.has_phases()) {
      phases_ = event.phases();
      ++phases_count_;
    } else {
      EXPECT_EQ(event.token().index(), first_index + static_cast<int32_t>(tokens_.size()));
      if (tokens_.empty()) cached_tokens_ = event.token().cached_tokens();
      EXPECT_EQ(event.token().mtp_hidden(), "") << "between workers only";
      tokens_.push_back(event.token().token());
    }
  }
  void OnDone(const grpc::Status& status) override {
    std::lock_guard lock(mutex_);
    status_ = status;
    done_ = true;
    changed_.notify_all();
  }
  grpc::Status Wait() {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, std::chrono::seconds(20), [this] { return done_; })) << "no answer";
    return status_;
  }
  std::vector<int32_t> tokens() {
    std::lock_guard lock(mutex_);
    return tokens_;
  }
  int32_t cached_tokens() {
    std::lock_guard lock(mutex_);
    return cached_tokens_;
  }
  bool HasTokens(size_t count) { return tokens().size() >= count; }
  rpc::Phases phases() {
    std::lock_guard lock(mutex_);
    return phases_;
  }
  int phases_count() {
    std::lock_guard lock(mutex_);
    return phases_count_;
  }
  int32_t first_index = 0;

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<int32_t> tokens_;
  int32_t cached_tokens_ = -1;
  rpc::Phases phases_;
  int phases_count_ = 0;
  grpc::Status status_;
  bool done_ = false;
};

inline rpc::GenerateRequest Request(int32_t prompt_tokens, const std::vector<std::string>& prefill = {},
                                    int32_t max_tokens = 6) {
  rpc::GenerateRequest request;
  request.set_request_id("test");
  request.set_protocol_version(kProtocolVersion);
  for (int32_t i = 0; i < prompt_tokens; ++i) request.add_prompt((i * 7 + prompt_tokens) % 999);
  engine::SamplingParams params;
  params.seed = 11;
  params.max_tokens = max_tokens;
  SamplingToProto(params, request.mutable_sampling());
  request.set_model_digest("digest");
  for (const std::string& address : prefill) request.add_prefill(address);
  return request;
}

struct Running {
  std::shared_ptr<Answer> answer = std::make_shared<Answer>();
  std::shared_ptr<GenerateCall> call;
};

inline Running Ask(const std::string& address, const rpc::GenerateRequest& request) {
  Running running;
  running.answer->first_index = request.output_size();
  auto channel = grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), ChannelArguments());
  running.call = StartGenerate(std::move(channel), request, std::chrono::system_clock::time_point::max(),
                               running.answer);
  return running;
}

}  // namespace millrace::server
