#include "server/worker/prefill_stream.h"

#include "proto/worker.grpc.pb.h"
#include "server/rpc/channel.h"
#include "server/rpc/stream_writer.h"

namespace millrace::server {
namespace {

// gRPC's callbacks come on its threads and only post.
class ClientStream final : public PrefillStream,
                           public grpc::ClientBidiReactor<rpc::PrefillCommand, rpc::PrefillEvent> {
 public:
  ClientStream(WorkerContext* context, const std::shared_ptr<grpc::Channel>& channel,
               std::shared_ptr<PrefillStreamObserver> observer)
      : context_(context),
        active_(context->active),
        stub_(rpc::Worker::NewStub(channel)),
        observer_(std::move(observer)),
        writer_([this](const rpc::PrefillCommand* command) { StartWrite(command); },
                [this] { RemoveHold(); }) {}

  // `self` keeps the stream alive until gRPC is through with it, whatever the attempt does meanwhile.
  void Begin(TimePoint deadline, rpc::PrefillCommand start, std::shared_ptr<ClientStream> self) {
    self_ = std::move(self);
    if (deadline != kNoDeadline) client_context_.set_deadline(GrpcDeadline(deadline));
    stub_->async()->Prefill(&client_context_, this);
    AddHold();  // writes start outside of callbacks
    writer_.Push(std::move(start));
    StartRead(&event_);
    StartCall();
  }

  void Write(rpc::PrefillCommand command) override { writer_.Push(std::move(command)); }
  void Cancel() override { client_context_.TryCancel(); }

  void OnReadDone(bool ok) override {
    if (!ok) {
      context_->control.Post([self = self_] {
        self->writer_.Discard();
        self->writer_.Finish();
      });
      return;
    }
    context_->control.Post([self = self_, event = std::move(event_)] { self->observer_->OnEvent(event); });
    event_.Clear();
    StartRead(&event_);
  }

  void OnWriteDone(bool /*ok*/) override {  // a broken stream shows at its read
    context_->control.Post([self = self_] { self->writer_.OnWritten(); });
  }

  void OnDone(const grpc::Status& status) override {
    context_->control.Post([self = std::move(self_), status = FromGrpc(status)] {
      self->observer_->OnStreamEnd(status);
      self->observer_.reset();
    });
  }

 private:
  WorkerContext* const context_;
  const ActiveGuard active_;
  const std::unique_ptr<rpc::Worker::Stub> stub_;
  std::shared_ptr<PrefillStreamObserver> observer_;  // shared: an attempt may end before its stream does
  grpc::ClientContext client_context_;
  rpc::PrefillEvent event_;  // being read
  StreamWriter<rpc::PrefillCommand> writer_;
  std::shared_ptr<ClientStream> self_;
};

class Dialer final : public PrefillDialer {
 public:
  explicit Dialer(std::shared_ptr<grpc::ChannelCredentials> credentials)
      : channels_(std::move(credentials)) {}
  std::shared_ptr<PrefillStream> Open(WorkerContext* context, const std::string& address, TimePoint deadline,
                                      rpc::PrefillCommand start,
                                      std::shared_ptr<PrefillStreamObserver> observer) override {
    auto stream = std::make_shared<ClientStream>(context, channels_.Get(address), std::move(observer));
    stream->Begin(deadline, std::move(start), stream);
    return stream;
  }

 private:
  ChannelPool channels_;
};

}  // namespace

std::unique_ptr<PrefillDialer> MakePrefillDialer(std::shared_ptr<grpc::ChannelCredentials> credentials) {
  return std::make_unique<Dialer>(std::move(credentials));
}

}  // namespace millrace::server
