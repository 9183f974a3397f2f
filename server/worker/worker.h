#pragma once
// One worker: an engine, a transfer engine and the gRPC service that joins them, for prefill, decode or both.

#include <memory>
#include <string>
#include <vector>

#include "base/metrics.h"
#include "base/status.h"
#include "engine/core/engine.h"
#include "engine/moe/expert_group.h"
#include "engine/tokenizer/tokenizer.h"
#include "server/router/router.h"
#include "server/rpc/peer_tls.h"
#include "server/trace/span.h"
#include "transfer/transfer.h"

namespace millrace::server {

struct WorkerOptions {
  WorkerRole role = WorkerRole::kBoth;  // to begin with
  std::string listen = "127.0.0.1:0";   // gRPC
  std::string model_name;
  std::string model_digest;
  int32_t grant_pages = 8;  // pages per grant (a chunk of the prompt); window of two grants in flight
  int32_t prefill_attempts_max = 3;  // P workers tried before D prefills itself
  // The engine may spend so long in one step. Then the worker counts itself as stalled: what it runs is
  // aborted, so that it goes on elsewhere, and it is not ready until a step ends. Longer than the slowest
  // step there is.
  Duration stall_max = std::chrono::seconds(60);
  PeerCredentials peers;                 // of gateways and other workers
  Metrics* metrics = nullptr;            // may be null; outlives the worker
  SpanSink* spans = nullptr;             // likewise
  engine::ExpertGroup* group = nullptr;  // whose rank this worker is, or null; outlives it
  const engine::Tokenizer* tokenizer =
      nullptr;  // for constrained answers, which are refused without; outlives it
};

// Thread-safe.
class Worker {
 public:
  // Registers the engine's KV memory with `transfer` and starts serving. Both are borrowed and outlive the
  // worker. Unavailable when the address cannot be bound ("127.0.0.1:7001: address already in use").
  static StatusOr<std::unique_ptr<Worker>> Start(const WorkerOptions& options, engine::Engine* engine,
                                                 transfer::Transfer* transfer);
  virtual ~Worker() = default;  // Shutdown(0) if not done; resolves every ticket before it returns
  virtual std::string address() const = 0;  // "host:port" as bound
  // Not ready from now on, new requests are refused with Unavailable, running ones get `grace`, then are
  // cancelled.
  virtual void Shutdown(Duration grace) = 0;
};

}  // namespace millrace::server
