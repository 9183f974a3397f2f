#pragma once
// Processes in virtual time: threads that take turns, processes that die or freeze, links that break or
// swallow everything, and calls between processes that behave like gRPC's: in order within a stream, in no
// order between streams, ended by either side, by a lost process at once and by a silent one after a while.

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/random.h"
#include "base/status.h"
#include "server/rpc/task_runner.h"
#include "tests/sim/world.h"

namespace millrace::sim {

// One thread of a process: its tasks in order, none while the process is frozen.
class SimThread final : public server::TaskRunner {
 public:
  SimThread(World* world, Random* random, const bool* frozen)
      : world_(world), random_(random), frozen_(frozen) {}
  TimePoint Now() const override { return world_->Now(); }
  void Post(Task task) override;
  TimerId PostAt(TimePoint when, Task task) override;
  void CancelTimer(const TimerId& timer) override { timers_.erase(timer); }
  void Thaw();

 private:
  void Schedule();
  void Fire(const TimerId& timer);

  World* const world_;
  Random* const random_;
  const bool* const frozen_;
  std::deque<Task> tasks_;
  std::map<TimerId, Task> timers_;
  uint64_t next_number_ = 0;
  bool scheduled_ = false;
};

// One incarnation at an address. A dead one goes on by itself, unheard: what it held must come apart there
// too, as it does in a process that is told to end.
struct Process {
  Process(World* world, Random* random, std::string where, int on_host, uint64_t incarnation)
      : address(std::move(where)),
        host(on_host),
        epoch(incarnation),
        control(world, random, &frozen),
        digest(world, random, &frozen),
        engine(world, random, &frozen),
        transfer(world, random, &frozen) {}
  void Freeze();
  void Thaw();

  const std::string address;
  const int host;
  const uint64_t epoch;
  bool frozen = false;
  bool dead = false;
  TimePoint frozen_at{};
  Duration frozen_for{};  // so far
  SimThread control, digest, engine, transfer;
};

enum class Link { kUp, kHole, kCut };

// Mistakes of whoever carries calls, to see that the checkers find what they lead to.
struct NetworkBugs {
  bool cancel_not_passed_on = false;  // the server never hears of a client that left
  bool loss_not_told = false;         // the client never hears of a server that is gone
  bool repeats = false;               // a message may come twice
};

class Network;

// One call. Made by Network::Dial; either end is over once and for all.
class Rpc : public std::enable_shared_from_this<Rpc> {
 public:
  enum Side { kClient, kServer };
  Rpc(Network* network, Process* client, Process* server);

  // What runs on a side's control thread when the call ends there other than by its own Finish or when the
  // side is over already.
  void OnEnd(Side side, std::function<void(const Status&)> on_end);
  // Runs `deliver` on the other side's control thread, after all that was sent before.
  void Send(Side from, std::function<void()> deliver);
  void Finish(const Status& status);  // by the server, after all that it has sent
  void Cancel(const Status& status);  // by the client
  Process* process(Side side) const { return ends_[side].process; }
  bool over() const { return !ends_[kClient].open && !ends_[kServer].open; }

 private:
  friend class Network;
  struct Message {
    TimePoint due;
    std::function<void()> deliver;
    bool closes = false;
    Status status;
  };
  struct End {
    Process* process = nullptr;
    bool open = true;
    std::function<void(const Status&)> on_end;
    Status ended_with;
    std::deque<Message> coming;  // to this end
    TimePoint last_due{};
    bool pumping = false;
    TimePoint silent_since{};
  };
  static Side Other(Side side) { return side == kClient ? kServer : kClient; }
  void Put(Side to, Message message);
  void Pump(Side to);
  void Close(Side side, const Status& status);  // and tell the other
  void Tell(Side side, const Status& status);   // by what overtakes messages: a reset
  void Keepalive();

  Network* const network_;
  End ends_[2];
};

class Network {
 public:
  Network(World* in, Random* chance, const NetworkBugs& mistakes)
      : world(in), random(chance), bugs(mistakes) {}

  // Calls `server`, which may be null: nobody listens at that address.
  std::shared_ptr<Rpc> Dial(Process* client, Process* server, int server_host, TimePoint deadline,
                            std::function<void(const Status&)> on_end);
  Link Between(int a, int b) const;
  bool Passes(const Process& a, const Process& b) const { return Between(a.host, b.host) == Link::kUp; }
  void SetLink(int a, int b, Link link);
  void SetHost(int host, Link link);
  void OnDeath(Process* process);
  Duration Delay() const;

  World* const world;
  Random* const random;
  const NetworkBugs bugs;
  // Told of each message that is about to arrive, in order of arrival.
  std::function<void(Process* from, Process* to)> on_message;

 private:
  void BreakWhatIsCut();
  std::map<std::pair<int, int>, Link> links_;  // those that are not up
  std::map<int, Link> hosts_;
  std::vector<std::weak_ptr<Rpc>> calls_;  // in order of their begin
};

}  // namespace millrace::sim
