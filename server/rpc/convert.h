#pragma once
// Between the messages of worker.proto and native structs. What comes off the wire is checked here, again,
// although the edge checked it: a peer may be of another version.

#include <span>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "engine/core/engine.h"
#include "proto/worker.pb.h"
#include "server/trace/trace_context.h"

namespace millrace::server {

namespace rpc = ::millrace::worker::v1;  // generated messages

// Workers pair only with equals.
inline constexpr uint32_t kProtocolVersion = 4;

// A request for the engine, deadline = now + timeout_us. InvalidArgument names the field.
StatusOr<engine::EngineRequest> RequestFromProto(const rpc::GenerateRequest& message, engine::RequestId id,
                                                 TimePoint now);
// Which trace the message's call belongs to.
TraceContext TraceFromProto(const rpc::GenerateRequest& message);
void TraceToProto(const TraceContext& trace, rpc::GenerateRequest* message);

void SamplingToProto(const engine::SamplingParams& params, rpc::Sampling* message);

void TokenToProto(const engine::TokenEvent& event, rpc::Token* message);
engine::TokenEvent TokenFromProto(const rpc::Token& message);

// The pages in order, runs of consecutive ids joined.
void PagesToProto(std::span<const engine::PageId> pages, rpc::PrefillCommand::Grant* message);
// InvalidArgument for a page outside [0, num_pages) or more than `count_max` pages.
StatusOr<std::vector<engine::PageId>> PagesFromProto(const rpc::PrefillCommand::Grant& message,
                                                     int32_t num_pages, int32_t count_max);

// What is left until `deadline` in microseconds, at least 1; 0 when there is none.
int64_t TimeoutUs(TimePoint deadline, TimePoint now);

}  // namespace millrace::server
