#include "server/gateway/gateway.h"

#include <netinet/tcp.h>
#include <sys/socket.h>

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <thread>
#include <vector>

#include "base/log.h"
#include "base/net.h"
#include "base/thread.h"
#include "server/gateway/grpc_chat.h"
#include "server/gateway/http_session.h"

namespace millrace::server {
namespace {

namespace net = boost::asio;
using net::ip::tcp;

constexpr Duration kCutTime = std::chrono::seconds(5);
constexpr auto kReloadEvery = std::chrono::seconds(1);
constexpr int32_t kAdminConnections = 16;
constexpr int kProbeAfterSeconds = 15;
constexpr int kProbeEverySeconds = 5;

class GatewayServer : public Gateway {
 public:
  GatewayServer(const GatewayOptions& options, const ModelInfo& model, const engine::Tokenizer& tokenizer,
                Membership& membership, Metrics& metrics)
      : options_(options),
        model_(model),
        context_(new GatewayContext{options_, model_, tokenizer, membership, metrics,
                                    Admission(options_.admission)}),
        work_(net::make_work_guard(io_)),
        acceptor_(io_),
        admin_acceptor_(io_),
        reload_timer_(io_) {}

  ~GatewayServer() override {
    Shutdown(Duration::zero());
    work_.reset();
    io_.stop();
    threads_.clear();
  }

  Status Prepare() {
    if (!options_.api_keys.empty()) {
      MR_ASSIGN_OR_RETURN(context_->keys, ApiKeys::Load(options_.api_keys));
      LogInfo("{} API keys from {}", context_->keys->size(), options_.api_keys);
    }
    if (!options_.tls.certificate.empty()) {
      MR_ASSIGN_OR_RETURN(context_->tls, TlsContext::Load(options_.tls));
    } else if (!options_.tls.key.empty() || !options_.tls.client_ca.empty()) {
      return InvalidArgument("TLS needs a certificate");
    }
    MR_RETURN_IF_ERROR(Listen(options_.listen, &acceptor_, &address_));
    if (!options_.admin_listen.empty())
      MR_RETURN_IF_ERROR(Listen(options_.admin_listen, &admin_acceptor_, &admin_address_));
    if (!options_.grpc_listen.empty()) {
      MR_ASSIGN_OR_RETURN(grpc_, GrpcChat::Start(context_, io_));
    }
    return OkStatus();
  }

  void Run() {
    net::co_spawn(io_, Accept(acceptor_, Listener::kPublic), net::detached);
    if (admin_acceptor_.is_open())
      net::co_spawn(io_, Accept(admin_acceptor_, Listener::kAdmin), net::detached);
    ReloadLater();
    for (int i = 0; i < options_.threads; ++i) {
      threads_.emplace_back([this, i] {
        SetThreadName(fmt::format("http-{}", i));
        io_.run();
      });
    }
  }

  std::string address() const override { return address_; }
  std::string admin_address() const override { return admin_address_; }
  std::string grpc_address() const override { return grpc_ == nullptr ? "" : grpc_->address(); }

  void Shutdown(Duration grace) override {
    context_->draining = true;
    net::post(io_, [this] {
      boost::system::error_code ignored;
      acceptor_.close(ignored);
      admin_acceptor_.close(ignored);
      reload_timer_.cancel();
    });
    const TimePoint until = Clock::System().Now() + grace;
    WaitUntil(until, [this] { return context_->requests_running == 0; });
    context_->answer_stops.StopAll();
    context_->connections_stops.StopAll();
    if (grpc_ != nullptr) grpc_->Shutdown();
    // gRPC ends a cancelled call at once. Its callbacks post to this gateway's threads, so they must have
    // come.
    WaitUntil(Clock::System().Now() + kCutTime,
              [this] { return context_->connections == 0 && context_->in_flight.generations() == 0; });
  }

 private:
  template <typename Condition>
  static void WaitUntil(TimePoint until, const Condition& condition) {
    while (!condition() && Clock::System().Now() < until)
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }

