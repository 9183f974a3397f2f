#include "tests/sim/handover.h"

#include <algorithm>
#include <utility>

#include "tests/sim/model_cluster.h"

namespace millrace::sim {

using std::chrono::microseconds;
using std::chrono::milliseconds;

const char* Name(HandoverFault fault) {
  static constexpr const char* kNames[] = {"kill", "freeze", "hole", "cut", "host hole", "stall", "drain"};
  return kNames[static_cast<int>(fault)];
}

const char* Name(HandoverBug bug) {
  static constexpr const char* kNames[] = {"None",
                                           "PagesBeforeClose",
                                           "PagesBeforeFence",
                                           "TicketForgotten",
                                           "FailedImportCached",
                                           "CancelForgotten",
                                           "CancelNotPassedOn",
                                           "LossNotTold",
                                           "MessageRepeated",
                                           "ContinuesFromStart",
                                           "ContinuesOtherwise",
                                           "DrawsByProcess"};
  return kNames[static_cast<int>(bug)];
}

namespace {

// After the last fault: everybody has an answer, and then nobody holds anything.
constexpr Duration kAnsweredWithin = std::chrono::seconds(30);
constexpr Duration kReleasedWithin = std::chrono::seconds(15);
constexpr Duration kGrace = milliseconds(300);  // of a drain
constexpr Duration kBetweenMildFaults = std::chrono::seconds(6);
// A deadline is kept by everybody that is asked; the last of them may be slow to say so.
constexpr Duration kDeadlineSlack = std::chrono::seconds(5);

struct Client {
  int number = 0;
  server::GenerationRequest request;
  std::vector<ModelDraw> expected;
  Duration leaves_after = Duration::max();
  ModelGateway* gateway = nullptr;
  std::shared_ptr<server::Generation> generation;
  uint64_t turn = 0;  // which of its requests; events of earlier ones are stale
  size_t next = 0;    // token
  TimePoint heard;
  bool over = false;
};

class Handover {
 public:
  explicit Handover(const HandoverPlan& plan);
  HandoverOutcome Run();

 private:
  void Fail(const std::string& what);
  void AddClient(int number, bool simple);
  void Ask(Client* client);
  void OnEvent(Client* client, uint64_t turn, const server::Generation::Event& event);
  void OnToken(Client* client, const engine::TokenEvent& token);
  void OnEnd(Client* client, const Status& status);
  bool Proper(const Client& client, const Status& status) const;
  void OnMessage(Process* from, Process* to);
  void Strike(HandoverFault fault, Process* target, Process* other);
  void StrikeWorker(HandoverFault fault, ModelWorker* worker);
  void AwaitDrained(ModelWorker* worker, TimePoint since);
  void KillWorker(ModelWorker* worker);
  void KillGateway(ModelGateway* gateway);
  void Healed();
  void After(Duration wait, std::function<void()> heal);
  bool AllOver() const;
  std::string Left() const;
  Duration Between(int least_ms, int most_ms) {
    return milliseconds(least_ms) + microseconds(random_.Below(1000 * (most_ms - least_ms) + 1));
  }

