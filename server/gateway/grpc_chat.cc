#include "server/gateway/grpc_chat.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <ctime>
#include <utility>

#include "base/log.h"
#include "base/random.h"
#include "proto/chat.grpc.pb.h"
#include "server/gateway/access.h"
#include "server/gateway/chat_proto.h"
#include "server/rpc/channel.h"
#include "server/rpc/stream_writer.h"

namespace millrace::server {
namespace {

namespace net = boost::asio;
using Strand = net::strand<net::io_context::executor_type>;

constexpr auto kHealthEvery = std::chrono::milliseconds(500);
constexpr auto kCutAfter = std::chrono::seconds(1);
constexpr unsigned kReloadSeconds = 1;

std::chrono::steady_clock::duration Steady(Duration duration) {
  return std::chrono::duration_cast<std::chrono::steady_clock::duration>(duration);
}

grpc::StatusCode CodeOf(const ApiError& error) {
  switch (error.http_status) {
    case 400:
      return grpc::StatusCode::INVALID_ARGUMENT;
    case 401:
      return grpc::StatusCode::UNAUTHENTICATED;
    case 404:
      return grpc::StatusCode::NOT_FOUND;
    case 429:
      return grpc::StatusCode::RESOURCE_EXHAUSTED;
    case 503:
      return grpc::StatusCode::UNAVAILABLE;
    case 504:
      return grpc::StatusCode::DEADLINE_EXCEEDED;
    default:
      return grpc::StatusCode::INTERNAL;
  }
}

// One call from its request to its status. On its strand, but for Open, OnLeft and Release, which gRPC's
// threads call.
class ChatCall : public std::enable_shared_from_this<ChatCall> {
 public:
  ChatCall(Strand strand, std::shared_ptr<GatewayContext> context, grpc::CallbackServerContext* call,
           const v1::CompleteRequest* request)
      : strand_(std::move(strand)), context_(std::move(context)), call_(call), message_(request) {}
  virtual ~ChatCall() = default;

  void Open() {
    self_ = shared_from_this();
    net::co_spawn(strand_, Run(self_), net::detached);
  }

 protected:
  virtual void Deliver(const ChoiceDelta& delta, ChatProtoFormat& format, const Usage& usage) = 0;
  virtual void End(const grpc::Status& status) = 0;  // once, last

  void OnLeft() {
    net::post(strand_, [self = shared_from_this()] {
      self->left_ = true;
      if (self->answer_ != nullptr) self->answer_->Cancel(Cancelled("the client went away"));
    });
  }
  // gRPC does not touch the call any more.
  void Release() {
    net::post(strand_, [self = std::move(self_)] {});
  }
  const Strand& strand() const { return strand_; }
  GatewayContext& context() { return *context_; }
  grpc::CallbackServerContext* call() { return call_; }

 private:
  std::string Metadata(const char* key) const {
    const auto& all = call_->client_metadata();
    const auto found = all.find(key);
    return found == all.end() ? std::string() : std::string(found->second.data(), found->second.size());
  }

  // Nothing when the request may be answered; it is then in api_.
  std::optional<ApiError> Admit() {
    const std::string given = Metadata("x-request-id");
    request_id_ = IsRequestId(given) ? given : RandomName("req-");
    call_->AddInitialMetadata("x-request-id", request_id_);
    if (auto refused = CheckKey(*context_, Metadata("authorization"), Metadata("x-api-key"), &key_))
      return refused;
    if (context_->draining) return FromStatus(Unavailable("this gateway is shutting down"));
    const auto body = ChatBodyOf(*message_);
    if (!body.ok()) return body.error();
    auto parsed = ParseApiRequest(body->endpoint, body->text, context_->model, context_->tokenizer);
    if (!parsed.ok()) return parsed.error();
    api_ = std::make_unique<const ApiRequest>(*std::move(parsed));
    return std::nullopt;
  }

  TimePoint Deadline() const {
    const TimePoint limit = context_->DeadlineOf(*api_);
    const auto wanted = call_->deadline();
    if (wanted == std::chrono::system_clock::time_point::max()) return limit;
    const auto left = std::chrono::duration_cast<Duration>(wanted - std::chrono::system_clock::now());
    return std::min(limit, Clock::System().Now() + left);
  }

