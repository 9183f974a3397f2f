#pragma once
// Worker.Watch: who this worker is and how busy it is.

#include "proto/worker.grpc.pb.h"
#include "server/worker/worker_context.h"

namespace millrace::server {

// The reactor of a new call; any thread.
grpc::ServerWriteReactor<worker::v1::WorkerState>* OpenWatchCall(WorkerContext* context);

}  // namespace millrace::server
