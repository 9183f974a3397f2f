#include "server/trace/otlp_exporter.h"

#include <grpcpp/grpcpp.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <string_view>

#include "base/log.h"
#include "base/net.h"
#include "base/thread.h"
#include "proto/otlp.grpc.pb.h"

namespace millrace::server {
namespace {

namespace otlp = ::opentelemetry::proto::collector::trace::v1;

constexpr size_t kBatchMax = 512;
constexpr Duration kCallTimeout = std::chrono::seconds(10);
constexpr int kTriesMax = 6;  // of one batch, after 1, 2, 4, 8 and 16 seconds
constexpr const char* kScheme = "http://";
constexpr const char* kTlsScheme = "https://";

void AddAttribute(const std::string& key, const SpanValue& value,
                  google::protobuf::RepeatedPtrField<otlp::KeyValue>* out) {
  otlp::KeyValue* const entry = out->Add();
  entry->set_key(key);
  otlp::AnyValue* const to = entry->mutable_value();
  if (const auto* text = std::get_if<std::string>(&value)) to->set_string_value(*text);
  if (const auto* number = std::get_if<int64_t>(&value)) to->set_int_value(*number);
  if (const auto* real = std::get_if<double>(&value)) to->set_double_value(*real);
  if (const auto* list = std::get_if<std::vector<std::string>>(&value)) {
    to->mutable_array_value();
    for (const std::string& each : *list) to->mutable_array_value()->add_values()->set_string_value(each);
  }
}

std::string BigEndian(uint64_t value) {
  std::string bytes(8, '\0');
  for (size_t i = 0; i < 8; ++i) bytes[i] = static_cast<char>(value >> (56 - 8 * i) & 0xff);
  return bytes;
}

// Spans are timed by the steady clock; the two clocks are compared when the span is sent, within seconds of
// its end.
uint64_t UnixNanoseconds(TimePoint when, TimePoint steady_now, std::chrono::system_clock::time_point now) {
  const auto at = now - std::chrono::duration_cast<std::chrono::system_clock::duration>(steady_now - when);
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(at.time_since_epoch()).count());
}

class Encoder {
 public:
  Encoder() : steady_now_(Clock::System().Now()), now_(std::chrono::system_clock::now()) {}

  void Encode(const SpanRecord& span, otlp::Span* out) const {
    out->set_trace_id(BigEndian(span.context.trace_high) + BigEndian(span.context.trace_low));
    out->set_span_id(BigEndian(span.context.span));
    out->set_trace_state(span.context.state);
    if (span.parent != 0) out->set_parent_span_id(BigEndian(span.parent));
    out->set_name(span.name);
    out->set_kind(span.kind == SpanKind::kServer   ? otlp::Span::SERVER
                  : span.kind == SpanKind::kClient ? otlp::Span::CLIENT
                                                   : otlp::Span::INTERNAL);
    out->set_start_time_unix_nano(UnixNanoseconds(span.begin, steady_now_, now_));
    out->set_end_time_unix_nano(UnixNanoseconds(std::max(span.begin, span.end), steady_now_, now_));
    for (const auto& [key, value] : span.attributes) AddAttribute(key, value, out->mutable_attributes());
    if (span.status.ok()) return;
    const auto code = absl::StatusCodeToString(span.status.code());
    if (span.status.code() == absl::StatusCode::kCancelled) {
      // Somebody wanted it so: no error.
      return AddAttribute("rpc.response.status_code", code, out->mutable_attributes());
    }
    AddAttribute("error.type", code, out->mutable_attributes());
    out->mutable_status()->set_code(otlp::Span::Status::ERROR);
    out->mutable_status()->set_message(std::string(Message(span.status)));
  }

 private:
  const TimePoint steady_now_;
  const std::chrono::system_clock::time_point now_;
};

otlp::ExportTraceServiceRequest RequestOf(const OtlpOptions& options, const std::vector<SpanRecord>& spans) {
  std::array<char, 256> host{};
  gethostname(host.data(), host.size() - 1);
  otlp::ExportTraceServiceRequest request;
  otlp::ResourceSpans* const all = request.add_resource_spans();
  auto* const resource = all->mutable_resource()->mutable_attributes();
  AddAttribute("service.name", options.service_name, resource);
  AddAttribute("service.version", options.service_version, resource);
  AddAttribute("host.name", std::string(host.data()), resource);
  AddAttribute("process.pid", int64_t{getpid()}, resource);
  otlp::ScopeSpans* const scope = all->add_scope_spans();
  scope->mutable_scope()->set_name("millrace");
  scope->mutable_scope()->set_version(options.service_version);
  const Encoder encoder;
  for (const SpanRecord& span : spans) encoder.Encode(span, scope->add_spans());
  return request;
}

// As the protocol lists them.
bool MayRetry(grpc::StatusCode code) {
  switch (code) {
    case grpc::StatusCode::CANCELLED:
    case grpc::StatusCode::DEADLINE_EXCEEDED:
    case grpc::StatusCode::ABORTED:
    case grpc::StatusCode::OUT_OF_RANGE:
    case grpc::StatusCode::UNAVAILABLE:
    case grpc::StatusCode::DATA_LOSS:
    case grpc::StatusCode::RESOURCE_EXHAUSTED:
      return true;
    default:
      return false;
  }
}

prometheus::Counter& SpanCounter(Metrics& metrics, const char* outcome) {
  return metrics.Counter("millrace_trace_spans_total",
                         "Spans that ended in traces that are recorded: sent to the collector, dropped "
                         "because too many waited, or failed after all tries to send them.",
                         {{"outcome", outcome}});
}

}  // namespace

