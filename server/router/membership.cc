#include "server/router/membership.h"

#include <algorithm>
#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <unordered_set>

#include "base/log.h"
#include "base/net.h"
#include "base/random.h"
#include "engine/kv/layout.h"
#include "engine/kv/page_keys.h"
#include "proto/worker.grpc.pb.h"
#include "server/rpc/channel.h"
#include "server/rpc/convert.h"
#include "server/rpc/task_thread.h"

namespace millrace::server {
namespace {

constexpr Duration kBackoffMin = std::chrono::milliseconds(100);
constexpr Duration kBackoffMax = std::chrono::seconds(1);
constexpr Duration kSilenceCheckEvery = std::chrono::milliseconds(250);

TimePoint Now() { return std::chrono::steady_clock::now(); }

WorkerGroup GroupFromProto(const rpc::ExpertGroupState& state) {
  WorkerGroup group;
  group.rank = static_cast<int32_t>(state.rank());
  group.ranks = static_cast<int32_t>(state.ranks());
  group.epoch = state.epoch();
  group.alive = state.alive();
  group.ports.assign(state.ports().begin(), state.ports().end());
  group.experts_held = static_cast<int32_t>(state.experts_held());
  group.imbalance = state.imbalance();
  group.expert_load.assign(state.expert_load().begin(), state.expert_load().end());
  group.rank_load.assign(state.rank_load().begin(), state.rank_load().end());
  return group;
}

WorkerSnapshot SnapshotFromProto(const std::string& address, const rpc::WorkerState& state) {
  WorkerSnapshot snapshot;
  snapshot.address = address;
  switch (state.role()) {
    case rpc::PREFILL:
      snapshot.role = WorkerRole::kPrefill;
      break;
    case rpc::DECODE:
      snapshot.role = WorkerRole::kDecode;
      break;
    default:
      snapshot.role = WorkerRole::kBoth;
      break;
  }
  snapshot.connected = true;
  // A worker of another protocol is shown but gets no work.
  snapshot.ready = state.ready() && state.protocol_version() == kProtocolVersion &&
                   rpc::Role_IsValid(state.role()) && state.role() != rpc::ROLE_UNSPECIFIED;
  snapshot.stalled = state.stalled();
  snapshot.epoch = state.epoch();
  snapshot.model_name = state.model_name();
  snapshot.model_digest = state.model_digest();
  snapshot.layout_hash = state.layout_hash();
  snapshot.protocol_version = state.protocol_version();
  snapshot.pages_total = state.pages_total();
  snapshot.pages_free = state.pages_free();
  snapshot.waiting = state.waiting();
  snapshot.running = state.running();
  snapshot.context_max = state.context_max();
  snapshot.prefill_rate = {state.prefill_tokens_per_second(), state.prefill_samples()};
  snapshot.token_gap = {state.token_gap_seconds(), state.token_gap_samples()};
  snapshot.avoids.assign(state.avoids().begin(), state.avoids().end());
  for (const rpc::WorkerLink& link : state.links())
    snapshot.links.push_back({link.epoch(), link.paths(), link.paths_up()});
  snapshot.open_tickets = state.open_tickets();
  snapshot.draining_tickets = state.draining_tickets();
  snapshot.transfers = state.transfers();
  std::vector<WorkerPath> paths;
  for (const rpc::PathState& path : state.paths()) {
    paths.push_back({path.kind(), path.local_rail(), path.remote_rail(), path.state(), path.reason(),
                     path.bytes_done(), path.bytes_in_flight(), path.trips(), path.bytes_per_second(),
                     path.delay_seconds()});
  }
  snapshot.paths = std::make_shared<const std::vector<WorkerPath>>(std::move(paths));
  if (state.has_group()) snapshot.group = std::make_shared<const WorkerGroup>(GroupFromProto(state.group()));
  return snapshot;
}

// One watch stream. What it hears goes to its owner's thread through the two callbacks; `done` is the last.
class WatchStream final : public grpc::ClientReadReactor<rpc::WorkerState> {
 public:
  using OnState = std::function<void(rpc::WorkerState)>;
  using OnEnd = std::function<void(grpc::Status)>;

