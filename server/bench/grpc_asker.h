#pragma once
// millrace.v1.Chat over gRPC: one channel, a call for each request. Answers are timed on gRPC's threads,
// where they arrive.

#include <boost/asio/io_context.hpp>
#include <memory>
#include <set>
#include <string>

#include "server/bench/asker.h"

namespace grpc {
class ClientContext;
}

namespace millrace::server {

class GrpcAsker : public Asker {
 public:
  static StatusOr<std::unique_ptr<Asker>> Create(boost::asio::io_context& io, const LoadTarget& target);
  ~GrpcAsker() override;
  // The path says nothing here: messages, text and token ids are told apart by the body, which is that of the
  // HTTP API.
  boost::asio::awaitable<Answer> Ask(std::string path, std::string body, Duration timeout,
                                     RequestResult* result) override;
  void Stop() override;
  int64_t connections() const override { return 1; }

 private:
  struct Stub;
  GrpcAsker(boost::asio::io_context& io, const LoadTarget& target, std::unique_ptr<Stub> stub);

  boost::asio::io_context& io_;
  const LoadTarget& target_;
  const std::unique_ptr<Stub> stub_;
  std::set<grpc::ClientContext*> running_;
  bool stopped_ = false;
};

}  // namespace millrace::server