// The other side.
class OtlpExporter::Collector {
 public:
  Collector(const std::string& address, bool tls) {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 5000);
    stub_ = otlp::TraceService::NewStub(grpc::CreateCustomChannel(
        address, tls ? grpc::SslCredentials({}) : grpc::InsecureChannelCredentials(), arguments));
  }
  // *rejected: how many of the spans it did not want.
  grpc::Status Export(grpc::ClientContext* call, const otlp::ExportTraceServiceRequest& request,
                      int64_t* rejected) {
    call->set_deadline(std::chrono::system_clock::now() + kCallTimeout);
    otlp::ExportTraceServiceResponse reply;
    const grpc::Status status = stub_->Export(call, request, &reply);
    *rejected = reply.partial_success().rejected_spans();
    return status;
  }

 private:
  std::unique_ptr<otlp::TraceService::Stub> stub_;
};

StatusOr<std::unique_ptr<OtlpExporter>> OtlpExporter::Start(const OtlpOptions& options, Metrics& metrics) {
  std::string_view rest = options.endpoint;
  const bool tls = rest.starts_with(kTlsScheme);
  if (!tls && !rest.starts_with(kScheme)) {
    return InvalidArgument(
        "'{}' is no OTLP endpoint: write http://host:4317 (gRPC), or https:// for one with TLS",
        options.endpoint);
  }
  rest.remove_prefix(std::string_view(tls ? kTlsScheme : kScheme).size());
  if (rest.ends_with('/')) rest.remove_suffix(1);
  const auto where = ParseHostPort(rest);
  if (!where.ok()) return Annotate(where.status(), "OTLP endpoint " + options.endpoint);
  LogInfo("traces go to {}", options.endpoint);
  return std::unique_ptr<OtlpExporter>(new OtlpExporter(options, where->ToString(), tls, metrics));
}

OtlpExporter::OtlpExporter(OtlpOptions options, std::string address, bool tls, Metrics& metrics)
    : options_(std::move(options)),
      sent_(SpanCounter(metrics, "sent")),
      dropped_(SpanCounter(metrics, "dropped")),
      failed_(SpanCounter(metrics, "failed")),
      thread_([this, where = std::move(address), tls] { Run(where, tls); }) {}

OtlpExporter::~OtlpExporter() {
  {
    std::unique_lock lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
    changed_.wait_for(lock, options_.last_word, [this] { return ended_; });
    abandoned_ = true;
    if (running_ != nullptr) running_->TryCancel();
  }
  thread_.join();
}

void OtlpExporter::Take(SpanRecord span) {
  std::lock_guard lock(mutex_);
  if (queue_.size() >= options_.queue_max) return dropped_.Increment();
  queue_.push_back(std::move(span));
  if (queue_.size() == kBatchMax) changed_.notify_all();
}

// Empty: this is the end.
std::vector<SpanRecord> OtlpExporter::NextBatch() {
  std::unique_lock lock(mutex_);
  do {
    changed_.wait_for(lock, options_.send_every, [this] { return stopping_ || queue_.size() >= kBatchMax; });
  } while (queue_.empty() && !stopping_);
  std::vector<SpanRecord> batch;
  while (!abandoned_ && !queue_.empty() && batch.size() < kBatchMax) {
    batch.push_back(std::move(queue_.front()));
    queue_.pop_front();
  }
  return batch;
}

// False: not worth it, or no time is left.
bool OtlpExporter::WaitToRetry(int failures) {
  if (failures >= kTriesMax) return false;
  std::unique_lock lock(mutex_);
  return !changed_.wait_for(lock, std::chrono::seconds(1 << (failures - 1)), [this] { return stopping_; });
}

void OtlpExporter::Send(Collector& collector, const std::vector<SpanRecord>& batch) {
  const otlp::ExportTraceServiceRequest request = RequestOf(options_, batch);
  for (int failures = 0;;) {
    grpc::ClientContext call;
    {
      std::lock_guard lock(mutex_);
      if (abandoned_) return;
      running_ = &call;
    }
    int64_t rejected = 0;
    const grpc::Status status = collector.Export(&call, request, &rejected);
    {
      std::lock_guard lock(mutex_);
      running_ = nullptr;
    }
    if (status.ok()) {
      const auto lost = static_cast<double>(std::clamp<int64_t>(rejected, 0, std::ssize(batch)));
      sent_.Increment(static_cast<double>(batch.size()) - lost);
      failed_.Increment(lost);
      if (std::exchange(complained_, false)) LogInfo("traces go to {} again", options_.endpoint);
      return;
    }
    if (!std::exchange(complained_, true))
      LogWarning("traces do not go to {}: {}", options_.endpoint, status.error_message());
    if (MayRetry(status.error_code()) && WaitToRetry(++failures)) continue;
    return failed_.Increment(static_cast<double>(batch.size()));
  }
}

void OtlpExporter::Run(const std::string& address, bool tls) {
  SetThreadName("traces");
  Collector collector(address, tls);
  while (true) {
    const std::vector<SpanRecord> batch = NextBatch();
    if (batch.empty()) break;
    Send(collector, batch);
  }
  std::lock_guard lock(mutex_);
  ended_ = true;
  changed_.notify_all();
}

}  // namespace millrace::server
