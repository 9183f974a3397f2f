#pragma once
// Sends spans to an OpenTelemetry collector, over gRPC.

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/metrics.h"
#include "base/status.h"
#include "server/trace/span.h"

namespace grpc {
class ClientContext;
}

namespace millrace::server {

struct OtlpOptions {
  std::string endpoint;  // "http://host:4317", or https:// for TLS under the system's authorities
  // Of the process, beside its host's name and its process id.
  std::string service_name;
  std::string service_version;
  size_t queue_max = 8192;                        // spans that wait; further ones are dropped and counted
  Duration send_every = std::chrono::seconds(1);  // or when a batch is full
  Duration last_word = std::chrono::seconds(2);   // what is left at the end may take so long
};

// Thread-safe. One thread of its own sends; whatever becomes of that, who ends a span never waits.
class OtlpExporter final : public SpanSink {
 public:
  // InvalidArgument for an endpoint that is none. Nobody needs to listen there yet. `metrics` outlives it.
  static StatusOr<std::unique_ptr<OtlpExporter>> Start(const OtlpOptions& options, Metrics& metrics);
  ~OtlpExporter() override;  // sends what is left
  void Take(SpanRecord span) override;

 private:
  OtlpExporter(OtlpOptions options, std::string address, bool tls, Metrics& metrics);
  class Collector;

  void Run(const std::string& address, bool tls);
  std::vector<SpanRecord> NextBatch();
  void Send(Collector& collector, const std::vector<SpanRecord>& batch);
  bool WaitToRetry(int failures);

  const OtlpOptions options_;
  prometheus::Counter& sent_;
  prometheus::Counter& dropped_;  // the queue was full
  prometheus::Counter& failed_;   // given up

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<SpanRecord> queue_;
  bool stopping_ = false;   // no more spans come; those that wait are sent
  bool abandoned_ = false;  // those that wait are not
  bool ended_ = false;
  grpc::ClientContext* running_ = nullptr;  // the call that is being made
  bool complained_ = false;                 // the thread's own
  std::thread thread_;
};

}  // namespace millrace::server
