#include "tests/sim/process.h"

#include <algorithm>

namespace millrace::sim {

using std::chrono::microseconds;
using std::chrono::milliseconds;

void SimThread::Post(Task task) {
  tasks_.push_back(std::move(task));
  Schedule();
}

void SimThread::Schedule() {
  if (scheduled_ || *frozen_ || tasks_.empty()) return;
  scheduled_ = true;
  world_->After(microseconds(1 + random_->Below(20)), [this] {
    scheduled_ = false;
    if (*frozen_) return;
    Task task = std::move(tasks_.front());
    tasks_.pop_front();
    std::move(task)();
    Schedule();
  });
}

server::TaskRunner::TimerId SimThread::PostAt(TimePoint when, Task task) {
  const TimerId id{when, next_number_++};
  timers_.emplace(id, std::move(task));
  world_->At(when, [this, id] { Fire(id); });
  return id;
}

void SimThread::Fire(const TimerId& timer) {
  if (*frozen_) return;
  auto found = timers_.extract(timer);
  if (found) std::move(found.mapped())();
}

void SimThread::Thaw() {
  for (const auto& [id, task] : timers_) {
    if (id.when > world_->Now()) break;
    world_->After(microseconds(random_->Below(20)), [this, timer = id] { Fire(timer); });
  }
  Schedule();
}

void Process::Freeze() {
  if (!std::exchange(frozen, true)) frozen_at = control.Now();
}

void Process::Thaw() {
  if (std::exchange(frozen, false)) frozen_for += control.Now() - frozen_at;
  for (SimThread* const thread : {&control, &digest, &engine, &transfer}) thread->Thaw();
}

Rpc::Rpc(Network* network, Process* client, Process* server) : network_(network) {
  ends_[kClient].process = client;
  ends_[kServer].process = server;
}

void Rpc::OnEnd(Side side, std::function<void(const Status&)> on_end) {
  if (!ends_[side].open && !ends_[side].ended_with.ok()) return on_end(ends_[side].ended_with);
  ends_[side].on_end = std::move(on_end);
}

void Rpc::Send(Side from, std::function<void()> deliver) {
  if (!ends_[from].open || ends_[from].process->dead) return;
  Put(Other(from), {{}, deliver, false, OkStatus()});
  if (network_->bugs.repeats && network_->random->Below(40) == 0)
    Put(Other(from), {{}, std::move(deliver), false, OkStatus()});
}

void Rpc::Finish(const Status& status) {
  End& end = ends_[kServer];
  if (!end.open) return;
  end.open = false;
  end.on_end = nullptr;
  if (!end.process->dead) Put(kClient, {{}, nullptr, true, status});
}

void Rpc::Cancel(const Status& status) { Close(kClient, status); }

void Rpc::Put(Side to, Message message) {
  End& end = ends_[to];
  if (!end.open || end.process == nullptr) return;
  end.last_due = std::max(end.last_due + microseconds(1), network_->world->Now() + network_->Delay());
  message.due = end.last_due;
  end.coming.push_back(std::move(message));
  if (!std::exchange(end.pumping, true))
    network_->world->At(end.coming.front().due, [self = shared_from_this(), to] { self->Pump(to); });
}

void Rpc::Pump(Side to) {
  End& end = ends_[to];
  Process* const from = ends_[Other(to)].process;
  if (!end.open || end.process->dead) {  // its death is told by itself
    end.coming.clear();
    end.pumping = false;
    return;
  }
  if (!network_->Passes(*from, *end.process)) {
    network_->world->After(milliseconds(5 + network_->random->Below(40)),
                           [self = shared_from_this(), to] { self->Pump(to); });
    return;
  }
  Message message = std::move(end.coming.front());
  end.coming.pop_front();
  if (network_->on_message) network_->on_message(from, end.process);
  if (end.open) {  // what was told of this message may have ended the call
    if (message.closes) {
      end.open = false;
      end.process->control.Post(
          [on_end = std::exchange(end.on_end, nullptr), status = message.status] { on_end(status); });
    } else {
      end.process->control.Post(std::move(message.deliver));
    }
  }
  if (end.coming.empty()) {
    end.pumping = false;
    return;
  }
  network_->world->At(end.coming.front().due, [self = shared_from_this(), to] { self->Pump(to); });
}

void Rpc::Close(Side side, const Status& status) {
  End& end = ends_[side];
  if (!end.open) return;
  end.open = false;
  end.ended_with = status;
  if (auto on_end = std::exchange(end.on_end, nullptr); on_end != nullptr)
    end.process->control.Post([on_end = std::move(on_end), status] { on_end(status); });
  Tell(Other(side), side == kClient ? Cancelled("the caller is gone") : Unavailable("connection reset"));
}

void Rpc::Tell(Side side, const Status& status) {
  if (!ends_[side].open || ends_[side].process == nullptr) return;
  if (side == kServer && network_->bugs.cancel_not_passed_on) return;
  if (side == kClient && network_->bugs.loss_not_told) return;
  network_->world->After(network_->Delay(), [self = shared_from_this(), side, status] {
    const End& end = self->ends_[side];
    if (!end.open) return;
    // A reset that a link swallows is lost; the keepalive finds out.
    if (self->network_->Passes(*self->ends_[Other(side)].process, *end.process)) self->Close(side, status);
  });
}

// Each side by itself: no answer to pings for a while.
void Rpc::Keepalive() {
  if (over()) return;
  const TimePoint now = network_->world->Now();
  for (const Side side : {kClient, kServer}) {
    End& end = ends_[side];
    Process* const other = ends_[Other(side)].process;
    if (!end.open || end.process == nullptr || end.process->frozen) continue;
    const bool answers =
        other != nullptr && !other->dead && !other->frozen && network_->Passes(*end.process, *other);
    if (answers) {
      end.silent_since = {};
      // The other side is over and its reset was swallowed.
      if (!ends_[Other(side)].open && end.coming.empty()) Tell(side, Unavailable("connection reset"));
      continue;
    }
    if (end.silent_since == TimePoint{}) end.silent_since = now;
    const bool told = side == kServer ? !network_->bugs.cancel_not_passed_on : !network_->bugs.loss_not_told;
    if (told && now - end.silent_since >= milliseconds(2000 + network_->random->Below(2000)))
      Close(side, Unavailable("keepalive watchdog timeout"));
  }
  network_->world->After(milliseconds(500), [self = shared_from_this()] { self->Keepalive(); });
}

std::shared_ptr<Rpc> Network::Dial(Process* client, Process* server, int server_host, TimePoint deadline,
                                   std::function<void(const Status&)> on_end) {
  auto rpc = std::make_shared<Rpc>(this, client, server);
  rpc->OnEnd(Rpc::kClient, std::move(on_end));
  if (deadline != kNoDeadline)
    world->At(deadline, [rpc] { rpc->Close(Rpc::kClient, DeadlineExceeded("deadline exceeded")); });
  if (server == nullptr || server->dead || client->dead) {
    rpc->ends_[Rpc::kServer].open = false;
    const bool refused = client->dead || Between(client->host, server_host) == Link::kUp;
    world->After(refused ? Delay() : milliseconds(2000 + random->Below(18'000)),
                 [rpc] { rpc->Close(Rpc::kClient, Unavailable("failed to connect")); });
    return rpc;
  }
  if (Between(client->host, server_host) == Link::kCut)
    world->After(Delay(), [rpc] { rpc->Close(Rpc::kClient, Unavailable("no route to host")); });
  std::erase_if(calls_, [](const auto& call) { return call.expired(); });
  calls_.push_back(rpc);
  world->After(milliseconds(500), [rpc] { rpc->Keepalive(); });
  return rpc;
}

Link Network::Between(int a, int b) const {
  Link worst = Link::kUp;
  for (const int host : {a, b}) {
    if (const auto found = hosts_.find(host); found != hosts_.end()) worst = std::max(worst, found->second);
  }
  const auto found = links_.find(std::minmax({a, b}));
  return found == links_.end() ? worst : std::max(worst, found->second);
}

void Network::SetLink(int a, int b, Link link) {
  links_.erase(std::minmax({a, b}));
  if (link != Link::kUp) links_.emplace(std::minmax({a, b}), link);
  BreakWhatIsCut();
}

void Network::SetHost(int host, Link link) {
  hosts_.erase(host);
  if (link != Link::kUp) hosts_.emplace(host, link);
  BreakWhatIsCut();
}

// Both sides of a cut see it: their own kernels say so.
void Network::BreakWhatIsCut() {
  const auto calls = calls_;
  for (const auto& weak : calls) {
    const auto rpc = weak.lock();
    if (rpc == nullptr || rpc->over()) continue;
    if (Between(rpc->process(Rpc::kClient)->host, rpc->process(Rpc::kServer)->host) != Link::kCut) continue;
    for (const Rpc::Side side : {Rpc::kClient, Rpc::kServer}) {
      if (!bugs.loss_not_told || side == Rpc::kServer) rpc->Close(side, Unavailable("connection lost"));
    }
  }
}

void Network::OnDeath(Process* process) {
  const auto calls = calls_;
  for (const auto& weak : calls) {
    const auto rpc = weak.lock();
    if (rpc == nullptr) continue;
    for (const Rpc::Side side : {Rpc::kClient, Rpc::kServer}) {
      if (rpc->process(side) != process) continue;
      rpc->Close(side, Unavailable("this process has ended"));
      // What it had said, and not been heard yet, may be heard or not.
      rpc->Tell(Rpc::Other(side), Unavailable("connection reset"));
    }
  }
}

// Mostly short; now and then a packet is sent again.
Duration Network::Delay() const {
  if (random->Below(30) == 0) return milliseconds(5 + random->Below(200));
  return microseconds(20 + random->Below(2000));
}

}  // namespace millrace::sim
