#pragma once
// The calls of a worker over gRPC. gRPC's callbacks come on its threads and only post to the control thread.

#include <grpcpp/grpcpp.h>

#include "proto/worker.grpc.pb.h"
#include "server/worker/worker_context.h"

namespace millrace::server {

// The reactor of a new call; any thread.
grpc::ServerWriteReactor<worker::v1::GenerateEvent>* OpenGenerate(WorkerContext* context,
                                                                  const worker::v1::GenerateRequest& request);
grpc::ServerBidiReactor<worker::v1::PrefillCommand, worker::v1::PrefillEvent>* OpenPrefill(
    WorkerContext* context);

}  // namespace millrace::server
