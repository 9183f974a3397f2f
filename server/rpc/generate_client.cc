#include "server/rpc/generate_client.h"

namespace millrace::server {
namespace {

class GenerateClient final : public GenerateCall, public grpc::ClientReadReactor<rpc::GenerateEvent> {
 public:
  GenerateClient(std::shared_ptr<grpc::Channel> channel, const rpc::GenerateRequest& request,
                 std::shared_ptr<GenerateObserver> observer)
      : stub_(rpc::Worker::NewStub(channel)), request_(request), observer_(std::move(observer)) {}

  // `self` keeps this alive until OnDone: gRPC calls back into it until then, whatever the holder of the
  // handle does.
  void Start(std::chrono::system_clock::time_point deadline, std::shared_ptr<GenerateClient> self) {
    self_ = std::move(self);
    if (deadline != std::chrono::system_clock::time_point::max()) context_.set_deadline(deadline);
    stub_->async()->Generate(&context_, &request_, this);
    StartRead(&event_);
    StartCall();
  }

  void Cancel() override { context_.TryCancel(); }

  void OnReadDone(bool ok) override {
    if (!ok) return;  // OnDone follows
    observer_->OnEvent(event_);
    StartRead(&event_);
  }

  void OnDone(const grpc::Status& status) override {
    const std::shared_ptr<GenerateClient> self = std::move(self_);
    observer_->OnDone(status);
    observer_.reset();
  }

 private:
  const std::unique_ptr<rpc::Worker::Stub> stub_;
  const rpc::GenerateRequest request_;
  std::shared_ptr<GenerateObserver> observer_;
  grpc::ClientContext context_;
  rpc::GenerateEvent event_;
  std::shared_ptr<GenerateClient> self_;
};

}  // namespace

std::shared_ptr<GenerateCall> StartGenerate(std::shared_ptr<grpc::Channel> channel,
                                            const rpc::GenerateRequest& request,
                                            std::chrono::system_clock::time_point deadline,
                                            std::shared_ptr<GenerateObserver> observer) {
  auto client = std::make_shared<GenerateClient>(std::move(channel), request, std::move(observer));
  client->Start(deadline, client);
  return client;
}

}  // namespace millrace::server
