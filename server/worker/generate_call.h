#pragma once
// Worker.Generate on D: the owner of one request.

#include <memory>

#include "proto/worker.grpc.pb.h"
#include "server/worker/worker_context.h"

namespace millrace::server {

// The reactor of a new call; any thread. `request` stays until the call is done, as gRPC promises.
grpc::ServerWriteReactor<worker::v1::GenerateEvent>* OpenGenerateCall(
    WorkerContext* context, const worker::v1::GenerateRequest* request);

}  // namespace millrace::server