  // `self_` keeps the stream alive until gRPC is through with it, whatever its owner does meanwhile.
  static std::shared_ptr<WatchStream> Start(const std::shared_ptr<grpc::Channel>& channel, OnState on_state,
                                            OnEnd on_end) {
    auto stream = std::make_shared<WatchStream>();
    stream->self_ = stream;
    stream->on_state_ = std::move(on_state);
    stream->on_end_ = std::move(on_end);
    stream->stub_ = rpc::Worker::NewStub(channel);
    stream->stub_->async()->Watch(&stream->context_, &stream->request_, stream.get());
    stream->StartRead(&stream->state_);
    stream->StartCall();
    return stream;
  }

  void Cancel() { context_.TryCancel(); }

  void OnReadDone(bool ok) override {
    if (!ok) return;
    on_state_(state_);
    StartRead(&state_);
  }

  void OnDone(const grpc::Status& status) override {
    const std::shared_ptr<WatchStream> self = std::move(self_);
    on_end_(status);
  }

 private:
  OnState on_state_;
  OnEnd on_end_;
  std::unique_ptr<rpc::Worker::Stub> stub_;
  grpc::ClientContext context_;
  rpc::WatchRequest request_;
  rpc::WorkerState state_;
  std::shared_ptr<WatchStream> self_;
};

class WatchedMembership final : public Membership {
 public:
  WatchedMembership(const MembershipOptions& options, std::vector<HostPort> names)
      : options_(options), names_(std::move(names)), channels_(options.credentials) {
    answers_.resize(names_.size());
    resolver_.Post([this] { ResolveAll(); });
    ScheduleSilenceCheck();
  }

  ~WatchedMembership() override {
    resolver_.Stop();  // may wait for a name server's time-out
    watcher_.Post([this] {
      ending_ = true;
      for (auto& [address, member] : members_) {
        if (member.stream != nullptr) member.stream->Cancel();
      }
      std::lock_guard lock(mutex_);
      no_new_streams_ = true;
      stream_ended_.notify_all();
    });
    {
      std::unique_lock lock(mutex_);
      stream_ended_.wait(lock, [this] { return no_new_streams_ && streams_ == 0; });
    }
    watcher_.Stop();
  }

  std::vector<WorkerSnapshot> Snapshot(const CacheQuery& query) const override {
    std::vector<WorkerSnapshot> all;
    std::map<std::string, std::vector<uint64_t>> keys_of_model;
    const TimePoint now = Now();
    std::lock_guard lock(mutex_);
    for (const auto& [address, known] : known_) {
      const WorkerSnapshot& snapshot = known.snapshot;
      all.push_back(snapshot);
      all.back().silent = now - known.heard;
      all.back().prefill_rate.age = now - known.prefill_measured;
      all.back().token_gap.age = now - known.gap_measured;
      const auto cached = cached_keys_.find(address);
      if (query.tokens.empty() || cached == cached_keys_.end()) continue;
      std::vector<uint64_t>& keys = keys_of_model[snapshot.model_digest];
      if (keys.empty()) {
        engine::ExtendPageKeys(engine::CacheRoot(snapshot.model_digest, query.salt), query.tokens, &keys);
      }
      const auto end =
          std::find_if(keys.begin(), keys.end(), [&](uint64_t key) { return !cached->second.contains(key); });
      all.back().cached_tokens = static_cast<int32_t>(end - keys.begin()) * engine::kPageTokens;
    }
    return all;
  }

  std::shared_ptr<GenerateCall> Generate(const std::string& address, const rpc::GenerateRequest& request,
                                         TimePoint deadline,
                                         std::shared_ptr<GenerateObserver> observer) override {
    return StartGenerate(channels_.Get(address), request, GrpcDeadline(deadline), std::move(observer));
  }

  bool Alive(const std::string& address, uint64_t epoch) const override {
    std::lock_guard lock(mutex_);
    const auto found = known_.find(address);
    if (found == known_.end()) return false;
    const WorkerSnapshot& snapshot = found->second.snapshot;
    return snapshot.connected && snapshot.epoch == epoch && !snapshot.stalled;
  }

  bool CanServe() const override {
    std::lock_guard lock(mutex_);
    return std::any_of(known_.begin(), known_.end(), [](const auto& entry) {
      const WorkerSnapshot& snapshot = entry.second.snapshot;
      return snapshot.connected && snapshot.ready && snapshot.role != WorkerRole::kPrefill;
    });
  }

