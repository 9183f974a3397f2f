#pragma once
// Worker.Prefill on P: computes a prompt and pushes its KV into D's pages.

#include <memory>

#include "proto/worker.pb.h"
#include "server/rpc/call_stream.h"
#include "server/worker/worker_context.h"

namespace millrace::server {

// Control thread. The call finishes its stream in any case; D's loss is an Abort.
class PrefillCall : public WorkerCall {
 public:
  static std::shared_ptr<PrefillCall> Begin(WorkerContext* context,
                                            std::shared_ptr<CallStream<worker::v1::PrefillEvent>> stream);
  virtual void OnCommand(const worker::v1::PrefillCommand& command) = 0;
};

}  // namespace millrace::server
