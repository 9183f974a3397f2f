#pragma once
// D's streams to P workers: Worker.Prefill from the calling side.

#include <memory>
#include <string>

#include "base/clock.h"
#include "base/status.h"
#include "proto/worker.pb.h"
#include "server/rpc/peer_tls.h"
#include "server/worker/worker_context.h"

namespace millrace::server {

namespace rpc = ::millrace::worker::v1;

// Control thread.
class PrefillStreamObserver {
 public:
  virtual ~PrefillStreamObserver() = default;
  virtual void OnEvent(const rpc::PrefillEvent& event) = 0;
  virtual void OnStreamEnd(const Status& status) = 0;  // last; exactly once
};

// Control thread.
class PrefillStream {
 public:
  virtual ~PrefillStream() = default;
  virtual void Write(rpc::PrefillCommand command) = 0;
  virtual void Cancel() = 0;  // OnStreamEnd still comes
};

// Control thread.
class PrefillDialer {
 public:
  virtual ~PrefillDialer() = default;
  // Connects `context`'s worker to the one at `address` and sends `start`. The observer is kept until
  // OnStreamEnd returned.
  virtual std::shared_ptr<PrefillStream> Open(WorkerContext* context, const std::string& address,
                                              TimePoint deadline, rpc::PrefillCommand start,
                                              std::shared_ptr<PrefillStreamObserver> observer) = 0;
};

// Over gRPC.
std::unique_ptr<PrefillDialer> MakePrefillDialer(std::shared_ptr<grpc::ChannelCredentials> credentials);

}  // namespace millrace::server
