#include "server/worker/watch_call.h"

#include <map>

#include "server/rpc/channel.h"
#include "server/rpc/convert.h"
#include "server/rpc/stream_writer.h"

namespace millrace::server {
namespace {

constexpr Duration kLookEvery = std::chrono::milliseconds(100);
constexpr Duration kSayEvery = std::chrono::milliseconds(500);

TimePoint Now() { return std::chrono::steady_clock::now(); }

rpc::Role RoleToProto(WorkerRole role) {
  switch (role) {
    case WorkerRole::kPrefill:
      return rpc::PREFILL;
    case WorkerRole::kDecode:
      return rpc::DECODE;
    case WorkerRole::kBoth:
      return rpc::BOTH;
  }
  return rpc::ROLE_UNSPECIFIED;
}

// Paths to the decode workers that this one has written to. One that has never been up may be none that can
// be.
void AddLinks(const std::map<transfer::PeerId, uint64_t>& epochs, const transfer::Snapshot& snapshot,
              rpc::WorkerState* state) {
  std::map<uint64_t, rpc::WorkerLink> links;
  for (const transfer::PathSnapshot& path : snapshot.paths) {
    const auto epoch = epochs.find(path.peer);
    const bool up = path.state == "up" || path.state == "suspect" || path.state == "probation";
    if (epoch == epochs.end() || path.kind == "control" || (!up && path.trips == 0)) continue;
    rpc::WorkerLink& link = links[epoch->second];
    link.set_epoch(epoch->second);
    link.set_paths(link.paths() + 1);
    link.set_paths_up(link.paths_up() + (up ? 1 : 0));
  }
  for (auto& [epoch, link] : links) *state->add_links() = std::move(link);
}

rpc::WorkerState StateOf(WorkerContext& context) {
  const engine::EngineStats stats = context.engine->Stats();
  rpc::WorkerState state;
  state.set_role(RoleToProto(context.role));
  state.set_epoch(context.transfer->epoch());
  state.set_model_name(context.options.model_name);
  state.set_model_digest(context.options.model_digest);
  state.set_layout_hash(context.layout_hash);
  state.set_protocol_version(kProtocolVersion);
  state.set_transfer_descriptor(context.descriptor);
  state.set_pages_total(stats.pages_total);
  state.set_pages_free(stats.pages_free);
  state.set_waiting(stats.waiting);
  state.set_running(stats.running);
  state.set_context_max(context.engine->config().max_position);
  state.set_ready(context.ready());
  state.set_stalled(context.stalled);
  const WorkerSpeed::Report speed = context.speed.report();
  state.set_prefill_tokens_per_second(speed.prefill_tokens_per_second);
  state.set_prefill_samples(speed.prefill_samples);
  state.set_token_gap_seconds(speed.token_gap_seconds);
  state.set_token_gap_samples(speed.token_gap_samples);
  if (context.group != nullptr) *state.mutable_group() = context.group->Look(Now());
  for (std::string& address : context.prefill_health.Avoided()) state.add_avoids(std::move(address));
  return state;
}

// Which paths there are and how they are, without what grows all the time.
void AddPaths(const transfer::Snapshot& snapshot, rpc::WorkerState* state) {
  state->set_open_tickets(snapshot.open_tickets);
  state->set_draining_tickets(snapshot.draining_tickets);
  state->set_transfers(snapshot.pending_requests);
  for (const transfer::PathSnapshot& path : snapshot.paths) {
    rpc::PathState* const out = state->add_paths();
    out->set_kind(path.kind);
    out->set_local_rail(path.local_rail);
    out->set_remote_rail(path.remote_rail);
    out->set_state(path.state);
    out->set_reason(path.reason);
    out->set_trips(path.trips);
  }
}

void AddPathFigures(const transfer::Snapshot& snapshot, rpc::WorkerState* state) {
  for (int i = 0; i < state->paths_size(); ++i) {
    const transfer::PathSnapshot& path = snapshot.paths[static_cast<size_t>(i)];
    rpc::PathState* const out = state->mutable_paths(i);
    out->set_bytes_done(path.bytes_done);
    out->set_bytes_in_flight(path.bytes_in_flight);
    out->set_bytes_per_second(path.bytes_per_second);
    out->set_delay_seconds(path.delay_seconds);
  }
}

// Heartbeat thread, but for gRPC's callbacks, which only post. Shared by gRPC (until OnDone) and the tasks on
// their way.
class WatchCall final : public grpc::ServerWriteReactor<rpc::WorkerState>,
                        public WorkerCall,
                        public std::enable_shared_from_this<WatchCall> {
 public:
  explicit WatchCall(WorkerContext* context)
      : context_(context),
        active_(context->watchers),
        writer_([this](const rpc::WorkerState* state) { StartWrite(state); },
                [this] { Finish(ToGrpc(outcome_)); }) {}

  void Open() {
    self_ = shared_from_this();
    context_->heartbeat.Post([self = self_] {
      if (self->ended_) return;
      self->context_->watch_calls.push_back(self.get());
      self->Look();
    });
  }

  void OnWriteDone(bool ok) override {
    context_->heartbeat.Post([self = shared_from_this(), ok] {
      if (!ok) self->Abort(Cancelled("the watcher is gone"));
      self->writer_.OnWritten();
    });
  }
  void OnCancel() override {
    context_->heartbeat.Post([self = shared_from_this()] { self->Abort(Cancelled("the watcher is gone")); });
  }
  void OnDone() override {
    context_->heartbeat.Post([self = std::move(self_)] {});
  }

  void Abort(const Status& status) override {
    if (ended_) return;
    ended_ = true;
    outcome_ = status;
    std::erase(context_->watch_calls, this);
    writer_.Discard();
    writer_.Finish();
  }

 private:
  // A watcher that reads slowly gets the newest state later, never a backlog.
  void Look() {
    if (ended_) return;
    if (writer_.idle()) {
      rpc::WorkerState state = StateOf(*context_);
      const transfer::Snapshot paths = context_->transfer->TakeSnapshot();
      AddPaths(paths, &state);
      AddLinks(context_->decode_workers.Of(paths.paths), paths, &state);
      std::string bytes = state.SerializeAsString();
      const bool cache_changed = AddCacheChanges(&state);
      if (cache_changed || bytes != said_ || Now() - said_at_ >= kSayEvery) {
        said_ = std::move(bytes);
        said_at_ = Now();
        AddPathFigures(paths, &state);
        writer_.Push(std::move(state));
      }
    }
    context_->heartbeat.PostAt(Now() + kLookEvery, [weak = weak_from_this()] {
      if (const auto self = weak.lock(); self != nullptr) self->Look();
    });
  }

  // What the watcher does not know yet of the prefix cache; false if nothing. Its first state always has
  // some.
  bool AddCacheChanges(rpc::WorkerState* state) {
    const engine::CacheChanges changes = context_->engine->CacheChangesSince(cache_position_);
    cache_position_ = changes.next;
    if (!changes.reset && changes.added.empty() && changes.removed.empty()) return false;
    state->mutable_cache()->set_reset(changes.reset);
    state->mutable_cache()->mutable_added()->Assign(changes.added.begin(), changes.added.end());
    state->mutable_cache()->mutable_removed()->Assign(changes.removed.begin(), changes.removed.end());
    return true;
  }

  WorkerContext* const context_;
  const ActiveGuard active_;
  std::shared_ptr<WatchCall> self_;  // gRPC's share
  StreamWriter<rpc::WorkerState> writer_;
  std::string said_;  // serialised, without the cache and the paths' figures
  uint64_t cache_position_ = 0;
  TimePoint said_at_;
  bool ended_ = false;
  Status outcome_;
};

}  // namespace

grpc::ServerWriteReactor<rpc::WorkerState>* OpenWatchCall(WorkerContext* context) {
  const auto call = std::make_shared<WatchCall>(context);
  call->Open();
  return call.get();
}

}  // namespace millrace::server
