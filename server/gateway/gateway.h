#pragma once
// The HTTP front: OpenAI's API over the workers that a Membership knows.

#include <memory>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/metrics.h"
#include "base/status.h"
#include "engine/tokenizer/tokenizer.h"
#include "server/gateway/admission.h"
#include "server/gateway/api_request.h"
#include "server/gateway/generation.h"
#include "server/gateway/tls.h"
#include "server/router/membership.h"
#include "server/trace/span.h"

namespace millrace::server {

struct GatewayOptions {
  std::string listen = "127.0.0.1:8000";
  std::string admin_listen;               // metrics and control; empty: they are on `listen`, behind the keys
  std::string grpc_listen;                // millrace.v1.Chat; empty: not served
  std::string api_keys;                   // file, see ApiKeys; empty: everybody may ask
  TlsOptions tls;                         // of `listen`
  std::vector<std::string> cors_origins;  // pages of these may ask from a browser; "*" = all; empty: none
  AdmissionOptions admission;
  bool hosts_workers = false;                            // in this process: /live speaks for them too
  bool vllm_metrics = true;                              // /metrics has them under vLLM's names too
  std::string effective;                                 // the configuration in words, for /info
  int threads = 1;                                       // that serve connections
  size_t body_bytes_max = size_t{32} << 20;              // 413 beyond
  uint32_t header_bytes_max = 32 << 10;                  // 431 beyond
  int32_t connections_max = 4096;                        // further ones are closed at once
  Duration header_timeout = std::chrono::seconds(20);    // from the first byte of a request to its last
  Duration idle_timeout = std::chrono::seconds(75);      // between requests of one connection
  Duration write_timeout = std::chrono::seconds(30);     // one write to a client that does not read
  Duration keepalive = std::chrono::seconds(15);         // comment lines in a silent stream
  Duration request_timeout = std::chrono::seconds(600);  // when the client names none
  GenerationOptions generation;
  Tracing tracing;
};

// Thread-safe. Connections are served by the gateway's own threads, each connection on one strand.
class Gateway {
 public:
  // Everything borrowed outlives the gateway. Unavailable when an address cannot be bound, InvalidArgument
  // when keys or certificate cannot be used.
  static StatusOr<std::unique_ptr<Gateway>> Start(const GatewayOptions& options, const ModelInfo& model,
                                                  const engine::Tokenizer& tokenizer, Membership& membership,
                                                  Metrics& metrics);
  virtual ~Gateway() = default;                   // Shutdown(0) if not done
  virtual std::string address() const = 0;        // "host:port" as bound
  virtual std::string admin_address() const = 0;  // likewise, or empty
  virtual std::string grpc_address() const = 0;   // likewise
  // Stops accepting, lets running answers finish for `grace`, then cuts them. Returns when all connections
  // are gone.
  virtual void Shutdown(Duration grace) = 0;
};

}  // namespace millrace::server
