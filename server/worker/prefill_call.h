#pragma once
// Worker.Prefill on P: computes a prompt and pushes its KV into D's pages.

#include <memory>

#include "proto/worker.grpc.pb.h"
#include "server/worker/worker_context.h"

namespace millrace::server {

// The reactor of a new call; any thread.
grpc::ServerBidiReactor<worker::v1::PrefillCommand, worker::v1::PrefillEvent>* OpenPrefillCall(
    WorkerContext* context);

}  // namespace millrace::server