  void Refuse(const ApiError& error) {
    if (error.http_status >= 500) LogWarning("{} Chat: {}", request_id_, error.message);
    if (error.code) call_->AddTrailingMetadata("error-code", *error.code);
    if (error.param) call_->AddTrailingMetadata("error-param", *error.param);
    if (error.http_status == 429 || error.http_status == 503)
      call_->AddTrailingMetadata("retry-after", std::to_string(error.retry_after_seconds));
    End(grpc::Status(CodeOf(error), error.message));
  }

  // `self`: the call lives as long as this runs.
  net::awaitable<void> Run(std::shared_ptr<ChatCall> /*self*/) {
    if (const auto refused = Admit()) {
      Refuse(*refused);
      co_return;
    }
    ++context_->requests_running;
    answer_ = Answer::Start(strand_, context_->ForAnswers(), *api_, key_, Deadline(),
                            ParseTraceContext(Metadata("traceparent"), Metadata("tracestate")));
    const uint64_t stop = context_->AddAnswerStop(strand_, answer_, api_->id);
    if (left_) answer_->Cancel(Cancelled("the client went away"));
    ChatProtoFormat format(*api_, context_->model, context_->tokenizer, std::time(nullptr));
    while (true) {
      const Answer::Event event = co_await answer_->Next(context_->options.keepalive);
      if (const auto* step = std::get_if<Answer::Step>(&event)) Deliver(step->delta, format, step->usage);
      if (const auto* failed = std::get_if<Answer::Failed>(&event)) {
        Refuse(context_->FailureOf(failed->status));
        break;
      }
      if (std::holds_alternative<Answer::Done>(event)) {
        End(grpc::Status::OK);
        break;
      }
    }
    context_->answer_stops.Remove(stop);
    --context_->requests_running;
  }

  const Strand strand_;
  const std::shared_ptr<GatewayContext> context_;  // shared with sessions and other calls
  grpc::CallbackServerContext* const call_;        // gRPC's, until OnDone
  const v1::CompleteRequest* const message_;       // likewise
  std::shared_ptr<ChatCall> self_;                 // gRPC's share
  std::string request_id_;
  std::string key_;
  std::unique_ptr<const ApiRequest> api_;
  std::shared_ptr<Answer> answer_;
  bool left_ = false;
};

class WholeCall final : public grpc::ServerUnaryReactor, public ChatCall {
 public:
  WholeCall(Strand strand, std::shared_ptr<GatewayContext> context, grpc::CallbackServerContext* call,
            const v1::CompleteRequest* request, v1::CompleteResponse* response)
      : ChatCall(std::move(strand), std::move(context), call, request), response_(response) {}

  void OnCancel() override { OnLeft(); }
  void OnDone() override { Release(); }

 private:
  void Deliver(const ChoiceDelta& delta, ChatProtoFormat& format, const Usage& usage) override {
    // Choices come mixed; each keeps its place.
    v1::CompleteResponse envelope = format.Envelope(usage);
    envelope.mutable_choices()->Swap(response_->mutable_choices());
    response_->Swap(&envelope);
    while (response_->choices_size() <= delta.choice) response_->add_choices();
    format.Append(delta, response_->mutable_choices(delta.choice));
  }
  void End(const grpc::Status& status) override { Finish(status); }

  v1::CompleteResponse* const response_;  // gRPC's, until Finish
};

class StreamCall final : public grpc::ServerWriteReactor<v1::CompleteResponse>, public ChatCall {
 public:
  StreamCall(Strand strand, std::shared_ptr<GatewayContext> context, grpc::CallbackServerContext* call,
             const v1::CompleteRequest* request)
      : ChatCall(std::move(strand), std::move(context), call, request),
        // At most max_tokens of every choice wait here.
        writer_([this](const v1::CompleteResponse* piece) { Write(piece); }, [this] { Finish(outcome_); }),
        write_limit_(this->strand()) {}

  void OnWriteDone(bool ok) override {
    auto self = std::static_pointer_cast<StreamCall>(shared_from_this());
    net::post(strand(), [self = std::move(self), ok] {
      self->write_limit_.cancel();
      if (!ok) self->writer_.Discard();
      self->writer_.OnWritten();
    });
  }
  void OnCancel() override { OnLeft(); }
  void OnDone() override { Release(); }

 private:
  void Deliver(const ChoiceDelta& delta, ChatProtoFormat& format, const Usage& usage) override {
    v1::CompleteResponse piece = format.Envelope(usage);
    format.Append(delta, piece.add_choices());
    writer_.Push(std::move(piece));
  }
  void End(const grpc::Status& status) override {
    outcome_ = status;
    writer_.Finish();
  }
  // A client that does not read holds its answer's memory for so long and no longer.
  void Write(const v1::CompleteResponse* piece) {
    write_limit_.expires_after(Steady(context().options.write_timeout));
    write_limit_.async_wait([weak = weak_from_this(), this](boost::system::error_code error) {
      const auto alive = weak.lock();
      if (!error && alive != nullptr) call()->TryCancel();
    });
    StartWrite(piece);
  }

