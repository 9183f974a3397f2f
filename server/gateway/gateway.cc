#include "server/gateway/gateway.h"

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
#include "server/gateway/http_session.h"

namespace millrace::server {
namespace {

namespace net = boost::asio;
using net::ip::tcp;

constexpr Duration kCutTime = std::chrono::seconds(5);

class GatewayServer : public Gateway {
 public:
  GatewayServer(const GatewayOptions& options, const ModelInfo& model, const engine::Tokenizer& tokenizer,
                Membership& membership, Metrics& metrics)
      : options_(options),
        model_(model),
        context_(new GatewayContext{options_, model_, tokenizer, membership, metrics}),
        work_(net::make_work_guard(io_)),
        acceptor_(io_) {}

  ~GatewayServer() override {
    Shutdown(Duration::zero());
    work_.reset();
    io_.stop();
    threads_.clear();
  }

  Status Listen() {
    MR_ASSIGN_OR_RETURN(const HostPort wanted, ParseHostPort(options_.listen));
    MR_ASSIGN_OR_RETURN(const std::vector<HostPort> addresses, Resolve(wanted));
    boost::system::error_code error;
    const tcp::endpoint endpoint(net::ip::make_address(addresses.front().host, error), wanted.port);
    if (!error) acceptor_.open(endpoint.protocol(), error);
    if (!error) acceptor_.set_option(net::socket_base::reuse_address(true), error);
    if (!error) acceptor_.bind(endpoint, error);
    if (!error) acceptor_.listen(1024, error);
    if (error) return Unavailable("cannot listen on {}: {}", options_.listen, error.message());
    address_ = HostPort{addresses.front().host, acceptor_.local_endpoint().port()}.ToString();
    return OkStatus();
  }

  void Run() {
    net::co_spawn(io_, Accept(), net::detached);
    for (int i = 0; i < options_.threads; ++i) {
      threads_.emplace_back([this, i] {
        SetThreadName(fmt::format("http-{}", i));
        io_.run();
      });
    }
  }

  std::string address() const override { return address_; }

  void Shutdown(Duration grace) override {
    context_->draining = true;
    net::post(io_, [this] {
      boost::system::error_code ignored;
      acceptor_.close(ignored);
    });
    const TimePoint until = Clock::System().Now() + grace;
    WaitUntil(until, [this] { return context_->requests_running == 0; });
    context_->stops.StopAll();
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

  net::awaitable<void> Accept() {
    while (true) {
      auto [error, socket] =
          co_await acceptor_.async_accept(net::make_strand(io_), net::as_tuple(net::use_awaitable));
      if (!acceptor_.is_open()) co_return;
      if (error) {
        // Out of descriptors, most likely: give running connections time to end.
        net::steady_timer pause(io_, std::chrono::milliseconds(50));
        co_await pause.async_wait(net::as_tuple(net::use_awaitable));
        continue;
      }
      if (context_->connections >= options_.connections_max) continue;  // the socket closes here
      ++context_->connections;
      boost::system::error_code ignored;
      socket.set_option(tcp::no_delay(true), ignored);
      auto executor = socket.get_executor();
      net::co_spawn(executor, ServeConnection(boost::beast::tcp_stream(std::move(socket)), context_),
                    net::detached);
    }
  }

  const GatewayOptions options_;
  const ModelInfo model_;
  const std::shared_ptr<GatewayContext> context_;  // shared with the sessions
  net::io_context io_;
  net::executor_work_guard<net::io_context::executor_type> work_;
  tcp::acceptor acceptor_;
  std::string address_;
  std::vector<std::jthread> threads_;
};

}  // namespace

StatusOr<std::unique_ptr<Gateway>> Gateway::Start(const GatewayOptions& options, const ModelInfo& model,
                                                  const engine::Tokenizer& tokenizer, Membership& membership,
                                                  Metrics& metrics) {
  auto server = std::make_unique<GatewayServer>(options, model, tokenizer, membership, metrics);
  MR_RETURN_IF_ERROR(server->Listen());
  server->Run();
  LogInfo("gateway listens on http://{}", server->address());
  return StatusOr<std::unique_ptr<Gateway>>(std::move(server));
}

}  // namespace millrace::server