  static Status Listen(const std::string& listen, tcp::acceptor* acceptor, std::string* bound) {
    MR_ASSIGN_OR_RETURN(const HostPort wanted, ParseHostPort(listen));
    MR_ASSIGN_OR_RETURN(const std::vector<HostPort> addresses, Resolve(wanted));
    boost::system::error_code error;
    const tcp::endpoint endpoint(net::ip::make_address(addresses.front().host, error), wanted.port);
    if (!error) acceptor->open(endpoint.protocol(), error);
    if (!error) acceptor->set_option(net::socket_base::reuse_address(true), error);
    if (!error) acceptor->bind(endpoint, error);
    if (!error) acceptor->listen(1024, error);
    if (error) return Unavailable("cannot listen on {}: {}", listen, error.message());
    *bound = HostPort{addresses.front().host, acceptor->local_endpoint().port()}.ToString();
    return OkStatus();
  }

  // Keys and certificates are looked at again every second; what cannot be used is said and changes nothing.
  void ReloadLater() {
    if (context_->keys == nullptr && context_->tls == nullptr) return;
    reload_timer_.expires_after(kReloadEvery);
    reload_timer_.async_wait([this](boost::system::error_code error) {
      if (error) return;
      if (context_->keys != nullptr) Say(context_->keys->ReloadIfChanged());
      if (context_->tls != nullptr) Say(context_->tls->ReloadIfChanged());
      ReloadLater();
    });
  }

  static void Say(const Status& status) {
    if (!status.ok()) LogError("the old keys and certificates stay: {}", Message(status));
  }

  // A client that is gone without a word (its host or its network died) breaks the connection, whatever is
  // being waited for.
  void NoticeSilence(int fd) const {
    const int limit_ms = static_cast<int>(
        std::chrono::duration_cast<std::chrono::milliseconds>(options_.write_timeout).count());
    const int on = 1;
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &kProbeAfterSeconds, sizeof kProbeAfterSeconds);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &kProbeEverySeconds, sizeof kProbeEverySeconds);
    // Both for probes and for data that is not acknowledged.
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &limit_ms, sizeof limit_ms);
  }

  net::awaitable<void> Accept(tcp::acceptor& acceptor, Listener listener) {
    while (true) {
      auto [error, socket] =
          co_await acceptor.async_accept(net::make_strand(io_), net::as_tuple(net::use_awaitable));
      if (!acceptor.is_open()) co_return;
      if (error) {
        // Out of descriptors, most likely: give running connections time to end.
        net::steady_timer pause(io_, std::chrono::milliseconds(50));
        co_await pause.async_wait(net::as_tuple(net::use_awaitable));
        continue;
      }
      // The operator gets in when clients have used up the connections.
      const int32_t reserve = listener == Listener::kAdmin ? kAdminConnections : 0;
      if (context_->connections >= options_.connections_max + reserve) continue;  // the socket closes here
      ++context_->connections;
      boost::system::error_code ignored;
      socket.set_option(tcp::no_delay(true), ignored);
      NoticeSilence(socket.native_handle());
      auto executor = socket.get_executor();
      net::co_spawn(executor,
                    ServeConnection(boost::beast::tcp_stream(std::move(socket)), listener, context_),
                    net::detached);
    }
  }

  const GatewayOptions options_;
  const ModelInfo model_;
  const std::shared_ptr<GatewayContext> context_;  // shared with the sessions
  net::io_context io_;
  net::executor_work_guard<net::io_context::executor_type> work_;
  tcp::acceptor acceptor_;
  tcp::acceptor admin_acceptor_;  // closed when there is none
  net::steady_timer reload_timer_;
  std::string address_;
  std::string admin_address_;
  std::unique_ptr<GrpcChat> grpc_;  // null when it is not served
  std::vector<std::jthread> threads_;
};

}  // namespace

StatusOr<std::unique_ptr<Gateway>> Gateway::Start(const GatewayOptions& options, const ModelInfo& model,
                                                  const engine::Tokenizer& tokenizer, Membership& membership,
                                                  Metrics& metrics) {
  auto server = std::make_unique<GatewayServer>(options, model, tokenizer, membership, metrics);
  MR_RETURN_IF_ERROR(server->Prepare());
  server->Run();
  LogInfo("gateway listens on {}://{}", options.tls.certificate.empty() ? "http" : "https",
          server->address());
  if (!server->grpc_address().empty()) LogInfo("gRPC on {}", server->grpc_address());
  if (!server->admin_address().empty()) LogInfo("metrics and control on http://{}", server->admin_address());
  if (options.api_keys.empty() && !server->address().starts_with("127.") &&
      !server->address().starts_with("[::1]"))
    LogWarning("everybody who reaches {} may use this server: --api-keys asks for keys", server->address());
  return StatusOr<std::unique_ptr<Gateway>>(std::move(server));
}

}  // namespace millrace::server
