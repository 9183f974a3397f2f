// What workers do about each other when one of them stops computing, fails again and again, or is of another
// revision.
#include <gtest/gtest.h>

#include "server/router/membership.h"
#include "tests/server/client.h"
#include "tests/server/fake_node.h"

namespace millrace::server {
namespace {

std::vector<int32_t> Expected(rpc::GenerateRequest request) {
  request.clear_prefill();
  Node alone(WorkerRole::kBoth);
  const Running running = Ask(alone.address(), request);
  EXPECT_TRUE(running.answer->Wait().ok());
  return running.answer->tokens();
}

TEST(Stall, ADecodeWorkerWhoseStepDoesNotEndGivesUpWhatItRuns) {
  Node node(WorkerRole::kDecode);
  MembershipOptions options;
  options.workers = {node.address()};
  const auto membership = *Membership::Create(options);
  ASSERT_TRUE(Eventually([&] { return membership->CanServe(); }));
  const uint64_t epoch = node.transfer.epoch();
  EXPECT_TRUE(membership->Alive(node.address(), epoch));
  EXPECT_FALSE(membership->Alive(node.address(), epoch + 1)) << "another process";

  node.engine.decode_paused = true;
  const Running running = Ask(node.address(), Request(100));
  ASSERT_TRUE(Eventually([&] { return running.answer->HasTokens(1); }));
  node.engine.stalled = true;
  EXPECT_EQ(running.answer->Wait().error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_TRUE(
      Eventually([&] { return !membership->CanServe() && !membership->Alive(node.address(), epoch); }));
  EXPECT_EQ(Ask(node.address(), Request(100)).answer->Wait().error_code(), grpc::StatusCode::UNAVAILABLE);

  node.engine.decode_paused = node.engine.stalled = false;
  EXPECT_TRUE(Eventually([&] { return membership->CanServe(); }));
  EXPECT_TRUE(Ask(node.address(), Request(100)).answer->Wait().ok());
  EXPECT_TRUE(Eventually([&] { return node.AllFree(); }));
}

TEST(Stall, DecodeTakesTheNextPrefillWorker) {
  for (const bool after_first_token : {false, true}) {
    SCOPED_TRACE(after_first_token);
    Node decode(WorkerRole::kDecode), stuck(WorkerRole::kPrefill), next(WorkerRole::kPrefill);
    stuck.engine.prefill_paused = !after_first_token;
    stuck.transfer.writes_paused = after_first_token;
    const rpc::GenerateRequest request = Request(300, {stuck.address(), next.address()});
    const Running running = Ask(decode.address(), request);
    ASSERT_TRUE(Eventually([&] {
      return after_first_token ? running.answer->HasTokens(1) : stuck.engine.Stats().running == 1;
    }));
    stuck.engine.stalled = true;
    EXPECT_TRUE(running.answer->Wait().ok());
    EXPECT_EQ(running.answer->tokens(), Expected(request)) << "the first token once";
    EXPECT_EQ(running.answer->phases().prefill_worker(), next.address());
    for (Node* node : {&decode, &stuck, &next}) EXPECT_TRUE(Eventually([&] { return node->AllFree(); }));
  }
}

// The breaker: after three failures in a row the worker is passed over, and watchers are told.
TEST(Health, ADecodeWorkerPassesOverAPrefillWorkerThatFailsAgainAndAgain) {
  Node decode(WorkerRole::kDecode), sick(WorkerRole::kPrefill), well(WorkerRole::kPrefill);
  MembershipOptions options;
  options.workers = {decode.address()};
  const auto membership = *Membership::Create(options);
  const rpc::GenerateRequest request = Request(300, {sick.address(), well.address()});
  const std::vector<int32_t> expected = Expected(request);
  sick.transfer.fail_writes = 1'000'000;
  const auto ask = [&] {
    const Running running = Ask(decode.address(), request);
    EXPECT_TRUE(running.answer->Wait().ok());
    EXPECT_EQ(running.answer->tokens(), expected);
    EXPECT_EQ(running.answer->phases().prefill_worker(), well.address());
  };
  for (int i = 0; i < 3; ++i) ask();
  EXPECT_EQ(sick.engine.prefills, 3);
  EXPECT_TRUE(Eventually([&] {
    const auto all = membership->Snapshot();
    return all.size() == 1 && all[0].avoids == std::vector<std::string>{sick.address()};
  }));
  // It stays out for a second at least, then it is tried, and when it is well it gets work again.
  sick.transfer.fail_writes = 0;
  EXPECT_TRUE(Eventually([&] {
    const Running running = Ask(decode.address(), request);
    EXPECT_TRUE(running.answer->Wait().ok());
    EXPECT_EQ(running.answer->tokens(), expected);
    return running.answer->phases().prefill_worker() == sick.address();
  }));
  for (Node* node : {&decode, &sick, &well}) EXPECT_TRUE(Eventually([&] { return node->AllFree(); }));
}

TEST(Health, AFullPrefillWorkerIsNotASickOne) {
  Node decode(WorkerRole::kDecode), full(WorkerRole::kPrefill);
  full.engine.full = true;
  const rpc::GenerateRequest request = Request(300, {full.address()});
  for (int i = 0; i < 6; ++i) EXPECT_TRUE(Ask(decode.address(), request).answer->Wait().ok());
  full.engine.full = false;
  const Running running = Ask(decode.address(), request);
  EXPECT_TRUE(running.answer->Wait().ok());
  EXPECT_EQ(running.answer->phases().prefill_worker(), full.address());
}

Status SetRole(const std::string& address, rpc::Role role) {
  const auto stub = rpc::Worker::NewStub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  rpc::SetRoleRequest request;
  request.set_role(role);
  rpc::SetRoleReply reply;
  return FromGrpc(stub->SetRole(&context, request, &reply));
}

TEST(Role, AnIdleWorkerTakesAnotherOneAndABusyOneDoesNot) {
  Node decode(WorkerRole::kDecode), worker(WorkerRole::kDecode);
  MembershipOptions options;
  options.workers = {worker.address()};
  const auto membership = *Membership::Create(options);
  const auto role = [&] { return membership->Snapshot().front().role; };
  ASSERT_TRUE(Eventually([&] { return membership->CanServe(); }));

  worker.engine.decode_paused = true;
  const Running running = Ask(worker.address(), Request(100));
  ASSERT_TRUE(Eventually([&] { return running.answer->HasTokens(1); }));
  EXPECT_EQ(SetRole(worker.address(), rpc::PREFILL).code(), absl::StatusCode::kFailedPrecondition);
  worker.engine.decode_paused = false;
  EXPECT_TRUE(running.answer->Wait().ok());

  EXPECT_TRUE(Eventually([&] { return SetRole(worker.address(), rpc::PREFILL).ok(); }));
  EXPECT_TRUE(Eventually([&] { return role() == WorkerRole::kPrefill && !membership->CanServe(); }));
  EXPECT_EQ(Ask(worker.address(), Request(10)).answer->Wait().error_code(),
            grpc::StatusCode::FAILED_PRECONDITION);
  const rpc::GenerateRequest request = Request(300, {worker.address()});
  const Running split = Ask(decode.address(), request);
  EXPECT_TRUE(split.answer->Wait().ok());
  EXPECT_EQ(split.answer->phases().prefill_worker(), worker.address());

  EXPECT_TRUE(Eventually([&] { return SetRole(worker.address(), rpc::DECODE).ok(); }));
  EXPECT_TRUE(Eventually([&] { return role() == WorkerRole::kDecode && membership->CanServe(); }));
  EXPECT_TRUE(Ask(worker.address(), Request(10)).answer->Wait().ok());
  EXPECT_EQ(SetRole(worker.address(), rpc::ROLE_UNSPECIFIED).code(), absl::StatusCode::kInvalidArgument);
}

TEST(Revisions, WorkersRefuseOtherProtocols) {
  Node decode(WorkerRole::kDecode), prefill(WorkerRole::kPrefill);
  rpc::GenerateRequest request = Request(10);
  request.set_protocol_version(kProtocolVersion - 1);
  EXPECT_EQ(Ask(decode.address(), request).answer->Wait().error_code(),
            grpc::StatusCode::FAILED_PRECONDITION);

  const auto stub =
      rpc::Worker::NewStub(grpc::CreateChannel(prefill.address(), grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  const auto stream = stub->Prefill(&context);
  rpc::PrefillCommand command;
  rpc::PrefillCommand::Start* const start = command.mutable_start();
  *start->mutable_request() = Request(10);
  start->set_transfer_descriptor(decode.transfer.Descriptor());
  start->set_num_pages(kPages);
  start->set_layout_hash(prefill.engine.kv_layout().CompatibilityHash());
  start->set_protocol_version(kProtocolVersion + 1);
  stream->Write(command);
  rpc::PrefillEvent event;
  EXPECT_FALSE(stream->Read(&event));
  const grpc::Status status = stream->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(status.error_message(), fmt::format("the caller speaks protocol {}, the worker {}",
                                                kProtocolVersion + 1, kProtocolVersion));
  EXPECT_EQ(prefill.engine.prefills, 0);
}

}  // namespace
}  // namespace millrace::server