 private:
  struct Member {
    std::shared_ptr<WatchStream>
        stream;               // shared with gRPC, which calls it until it has ended; null between streams
    uint64_t generation = 0;  // of the stream; what an earlier one says is ignored
    TimePoint heard;
    Duration backoff = kBackoffMin;
    bool reported_lost = false;
  };

  // Resolver thread.
  void ResolveAll() {
    for (size_t i = 0; i < names_.size(); ++i) {
      StatusOr<std::vector<HostPort>> found = Resolve(names_[i]);
      if (found.ok()) {
        answers_[i] = *std::move(found);
      } else {
        LogDebug("membership: {}; {} addresses stay", Message(found.status()), answers_[i].size());
      }
    }
    std::set<std::string> addresses;
    for (const auto& answer : answers_) {
      for (const HostPort& address : answer) addresses.insert(address.ToString());
    }
    watcher_.Post([this, addresses = std::move(addresses)] {
      resolved_ = addresses;
      SetAddresses();
    });
    resolver_.PostAt(Now() + options_.resolve_every, [this] { ResolveAll(); });
  }

  // All below: watcher thread.
  // Who was resolved, and the ranks of the expert groups that these belong to: a group is listed by any of
  // its addresses.
  void SetAddresses() {
    if (ending_) return;
    std::set<std::string> addresses = resolved_;
    for (auto it = ranks_.begin(); it != ranks_.end();) {
      if (!resolved_.contains(it->first)) {
        it = ranks_.erase(it);
        continue;
      }
      addresses.insert(it->second.begin(), it->second.end());
      ++it;
    }
    for (auto it = members_.begin(); it != members_.end();) {
      if (addresses.contains(it->first)) {
        ++it;
        continue;
      }
      LogInfo("worker {} left the list", it->first);
      if (it->second.stream != nullptr) it->second.stream->Cancel();
      channels_.Forget(it->first);
      {
        std::lock_guard lock(mutex_);
        known_.erase(it->first);
        cached_keys_.erase(it->first);
      }
      it = members_.erase(it);
    }
    for (const std::string& address : addresses) {
      if (members_.contains(address)) continue;
      members_[address];
      {
        std::lock_guard lock(mutex_);
        known_[address].snapshot.address = address;
      }
      Connect(address);
    }
  }

  void Connect(const std::string& address) {
    const auto found = members_.find(address);
    if (ending_ || found == members_.end() || found->second.stream != nullptr) return;
    Member& member = found->second;
    const uint64_t generation = member.generation = ++next_generation_;
    member.heard = Now();
    {
      std::lock_guard lock(mutex_);
      ++streams_;
    }
    member.stream = WatchStream::Start(
        channels_.Get(address),
        [this, address, generation](rpc::WorkerState state) {
          watcher_.Post(
              [this, address, generation, state = std::move(state)] { Heard(address, generation, state); });
        },
        [this, address, generation](grpc::Status status) {
          watcher_.Post([this, address, generation, status] { Ended(address, generation, status); });
        });
  }

  Member* Find(const std::string& address, uint64_t generation) {
    const auto found = members_.find(address);
    return found != members_.end() && found->second.generation == generation ? &found->second : nullptr;
  }

  void Heard(const std::string& address, uint64_t generation, const rpc::WorkerState& state) {
    Member* member = Find(address, generation);
    if (member == nullptr) return;
    member->heard = Now();
    member->backoff = kBackoffMin;
    member->reported_lost = false;
    WorkerSnapshot snapshot = SnapshotFromProto(address, state);
    std::lock_guard lock(mutex_);
    if (state.has_cache()) {
      std::unordered_set<uint64_t>& keys = cached_keys_[address];
      if (state.cache().reset()) keys.clear();
      for (const uint64_t key : state.cache().removed()) keys.erase(key);
      keys.insert(state.cache().added().begin(), state.cache().added().end());
    }
    if (snapshot.group != nullptr && resolved_.contains(address)) {
      watcher_.Post([this, address, group = snapshot.group] { NoteRanks(address, *group); });
    }
    Known& known = known_[address];
    if (!known.snapshot.connected || known.snapshot.ready != snapshot.ready) {
      LogInfo("worker {} is {}", address, snapshot.ready ? "ready" : "not ready");
    }
    known.heard = Now();
    if (snapshot.prefill_rate.samples != known.snapshot.prefill_rate.samples)
      known.prefill_measured = known.heard;
    if (snapshot.token_gap.samples != known.snapshot.token_gap.samples) known.gap_measured = known.heard;
    known.snapshot = std::move(snapshot);
  }

