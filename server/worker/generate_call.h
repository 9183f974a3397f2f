#pragma once
// Worker.Generate on D: the owner of one request.

#include <memory>

#include "proto/worker.pb.h"
#include "server/rpc/call_stream.h"
#include "server/worker/worker_context.h"

namespace millrace::server {

// Control thread. The call finishes `stream` in any case; the caller's loss is an Abort.
std::shared_ptr<WorkerCall> BeginGenerate(WorkerContext* context, const worker::v1::GenerateRequest& request,
                                          std::shared_ptr<CallStream<worker::v1::GenerateEvent>> stream);

}  // namespace millrace::server
