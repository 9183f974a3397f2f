#include "server/bench/grpc_asker.h"

#include <google/protobuf/util/json_util.h>
#include <grpcpp/grpcpp.h>

#include <boost/asio/post.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>

#include "base/file.h"
#include "proto/chat.grpc.pb.h"
#include "server/bench/load.h"
#include "server/rpc/channel.h"

namespace millrace::server {

namespace net = boost::asio;

namespace {

TimePoint Now() { return std::chrono::steady_clock::now(); }

// The body of an HTTP request as a message of the same meaning. A field that has no counterpart is an error.
StatusOr<v1::CompleteRequest> RequestOf(const std::string& text) {
  MR_ASSIGN_OR_RETURN(Json body, ParseJson(text));
  if (body.contains("model") && body["model"] == "") body.erase("model");
  body.erase("stream");
  body.erase("stream_options");
  if (body.contains("messages")) body["messages"] = {{"messages", std::move(body["messages"])}};
  if (body.contains("prompt")) {
    if (body["prompt"].is_array()) {
      body["token_ids"] = {{"ids", std::move(body["prompt"])}};
    } else {
      body["text"] = std::move(body["prompt"]);
    }
    body.erase("prompt");
  }
  v1::CompleteRequest request;
  const auto parsed = google::protobuf::util::JsonStringToMessage(DumpJson(body), &request);
  if (!parsed.ok()) return InvalidArgument("not a request of millrace.v1.Chat: {}", parsed.ToString());
  return request;
}

RequestError ErrorOf(grpc::StatusCode code) {
  switch (code) {
    case grpc::StatusCode::DEADLINE_EXCEEDED:
      return RequestError::kTimeout;
    case grpc::StatusCode::INTERNAL:
      return RequestError::kServer;
    default:
      return RequestError::kHttp;  // refused
  }
}

// One call. gRPC's threads until `over` runs, once, as the last thing.
class Call : public grpc::ClientReadReactor<v1::CompleteResponse> {
 public:
  Call(bool is_stream, RequestResult* result, std::function<void()> over)
      : is_stream_(is_stream), meter_(is_stream, result), result_(result), over_(std::move(over)) {}

  void Begin(v1::Chat::Stub* stub, grpc::ClientContext* context, const v1::CompleteRequest& request) {
    if (!is_stream_) {
      stub->async()->Complete(context, &request, &response_, [this](const grpc::Status& status) {
        if (status.ok()) Read(Now());
        OnDone(status);
      });
      return;
    }
    stub->async()->StreamComplete(context, &request, this);
    StartRead(&response_);
    StartCall();
  }

  void OnReadDone(bool ok) override {
    if (!ok) return;
    Read(Now());
    response_.Clear();
    StartRead(&response_);
  }

  void OnDone(const grpc::Status& status) override {
    status_ = status;
    result_->end = Now();
    over_();
  }

  const grpc::Status& status() const { return status_; }
  const std::string& text() const { return text_; }
  const std::string& model() const { return model_; }

 private:
  void Read(TimePoint now) {
    model_ = response_.model();
    for (const v1::Choice& choice : response_.choices()) {
      text_ += choice.message().content();
      if (!choice.finish_reason().empty()) result_->finish_reason = choice.finish_reason();
    }
    if (!response_.has_usage()) return;
    const v1::Usage& usage = response_.usage();
    result_->prompt_tokens = usage.prompt_tokens();
    result_->cached_tokens = usage.cached_tokens();
    meter_.TokensSoFar(usage.completion_tokens(), now);
  }

  const bool is_stream_;
  AnswerMeter meter_;
  RequestResult* const result_;
  const std::function<void()> over_;
  v1::CompleteResponse response_;
  grpc::Status status_;
  std::string text_;
  std::string model_;
};

}  // namespace

struct GrpcAsker::Stub {
  std::unique_ptr<v1::Chat::Stub> chat;
};

StatusOr<std::unique_ptr<Asker>> GrpcAsker::Create(net::io_context& io, const LoadTarget& target) {
  std::shared_ptr<grpc::ChannelCredentials> credentials = grpc::InsecureChannelCredentials();
  if (target.insecure) return InvalidArgument("--insecure: gRPC always checks the server's certificate");
  if (target.tls) {
    grpc::SslCredentialsOptions options;
    if (!target.ca_file.empty()) {
      auto pem = ReadFile(target.ca_file);
      if (!pem.ok()) return Annotate(pem.status(), "--cacert");
      options.pem_root_certs = *std::move(pem);
    }
    credentials = grpc::SslCredentials(options);
  }
  auto stub = std::make_unique<Stub>();
  stub->chat = v1::Chat::NewStub(
      grpc::CreateCustomChannel(target.address.ToString(), credentials, ChannelArguments()));
  return std::unique_ptr<Asker>(new GrpcAsker(io, target, std::move(stub)));
}

GrpcAsker::GrpcAsker(net::io_context& io, const LoadTarget& target, std::unique_ptr<Stub> stub)
    : io_(io), target_(target), stub_(std::move(stub)) {}

GrpcAsker::~GrpcAsker() = default;

net::awaitable<Asker::Answer> GrpcAsker::Ask(std::string, std::string body, Duration timeout,
                                             RequestResult* result) {
  Answer answer;
  result->sent = result->end = Now();
  const auto request = RequestOf(body);
  if (!request.ok()) {
    result->error = RequestError::kMalformed;
    result->message = std::string(Message(request.status()));
    co_return answer;
  }
  grpc::ClientContext context;
  context.set_deadline(GrpcDeadline(result->sent + timeout));
  if (!target_.api_key.empty()) context.AddMetadata("authorization", "Bearer " + target_.api_key);
  net::steady_timer over(io_, net::steady_timer::time_point::max());
  Call call(target_.stream, result, [&] { net::post(io_, [&over] { over.cancel(); }); });
  running_.insert(&context);
  const auto work = net::make_work_guard(io_);
  call.Begin(stub_->chat.get(), &context, *request);
  boost::system::error_code cancelled;
  co_await over.async_wait(net::redirect_error(net::use_awaitable, cancelled));
  running_.erase(&context);
  answer.text = call.text();
  answer.model = call.model();
  const grpc::Status& status = call.status();
  if (status.ok()) {
    answer.status = 200;
    if (result->output_tokens == 0) result->first = result->end;
  } else if (stopped_ && status.error_code() == grpc::StatusCode::CANCELLED) {
    result->error = RequestError::kUnfinished;
    result->message = "still running at the end";
  } else {
    const bool began = result->output_tokens > 0;
    const bool lost = status.error_code() == grpc::StatusCode::UNAVAILABLE;
    result->error =
        lost ? (began ? RequestError::kBroken : RequestError::kConnect) : ErrorOf(status.error_code());
    result->message = fmt::format("{}: {}", target_.address.ToString(), status.error_message());
  }
  co_return answer;
}

void GrpcAsker::Stop() {
  stopped_ = true;
  for (grpc::ClientContext* context : running_) context->TryCancel();
}

}  // namespace millrace::server