  // Ranks that are not members now stay: they are started again where they were.
  void NoteRanks(const std::string& address, const WorkerGroup& group) {
    StatusOr<HostPort> rank = ParseHostPort(address);
    std::set<std::string>& ranks = ranks_[address];
    bool changed = false;
    for (const uint32_t port : group.ports) {
      if (!rank.ok() || port == 0 || port > UINT16_MAX) continue;
      rank->port = static_cast<uint16_t>(port);
      changed |= ranks.insert(rank->ToString()).second;
    }
    if (changed) SetAddresses();
  }

  void MarkLost(const std::string& address, Member* member, const std::string& why) {
    if (!member->reported_lost) LogWarning("worker {} is not reachable: {}", address, why);
    member->reported_lost = true;
    std::lock_guard lock(mutex_);
    known_[address].snapshot.connected = false;
    cached_keys_.erase(address);  // the next stream begins with all of them
  }

  void Ended(const std::string& address, uint64_t generation, const grpc::Status& status) {
    if (Member* member = Find(address, generation); member != nullptr) {
      member->stream.reset();
      MarkLost(address, member, status.error_message());
      // Spread, so that the watchers of a worker that comes back do not all come at once.
      const auto spread = Duration(
          static_cast<int64_t>(random_.Uniform() * 0.5 * static_cast<double>(member->backoff.count())));
      watcher_.PostAt(Now() + member->backoff + spread, [this, address] { Connect(address); });
      member->backoff = std::min(2 * member->backoff, kBackoffMax);
    }
    std::lock_guard lock(mutex_);
    --streams_;
    stream_ended_.notify_all();
  }

  void ScheduleSilenceCheck() {
    watcher_.PostAt(Now() + kSilenceCheckEvery, [this] {
      for (auto& [address, member] : members_) {
        if (member.stream == nullptr || Now() - member.heard < options_.watch_timeout) continue;
        MarkLost(address, &member, "silent for too long");
        member.stream->Cancel();  // Ended follows and connects again
      }
      ScheduleSilenceCheck();
    });
  }

  const MembershipOptions options_;
  const std::vector<HostPort> names_;
  ChannelPool channels_;
  std::vector<std::vector<HostPort>> answers_;  // resolver thread: the last good answer per name

  // Watcher thread.
  std::map<std::string, Member> members_;
  std::set<std::string> resolved_;
  std::map<std::string, std::set<std::string>> ranks_;  // by resolved address: the ranks of its group
  uint64_t next_generation_ = 0;
  bool ending_ = false;
  Random random_{RandomId()};

  struct Known {
    WorkerSnapshot snapshot;  // its ages are made when it is asked for
    TimePoint heard;
    TimePoint prefill_measured;  // when the number of samples last changed
    TimePoint gap_measured;
  };
  mutable std::mutex mutex_;  // innermost: nothing is called while it is held
  std::map<std::string, Known> known_;
  std::map<std::string, std::unordered_set<uint64_t>>
      cached_keys_;  // by address; as many as the worker has pages
  int streams_ = 0;  // whose Ended has not run
  bool no_new_streams_ = false;
  std::condition_variable stream_ended_;

  // Tasks are bounded by members x one state per 100 ms. Last, so that they end first.
  TaskThread watcher_{"membership"};
  TaskThread resolver_{"resolver"};
};

}  // namespace

StatusOr<std::unique_ptr<Membership>> Membership::Create(const MembershipOptions& options) {
  std::vector<HostPort> names;
  for (const std::string& worker : options.workers) {
    MR_ASSIGN_OR_RETURN(HostPort name, ParseHostPort(worker));
    names.push_back(std::move(name));
  }
  return std::unique_ptr<Membership>(new WatchedMembership(options, std::move(names)));
}

}  // namespace millrace::server