  const HandoverPlan plan_;
  Random random_;
  const bool mild_;  // one fault at a time: then nobody may notice more than time
  World world_;
  Network network_;
  Cluster cluster_;
  HandoverOutcome outcome_;
  uint64_t next_epoch_ = 1000;
  std::vector<std::unique_ptr<Client>> clients_;
  std::vector<HandoverStrike> strikes_;  // to come, in order of their messages
  int running_faults_ = 0;
  TimePoint healed_at_{};
  int lonely_host_ = -1;  // the last one whose links were all holes
};

NetworkBugs NetworkBugsOf(HandoverBug bug) {
  return {.cancel_not_passed_on = bug == HandoverBug::kCancelNotPassedOn,
          .loss_not_told = bug == HandoverBug::kLossNotTold,
          .repeats = bug == HandoverBug::kMessageRepeated};
}

Handover::Handover(const HandoverPlan& plan)
    : plan_(plan),
      random_(plan.seed),
      mild_(plan.only.has_value() || random_.Below(2) == 0),
      network_(&world_, &random_, NetworkBugsOf(plan.bug)) {
  cluster_.world = &world_;
  cluster_.random = &random_;
  cluster_.network = &network_;
  cluster_.engine_bugs = {.caches_unproven = plan.bug == HandoverBug::kFailedImportCached,
                          .forgets_cancel = plan.bug == HandoverBug::kCancelForgotten,
                          .draws_by_process = plan.bug == HandoverBug::kDrawsByProcess};
  cluster_.request_bugs = {.without_tokens_so_far = plan.bug == HandoverBug::kContinuesFromStart,
                           .other_seed = plan.bug == HandoverBug::kContinuesOtherwise};
  cluster_.transfers.world = &world_;
  cluster_.transfers.random = &random_;
  cluster_.transfers.network = &network_;
  cluster_.transfers.bugs = {.close_at_once = plan.bug == HandoverBug::kPagesBeforeClose,
                             .cancel_at_once = plan.bug == HandoverBug::kPagesBeforeFence,
                             .close_forgotten = plan.bug == HandoverBug::kTicketForgotten,
                             .damage = plan.damaged_bytes};
  cluster_.transfers.violation = [this](const std::string& what) { Fail(what); };
  network_.on_message = [this](Process* from, Process* to) { OnMessage(from, to); };
  const bool simple = plan.only.has_value();
  if (!simple && random_.Below(3) == 0) cluster_.local_prefill_tokens_max = 64;
  const auto start = [&](const char* what, int count, server::WorkerRole role, int host) {
    for (int i = 0; i < count; ++i)
      cluster_.StartWorker(fmt::format("{}{}", what, i), host + i, next_epoch_++, role,
                           static_cast<int32_t>(16 + random_.Below(16)));
  };
  const auto some = [&](int least, int most) {
    return simple ? 2 : least + static_cast<int>(random_.Below(static_cast<uint64_t>(most - least + 1)));
  };
  start("decode", some(2, 3), server::WorkerRole::kDecode, 10);
  start("prefill", some(1, 3), server::WorkerRole::kPrefill, 20);
  if (!simple && random_.Below(4) == 0) start("both", 1, server::WorkerRole::kBoth, 30);
  const int gateways = simple ? 1 : 2;
  for (int i = 0; i < gateways; ++i) cluster_.StartGateway(fmt::format("gateway{}", i), i);
  const int clients = simple ? 1 : some(3, 10);
  for (int i = 0; i < clients; ++i) AddClient(i, simple);
  if (simple) {
    strikes_ = {*plan.only};
    return;
  }
  const uint64_t faults = mild_ ? random_.Below(3) : random_.Below(6);
  for (uint64_t i = 0; i < faults; ++i) {
    HandoverStrike strike;
    strike.fault = kHandoverFaults[random_.Below(std::size(kHandoverFaults))];
    strike.message = 1 + random_.Below(static_cast<uint64_t>(clients) * 30);
    strike.sender = random_.Below(2) == 0;
    strikes_.push_back(strike);
  }
  std::stable_sort(strikes_.begin(), strikes_.end(),
                   [](const auto& a, const auto& b) { return a.message < b.message; });
}

void Handover::Fail(const std::string& what) {
  if (outcome_.violation.empty())
    outcome_.violation = fmt::format("at {:.6f} s: {}", Seconds(world_.Now().time_since_epoch()), what);
}

void Handover::AddClient(int number, bool simple) {
  auto client = std::make_unique<Client>();
  client->number = number;
  server::GenerationRequest& request = client->request;
  request.id = fmt::format("request {}", number);
  // Of three texts, so that prefix caches have something; the end is its own.
  const uint64_t text = random_.Below(3);
  const uint64_t length = simple ? 300 : 1 + random_.Below(400);
  for (uint64_t i = 0; i < length; ++i)
    request.prompt.push_back(static_cast<int32_t>(Mix64(text * 1000 + i) % 1000));
  request.prompt.push_back(number);
  request.sampling.seed = random_.Next();
  request.sampling.max_tokens = simple ? 12 : static_cast<int32_t>(1 + random_.Below(40));
  client->expected = ModelAnswer(request.prompt, request.sampling.seed, request.sampling.max_tokens);
  if (!simple && random_.Below(8) == 0) client->leaves_after = Between(0, 400);
  const Duration starts = simple ? Duration(0) : Between(0, 3000);
  if (!simple && random_.Below(10) == 0) request.deadline = world_.Now() + starts + Between(5, 4000);
  world_.After(starts, [this, client = client.get()] {
    client->heard = world_.Now();
    Ask(client);
    if (client->leaves_after == Duration::max()) return;
    world_.After(client->leaves_after, [this, client] {
      if (client->over) return;
      client->over = true;
      ++outcome_.left;
      if (client->gateway == nullptr) return;  // there was none to ask
      client->gateway->process.control.Post([generation = std::exchange(client->generation, nullptr)] {
        if (generation != nullptr) generation->Cancel(Cancelled("the client left"));
      });
    });
  });
  clients_.push_back(std::move(client));
}

void Handover::Ask(Client* client) {
  std::vector<ModelGateway*> alive;
  for (const auto& gateway : cluster_.gateways) {
    if (!gateway->process.dead) alive.push_back(gateway.get());
  }
  if (alive.empty() || client->over) {
    if (!client->over) world_.After(milliseconds(50), [this, client] { Ask(client); });
    return;
  }
  client->gateway = alive[random_.Below(alive.size())];
  client->next = 0;
  client->generation = nullptr;
  client->gateway->process.control.Post([this, client, turn = ++client->turn] {
    if (client->turn != turn || client->over) return;
    const auto generation = client->gateway->Ask(
        client->request,
        [this, client, turn](const server::Generation::Event& event) { OnEvent(client, turn, event); });
    if (!client->over && client->turn == turn) client->generation = generation;
  });
}

void Handover::OnEvent(Client* client, uint64_t turn, const server::Generation::Event& event) {
  if (client->over || client->turn != turn) return;
  outcome_.worst_gap = std::max(outcome_.worst_gap, world_.Now() - client->heard);
  if (const auto* end = std::get_if<server::Generation::End>(&event)) return OnEnd(client, end->status);
  if (const auto* token = std::get_if<engine::TokenEvent>(&event)) OnToken(client, *token);
}

void Handover::OnToken(Client* client, const engine::TokenEvent& token) {
  client->heard = world_.Now();
  ++outcome_.tokens;
  if (client->next >= client->expected.size()) return Fail(client->request.id + ": a token after the last");
  const ModelDraw& expected = client->expected[client->next];
  if (token.index != static_cast<int32_t>(client->next))
    return Fail(fmt::format("{}: token {} instead of {}", client->request.id, token.index, client->next));
  if (token.token.token != expected.token || token.finish != expected.finish)
    return Fail(fmt::format("{}: token {} of {} is {} instead of {}", client->request.id, client->next,
                            client->expected.size(), token.token.token, expected.token));
  ++client->next;
}

void Handover::OnEnd(Client* client, const Status& status) {
  client->over = true;
  client->generation = nullptr;
  if (status.ok()) {
    ++outcome_.answered;
    if (client->next != client->expected.size())
      Fail(fmt::format("{}: ended well after {} of {} tokens", client->request.id, client->next,
                       client->expected.size()));
    return;
  }
  ++outcome_.failed;
  if (!Proper(*client, status))
    Fail(fmt::format("{}: {} after {} tokens", client->request.id, status.ToString(), client->next));
}

bool Handover::Proper(const Client& client, const Status& status) const {
  const TimePoint now = world_.Now();
  if (status.code() == absl::StatusCode::kDeadlineExceeded)
    return now >= client.request.deadline &&
           now <= client.request.deadline + kDeadlineSlack + client.gateway->process.frozen_for;
  // A gateway that reaches nobody says so to who has just come.
  const bool alone = lonely_host_ == client.gateway->process.host && client.next == 0;
  if (mild_ && !alone) return false;
  return status.code() == absl::StatusCode::kUnavailable ||
         status.code() == absl::StatusCode::kResourceExhausted;
}

void Handover::OnMessage(Process* from, Process* to) {
  ++outcome_.messages;
  if (strikes_.empty() || outcome_.messages < strikes_.front().message) return;
  if (mild_ &&
      (running_faults_ > 0 || (healed_at_ != TimePoint{} && world_.Now() < healed_at_ + kBetweenMildFaults)))
    return;
  const HandoverStrike strike = strikes_.front();
  strikes_.erase(strikes_.begin());
  Process* const target = strike.sender ? from : to;
  if (target->dead) return;
  Strike(strike.fault, target, strike.sender ? to : from);
}

void Handover::After(Duration wait, std::function<void()> heal) {
  ++running_faults_;
  world_.After(wait, [this, heal = std::move(heal)] {
    heal();
    Healed();
  });
}

void Handover::Healed() {
  --running_faults_;
  healed_at_ = world_.Now();
}

void Handover::Strike(HandoverFault fault, Process* target, Process* other) {
  ++outcome_.faults;
  switch (fault) {
    case HandoverFault::kFreeze:
      target->Freeze();
      return After(Between(300, 8000), [target] {
        if (!target->dead) target->Thaw();
      });
    case HandoverFault::kHole:
    case HandoverFault::kCut: {
      const int a = target->host, b = other->host;
      network_.SetLink(a, b, fault == HandoverFault::kHole ? Link::kHole : Link::kCut);
      return After(Between(100, 8000), [this, a, b] { network_.SetLink(a, b, Link::kUp); });
    }
    case HandoverFault::kHostHole: {
      const int host = lonely_host_ = target->host;
      network_.SetHost(host, Link::kHole);
      return After(Between(100, 8000), [this, host] { network_.SetHost(host, Link::kUp); });
    }
    case HandoverFault::kKill:
    case HandoverFault::kStall:
    case HandoverFault::kDrain:
      break;
  }
  for (const auto& worker : cluster_.workers) {
    if (&worker->process == target) return StrikeWorker(fault, worker.get());
  }
  for (const auto& gateway : cluster_.gateways) {
    if (&gateway->process == target) return KillGateway(gateway.get());
  }
}

void Handover::StrikeWorker(HandoverFault fault, ModelWorker* worker) {
  switch (fault) {
    case HandoverFault::kStall:
      worker->Stall();
      return After(Between(100, 5000), [worker] { worker->GoOn(); });
    case HandoverFault::kDrain:
      ++running_faults_;
      worker->context.draining = true;
      world_.After(kGrace, [worker] { worker->AbortAll("the worker is shutting down"); });
      return AwaitDrained(worker, world_.Now());
    default:
      return KillWorker(worker);
  }
}

// A process that drains ends when it holds nothing, and not before.
void Handover::AwaitDrained(ModelWorker* worker, TimePoint since) {
  if (!worker->process.dead &&
      (!worker->Left().empty() || world_.Now() < since + kGrace + milliseconds(50))) {
    world_.After(milliseconds(50), [this, worker, since] { AwaitDrained(worker, since); });
    return;
  }
  if (!worker->process.dead) KillWorker(worker);
  Healed();
}

void Handover::KillWorker(ModelWorker* worker) {
  worker->Die();
  After(Between(50, 3000), [this, worker] {
    if (cluster_.current[worker->process.address] != worker) return;
    cluster_.StartWorker(worker->process.address, worker->process.host, next_epoch_++, worker->role,
                         worker->pages);
  });
}

void Handover::KillGateway(ModelGateway* gateway) {
  gateway->Die();
  for (const auto& one : clients_) {
    Client* const client = one.get();
    if (client->gateway != gateway || client->over) continue;
    ++client->turn;  // nothing that it still says counts
    ++outcome_.asked_again;
    world_.After(Between(1, 20), [this, client] { Ask(client); });
  }
  After(Between(50, 3000),
        [this, gateway] { cluster_.StartGateway(gateway->process.address, gateway->process.host); });
}

bool Handover::AllOver() const {
  return running_faults_ == 0 &&
         std::all_of(clients_.begin(), clients_.end(), [](const auto& client) { return client->over; });
}

std::string Handover::Left() const {
  for (const auto& worker : cluster_.workers) {
    if (const std::string left = worker->Left(); !left.empty())
      return fmt::format("{} (epoch {}{}) holds {}", worker->process.address, worker->process.epoch,
                         worker->process.dead ? ", dead" : "", left);
  }
  for (const auto& gateway : cluster_.gateways) {
    if (gateway->in_flight.generations() > 0)
      return fmt::format("{}{} has {} generations", gateway->process.address,
                         gateway->process.dead ? " (dead)" : "", gateway->in_flight.generations());
  }
  return "";
}

HandoverOutcome Handover::Run() {
  healed_at_ = TimePoint{};
  TimePoint over_at = kNoDeadline;
  while (outcome_.violation.empty()) {
    // Between two looks at how far it is.
    const TimePoint look = world_.Now() + milliseconds(50);
    while (outcome_.violation.empty() && world_.Step(look)) {
    }
    const TimePoint now = world_.Now();
    if (!AllOver()) {
      const TimePoint since = std::max(healed_at_, TimePoint(std::chrono::seconds(4)));
      if (running_faults_ > 0 && now < since + std::chrono::minutes(2)) continue;
      if (now < since + kAnsweredWithin) continue;
      for (const auto& client : clients_) {
        if (!client->over)
          Fail(fmt::format("{} has had no end yet, {} of {} tokens came", client->request.id, client->next,
                           client->expected.size()));
      }
      Fail("a fault does not end");
    } else if (over_at == kNoDeadline) {
      over_at = now;
      strikes_.clear();
    } else if (Left().empty()) {
      break;
    } else if (now > over_at + kReleasedWithin) {
      Fail(Left());
    }
  }
  for (const auto& client : clients_) client->generation = nullptr;
  outcome_.events = world_.steps();
  outcome_.continued = cluster_.continued;
  return outcome_;
}

}  // namespace

HandoverOutcome RunHandover(const HandoverPlan& plan) {
  auto run = std::make_unique<Handover>(plan);
  HandoverOutcome outcome = run->Run();
  // Calls with open tickets must not be destroyed; the process has a few of these at most.
  if (!outcome.violation.empty()) static_cast<void>(run.release());
  return outcome;
}

}  // namespace millrace::sim
