#include "server/worker/reactors.h"

#include <memory>
#include <utility>

#include "server/rpc/channel.h"
#include "server/rpc/convert.h"
#include "server/rpc/stream_writer.h"
#include "server/worker/generate_call.h"
#include "server/worker/prefill_call.h"

namespace millrace::server {
namespace {

// The sending half of a call's stream. Control thread, but for what says gRPC. Shared by gRPC (until OnDone),
// the call and the tasks on their way; the call lets go of it at its end, it of the call when gRPC is
// through.
template <typename Reactor, typename Message, typename Call>
class CallReactor : public Reactor,
                    public CallStream<Message>,
                    public std::enable_shared_from_this<CallReactor<Reactor, Message, Call>> {
 public:
  explicit CallReactor(WorkerContext* context)
      : context_(context),
        active_(context->active),
        writer_([this](const Message* message) { this->StartWrite(message); },
                [this] { Reactor::Finish(ToGrpc(outcome_)); }) {}

  void Write(Message message) override { writer_.Push(std::move(message)); }
  void Finish(const Status& status) override {
    outcome_ = status;
    writer_.Finish();
  }

  // gRPC threads.
  void OnWriteDone(bool ok) override {
    context_->control.Post([self = this->shared_from_this(), ok] {
      if (!ok) self->Lost("the caller is gone");
      self->writer_.OnWritten();
    });
  }
  void OnCancel() override {
    context_->control.Post([self = this->shared_from_this()] { self->Lost("the caller cancelled"); });
  }
  void OnDone() override {
    context_->control.Post([self = std::move(self_)] { self->call_.reset(); });
  }

 protected:
  // gRPC's thread that brings the call, once. `begin` runs on the control thread.
  template <typename Begin>
  void Open(Begin begin) {
    self_ = this->shared_from_this();
    context_->control.Post([self = self_, begin = std::move(begin)] { self->call_ = begin(self); });
  }

  WorkerContext* const context_;
  std::shared_ptr<Call> call_;

 private:
  // Nobody reads what is queued.
  void Lost(const char* why) {
    writer_.Discard();
    call_->Abort(Cancelled("{}", why));
  }

  const ActiveGuard active_;
  std::shared_ptr<CallReactor> self_;  // gRPC's share
  StreamWriter<Message> writer_;
  Status outcome_;
};

class GenerateReactor final
    : public CallReactor<grpc::ServerWriteReactor<rpc::GenerateEvent>, rpc::GenerateEvent, WorkerCall> {
 public:
  using CallReactor::CallReactor;
  void Begin(const rpc::GenerateRequest& request) {
    Open([context = context_, request](auto stream) { return BeginGenerate(context, request, stream); });
  }
};

class PrefillReactor final
    : public CallReactor<grpc::ServerBidiReactor<rpc::PrefillCommand, rpc::PrefillEvent>, rpc::PrefillEvent,
                         PrefillCall> {
 public:
  using CallReactor::CallReactor;
  void Begin() {
    Open([context = context_](auto stream) { return PrefillCall::Begin(context, stream); });
    StartRead(&command_);
  }
  void OnReadDone(bool ok) override {
    if (!ok) return;  // D sends no more; a break shows as OnCancel
    context_->control.Post([self = std::static_pointer_cast<PrefillReactor>(shared_from_this()),
                            command = std::move(command_)] { self->call_->OnCommand(command); });
    command_.Clear();
    StartRead(&command_);
  }

 private:
  rpc::PrefillCommand command_;  // being read
};

}  // namespace

grpc::ServerWriteReactor<rpc::GenerateEvent>* OpenGenerate(WorkerContext* context,
                                                           const rpc::GenerateRequest& request) {
  const auto reactor = std::make_shared<GenerateReactor>(context);
  reactor->Begin(request);
  return reactor.get();
}

grpc::ServerBidiReactor<rpc::PrefillCommand, rpc::PrefillEvent>* OpenPrefill(WorkerContext* context) {
  const auto reactor = std::make_shared<PrefillReactor>(context);
  reactor->Begin();
  return reactor.get();
}

}  // namespace millrace::server