  StreamWriter<v1::CompleteResponse> writer_;
  net::steady_timer write_limit_;
  grpc::Status outcome_;
};

class Service final : public v1::Chat::CallbackService {
 public:
  Service(std::shared_ptr<GatewayContext> context, net::io_context& io)
      : context_(std::move(context)), io_(io) {}

  grpc::ServerUnaryReactor* Complete(grpc::CallbackServerContext* call, const v1::CompleteRequest* request,
                                     v1::CompleteResponse* response) override {
    // Shared by gRPC (until OnDone), the coroutine and what is posted.
    const auto made = std::make_shared<WholeCall>(net::make_strand(io_), context_, call, request, response);
    made->Open();
    return made.get();
  }
  grpc::ServerWriteReactor<v1::CompleteResponse>* StreamComplete(
      grpc::CallbackServerContext* call, const v1::CompleteRequest* request) override {
    const auto made = std::make_shared<StreamCall>(net::make_strand(io_), context_, call, request);
    made->Open();
    return made.get();
  }

 private:
  const std::shared_ptr<GatewayContext> context_;  // shared with the calls
  net::io_context& io_;
};

std::shared_ptr<grpc::ServerCredentials> Credentials(const TlsOptions& tls) {
  if (tls.certificate.empty()) return grpc::InsecureServerCredentials();
  namespace exp = grpc::experimental;
  exp::TlsServerCredentialsOptions options(std::make_shared<exp::FileWatcherCertificateProvider>(
      tls.key, tls.certificate, tls.client_ca, kReloadSeconds));
  options.watch_identity_key_cert_pairs();
  if (!tls.client_ca.empty()) {
    options.watch_root_certs();
    options.set_cert_request_type(GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  }
  return exp::TlsServerCredentials(options);
}

class RunningGrpcChat final : public GrpcChat {
 public:
  RunningGrpcChat(std::shared_ptr<GatewayContext> context, net::io_context& io)
      : context_(context), service_(std::move(context), io), health_timer_(io) {}
  ~RunningGrpcChat() override { Shutdown(); }

  Status Listen() {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    grpc::ServerBuilder builder;
    ConfigureServer(&builder);
    // A request is no larger than over HTTP.
    builder.SetMaxReceiveMessageSize(static_cast<int>(context_->options.body_bytes_max));
    builder.RegisterService(&service_);
    MR_ASSIGN_OR_RETURN(server_, StartServer(&builder, context_->options.grpc_listen,
                                             Credentials(context_->options.tls), &address_));
    ShowHealth();
    return OkStatus();
  }

  std::string address() const override { return address_; }

  void Shutdown() override {
    std::unique_ptr<grpc::Server> server;
    {
      std::lock_guard lock(mutex_);
      health_timer_.cancel();
      server = std::move(server_);
    }
    if (server == nullptr) return;
    server->Shutdown(std::chrono::system_clock::now() + kCutAfter);
    server->Wait();
  }

 private:
  void ShowHealth() {
    grpc::HealthCheckServiceInterface* const health = server_->GetHealthCheckService();
    const bool ready = !context_->draining && context_->membership.CanServe();
    health->SetServingStatus("", ready);
    health->SetServingStatus(v1::Chat::service_full_name(), ready);
    health_timer_.expires_after(kHealthEvery);
    health_timer_.async_wait([this](boost::system::error_code error) {
      std::lock_guard lock(mutex_);
      if (!error && server_ != nullptr) ShowHealth();
    });
  }

  const std::shared_ptr<GatewayContext> context_;  // shared with the calls
  Service service_;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
  std::mutex
      mutex_;  // of server_ and health_timer_; not held while calls end, which takes the threads of `io`
  net::steady_timer health_timer_;
};

}  // namespace

StatusOr<std::unique_ptr<GrpcChat>> GrpcChat::Start(std::shared_ptr<GatewayContext> context,
                                                    net::io_context& io) {
  auto chat = std::make_unique<RunningGrpcChat>(std::move(context), io);
  MR_RETURN_IF_ERROR(chat->Listen());
  return StatusOr<std::unique_ptr<GrpcChat>>(std::move(chat));
}

}  // namespace millrace::server
