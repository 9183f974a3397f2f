#pragma once
// The gateway's side of Worker.Generate: one request on one decode worker.

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <memory>

#include "proto/worker.grpc.pb.h"

namespace millrace::server {

namespace rpc = ::millrace::worker::v1;  // generated messages

// Receives the events of one Generate call. gRPC's threads, one call at a time, in order.
class GenerateObserver {
 public:
  virtual ~GenerateObserver() = default;
  virtual void OnEvent(const rpc::GenerateEvent& event) = 0;
  virtual void OnDone(const grpc::Status& status) = 0;  // last; exactly once
};

// A handle on a running call. Cancel is idempotent, any thread; OnDone still comes.
class GenerateCall {
 public:
  virtual ~GenerateCall() = default;
  virtual void Cancel() = 0;
};

// Starts the call. The observer is kept until OnDone returned. `deadline` is the gRPC deadline (none when it
// is time_point::max()).
std::shared_ptr<GenerateCall> StartGenerate(std::shared_ptr<grpc::Channel> channel,
                                            const rpc::GenerateRequest& request,
                                            std::chrono::system_clock::time_point deadline,
                                            std::shared_ptr<GenerateObserver> observer);

}  // namespace millrace::server
