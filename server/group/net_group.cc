#include "server/group/net_group.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <boost/asio/connect.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "base/check.h"
#include "base/log.h"
#include "base/random.h"
#include "base/thread.h"
#include "server/group/members.h"
#include "server/group/rank_link.h"
#include "transfer/transfer.h"

namespace millrace::server {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using engine::ControlHeader;
using engine::GroupShape;
using engine::RankBit;
using engine::RankMask;
using engine::RankMemory;
using engine::Shown;

constexpr uint32_t kVersion = 1;
constexpr auto kBeatEvery = std::chrono::milliseconds(100);
constexpr Duration kLoadsEvery = std::chrono::seconds(1);
constexpr int kForeignBeatsMax = 20;

// A rank's own memory, or the copy of another rank's.
class HeapMemory final : public RankMemory {
 public:
  static StatusOr<std::shared_ptr<HeapMemory>> Make(const GroupShape& shape, int32_t homes,
                                                    uint64_t incarnation) {
    std::shared_ptr<HeapMemory> memory(new HeapMemory(shape, homes));
    void* const data =
        mmap(nullptr, memory->bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) {
      return ResourceExhausted("no room for {} bytes that the ranks of a group exchange", memory->bytes());
    }
    memory->data_ = static_cast<std::byte*>(data);
    engine::RankHeader& header = *new (data) engine::RankHeader();
    header.layout = LayoutOf(shape);
    header.incarnation = incarnation;
    return memory;
  }
  ~HeapMemory() override {
    if (data_ != nullptr) munmap(data_, bytes());
  }
  bool OwnerLives() const override { return lives_.load(); }
  void OwnerIsLost() { lives_.store(false); }
  std::span<std::byte> all() const { return {data(), bytes()}; }

 private:
  HeapMemory(const GroupShape& shape, int32_t homes) : RankMemory(shape, homes) {}

  std::atomic<bool> lives_{true};
};

class NetFabric final : public engine::GroupFabric {
 public:
  NetFabric(const engine::RankGroupOptions& options, const NetGroupOptions& net)
      : rank_(options.rank),
        shape_(options.shape),
        stall_max_(options.stall_max),
        net_(net),
        acceptor_(io_),
        timer_(io_),
        resolver_(io_),
        belief_(options.rank, options.shape.num_ranks),
        peers_(static_cast<size_t>(options.shape.num_ranks)) {}

  ~NetFabric() override;
  Status Listen();

  RankMemory& own() override { return *own_; }
  ControlHeader& control() override { return control_; }

  Status Enter() override {
    thread_ = std::thread([this] {
      SetThreadName("group-links");
      io_.run();
    });
    return OkStatus();
  }
  StatusOr<bool> Formed() override {
    const std::lock_guard lock(mutex_);
    MR_RETURN_IF_ERROR(refused_);
    return belief_.member();
  }
  RankMask present() override {
    const std::lock_guard lock(mutex_);
    return Linked() | RankBit(rank_);
  }
  StatusOr<std::shared_ptr<const RankMemory>> Open(int32_t rank) override;
  void Settle() override;
  void Show(RankMask peers, Shown what) override;
  void Remove(int32_t rank, uint32_t epoch, const char* reason) override;
  void Ring() override {
    control_.bell.fetch_add(1);
    engine::WakeAllOnWord(&control_.bell);
  }

 private:
  // How far this rank has come, to be told to another one once what it shows is there; in order.
  struct Telling {
    group::GroupMessage message;
    bool landed = false;
  };
  struct Peer {
    std::shared_ptr<RankLink> link;
    uint64_t incarnation = 0;
    std::shared_ptr<HeapMemory> copy;  // of its memory
    transfer::RegionId region = 0;     // the copy's
    transfer::TicketId ticket = 0;     // its permission to write there
    transfer::PeerId transfer = 0;
    bool granted = false;  // and so linked: the next two are known
    transfer::TicketId their_ticket = 0;
    transfer::RegionId their_region = 0;
    std::deque<std::shared_ptr<Telling>> telling;
    int64_t under_way = 0;  // requests whose end has not been told
    uint64_t held_told = ~uint64_t{0};
    std::vector<uint64_t> loads_told;
    TimePoint loads_told_at;
    uint64_t target_told = 0;
    RankMask links = 0;  // as it says
    bool member = false;
    int foreign_beats = 0;  // that said that it is a member, while this one does not believe that
  };

  size_t Cells() const {
    return static_cast<size_t>(shape_.num_layers) * static_cast<size_t>(shape_.num_experts);
  }
  Peer& PeerOf(int32_t rank) { return peers_[static_cast<size_t>(rank)]; }
  template <typename F>
  void ForEach(RankMask ranks, F&& f) {
    for (RankMask left = ranks & ~RankBit(rank_); left != 0; left &= left - 1) f(std::countr_zero(left));
  }

  // Thread of io_.
  void Accept();
  void Dial(int32_t rank);
  void Greet(tcp::socket socket, int32_t dialled);
  Status Meet(const std::shared_ptr<RankLink>& link, int32_t dialled, const group::GroupHello& hello,
              int32_t* rank);
  StatusOr<Peer> MakePeer(const group::GroupHello& hello);
  void OnMessage(int32_t rank, const group::GroupMessage& message);
  void OnGrant(int32_t rank, const group::GroupGrant& grant);
  void OnAt(int32_t rank, const group::GroupAt& at);
  void OnBeat(int32_t rank, const group::GroupBeat& beat);
  void OnTarget(int32_t rank, const group::GroupTarget& target);
  void Beat();

  // With mutex_.
  Status MayMeet(int32_t rank, const group::GroupHello& hello);
  RankMask Linked() const;
  void Lose(int32_t rank, const std::string& why);
  void Unlink(int32_t rank, const std::string& why);
  void Tell(const Members& before, const std::string& why);
  group::GroupMembers Belief() const;
  group::GroupMessage Saying(Peer& peer, Shown what);
  std::vector<transfer::Intent> Pieces(int32_t rank, Shown what) const;
  void Flush(Peer& peer);
  void TryToForm();
  void CopyHeld(Peer& peer, const std::string& held, uint64_t version);

  const int32_t rank_;
  const GroupShape shape_;
  const Duration stall_max_;
  const NetGroupOptions net_;
  std::unique_ptr<transfer::Transfer> transfer_;
  std::shared_ptr<HeapMemory> own_;
  transfer::RegionId own_region_ = 0;
  ControlHeader control_{};

  asio::io_context io_;
  tcp::acceptor acceptor_;
  asio::steady_timer timer_;
  tcp::resolver resolver_;
  std::thread thread_;
  RankMask dialling_ = 0;  // thread of io_

  std::mutex mutex_;
  MembersBelief belief_;
  std::vector<Peer> peers_;
  Status refused_;
  std::condition_variable landed_;  // a peer's under_way has changed
  bool stopping_ = false;
};

Status NetFabric::Listen() {
  MR_ASSIGN_OR_RETURN(own_, HeapMemory::Make(shape_, shape_.num_ranks, RandomId()));
  transfer::Options options;
  options.listen = net_.rails;
  options.name = "experts";
  options.metrics = net_.metrics;
  MR_ASSIGN_OR_RETURN(transfer_, transfer::Transfer::Create(options));
  MR_ASSIGN_OR_RETURN(own_region_, transfer_->Register(own_->all(), /*writable=*/false));
  control_.incarnations[rank_].store(own_->header().incarnation);
  MR_ASSIGN_OR_RETURN(const std::vector<HostPort> addresses, Resolve(net_.listen));
  if (addresses.empty()) return Unavailable("{}: no such address", net_.listen.ToString());
  boost::system::error_code error;
  const tcp::endpoint endpoint(asio::ip::make_address(addresses.front().host, error), net_.listen.port);
  if (!error) acceptor_.open(endpoint.protocol(), error);
  if (!error) acceptor_.set_option(tcp::acceptor::reuse_address(true), error);
  if (!error) acceptor_.bind(endpoint, error);
  if (!error) acceptor_.listen(asio::socket_base::max_listen_connections, error);
  if (error)
    return Unavailable("rank {} cannot listen on {}: {}", rank_, net_.listen.ToString(), error.message());
  Accept();
  asio::post(io_, [this] { Beat(); });
  return OkStatus();
}

NetFabric::~NetFabric() {
  Settle();
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  asio::post(io_, [this] {
    boost::system::error_code ignored;
    acceptor_.close(ignored);
    timer_.cancel();
    resolver_.cancel();
    const std::lock_guard lock(mutex_);
    for (int32_t rank = 0; rank < shape_.num_ranks; ++rank) {
      if (PeerOf(rank).link != nullptr) Unlink(rank, "this rank ends");
    }
  });
  if (thread_.joinable()) thread_.join();  // copies are closed there
  transfer_.reset();                       // nothing lands from here on
}

RankMask NetFabric::Linked() const {
  RankMask linked = 0;
  for (size_t rank = 0; rank < peers_.size(); ++rank) {
    if (peers_[rank].granted) linked |= RankBit(static_cast<int32_t>(rank));
  }
  return linked;
}

// --- connections

void NetFabric::Accept() {
  acceptor_.async_accept([this](const boost::system::error_code& error, tcp::socket socket) {
    if (error == asio::error::operation_aborted || !acceptor_.is_open()) return;
    if (!error) Greet(std::move(socket), -1);
    Accept();
  });
}

void NetFabric::Dial(int32_t rank) {
  dialling_ |= RankBit(rank);
  const HostPort& address = net_.peers[static_cast<size_t>(rank)];
  const auto failed = [this, rank] { dialling_ &= ~RankBit(rank); };
  resolver_.async_resolve(
      address.host, std::to_string(address.port),
      [this, rank, failed](const boost::system::error_code& error, const tcp::resolver::results_type& found) {
        if (error) return failed();
        auto socket = std::make_shared<tcp::socket>(io_);
        // A host that is not there must not hold up what comes back at another address.
        auto limit = std::make_shared<asio::steady_timer>(io_, std::chrono::seconds(1));
        limit->async_wait([socket](const boost::system::error_code& cancelled) {
          boost::system::error_code ignored;
          if (!cancelled) socket->close(ignored);
        });
        asio::async_connect(*socket, found,
                            [this, rank, failed, socket, limit](const boost::system::error_code& refused,
                                                                const tcp::endpoint&) {
                              limit->cancel();
                              failed();
                              if (!refused && socket->is_open()) Greet(std::move(*socket), rank);
                            });
      });
}

// Both sides say who they are; the first message of the other one decides whether it stays.
void NetFabric::Greet(tcp::socket socket, int32_t dialled) {
  const auto link = std::make_shared<RankLink>(std::move(socket));
  const auto rank = std::make_shared<int32_t>(-1);
  link->Start(
      [this, weak = std::weak_ptr(link), dialled, rank](const group::GroupMessage& message) {
        const std::shared_ptr<RankLink> self = weak.lock();
        if (*rank >= 0) return OnMessage(*rank, message);
        const Status status = message.has_hello() ? Meet(self, dialled, message.hello(), rank.get())
                                                  : InvalidArgument("a message before the greeting");
        if (!status.ok()) self->Close(std::string(Message(status)));
      },
      [this, raw = link.get(), rank](const std::string& why) {
        const std::lock_guard lock(mutex_);
        if (*rank < 0) {
          if (!stopping_) LogDebug("expert group: a connection was not taken: {}", why);
        } else if (PeerOf(*rank).link.get() == raw) {
          Lose(*rank, "the connection to it ended: " + why);
        }
      });
  group::GroupMessage message;
  group::GroupHello& hello = *message.mutable_hello();
  hello.set_version(kVersion);
  hello.set_rank(static_cast<uint32_t>(rank_));
  hello.set_layout(own_->header().layout);
  hello.set_incarnation(own_->header().incarnation);
  hello.set_transfer(transfer_->Descriptor());
  hello.set_transfer_epoch(transfer_->epoch());
  {
    const std::lock_guard lock(mutex_);
    *hello.mutable_members() = Belief();
  }
  link->Send(message);
}

// Not OK: the connection is given up. The other side dials again.
Status NetFabric::Meet(const std::shared_ptr<RankLink>& link, int32_t dialled, const group::GroupHello& hello,
                       int32_t* rank) {
  const auto theirs = static_cast<int32_t>(std::min<uint32_t>(hello.rank(), INT32_MAX));
  if (hello.version() != kVersion) return InvalidArgument("version {} of the protocol", hello.version());
  if (theirs >= shape_.num_ranks || theirs == rank_ || (dialled >= 0 ? theirs != dialled : theirs < rank_)) {
    return InvalidArgument("rank {} is not expected there", hello.rank());
  }
  {
    const std::lock_guard lock(mutex_);
    MR_RETURN_IF_ERROR(MayMeet(theirs, hello));
  }
  // Without the lock: the transfer engine's thread may wait for that in a callback.
  MR_ASSIGN_OR_RETURN(Peer peer, MakePeer(hello));
  peer.link = link;
  const std::lock_guard lock(mutex_);
  *rank = theirs;
  PeerOf(theirs) = std::move(peer);
  group::GroupMessage message;
  group::GroupGrant& grant = *message.mutable_grant();
  grant.set_ticket(PeerOf(theirs).ticket);
  grant.set_region(PeerOf(theirs).region);
  grant.set_held_version(own_->header().held_version.load());
  grant.set_held(own_->held(), Cells());
  link->Send(message);
  return OkStatus();
}

Status NetFabric::MayMeet(int32_t rank, const group::GroupHello& hello) {
  if (stopping_ || belief_.cast_out()) return Cancelled("this rank ends");
  if (hello.layout() != own_->header().layout) {
    const Status mismatch = FailedPrecondition(
        "rank {} serves another model, or with another weight format, instruction set, batch size or number "
        "of "
        "ranks",
        rank);
    LogWarning("expert group: {}", Message(mismatch));
    if (!belief_.member() && (hello.members().formed() || rank < rank_)) refused_ = mismatch;
    return mismatch;
  }
  if (PeerOf(rank).link != nullptr) Lose(rank, "it has connected anew");
  if (belief_.member() && hello.members().formed()) {
    // Each of the two has gone on without the other. That can only be once both know it.
    const Members other{hello.members().epoch(), hello.members().alive()};
    if (!belief_.Has(rank) && (other.alive & RankBit(rank_)) == 0 && belief_.GivesWayTo(other)) {
      const Members before = belief_.now();
      belief_.CastOut();
      Tell(before, fmt::format("rank {} belongs to a better part of the group, which was cut in two", rank));
    }
    return FailedPrecondition("rank {} belongs to another part of the group", rank);
  }
  return OkStatus();
}

StatusOr<NetFabric::Peer> NetFabric::MakePeer(const group::GroupHello& hello) {
  Peer peer;
  MR_ASSIGN_OR_RETURN(peer.copy, HeapMemory::Make(shape_, 1, hello.incarnation()));
  MR_ASSIGN_OR_RETURN(peer.transfer, transfer_->Open(hello.transfer()));
  MR_ASSIGN_OR_RETURN(peer.region, transfer_->Register(peer.copy->all(), /*writable=*/true));
  const StatusOr<transfer::TicketId> ticket =
      transfer_->OpenTicket(hello.transfer_epoch(), {{peer.region, 0, peer.copy->bytes()}});
  if (!ticket.ok()) {
    transfer_->Deregister(peer.region).IgnoreError();
    return ticket.status();
  }
  peer.incarnation = hello.incarnation();
  peer.ticket = *ticket;
  peer.member = hello.members().formed();
  return peer;
}

// Ends what this rank and that one share. Its copy stays until nothing can land in it and nobody reads it.
void NetFabric::Unlink(int32_t rank, const std::string& why) {
  Peer& peer = PeerOf(rank);
  peer.copy->OwnerIsLost();
  peer.link->Close(why);
  if (peer.granted) transfer_->Cancel(peer.transfer, peer.their_ticket, [] {});
  // The loop goes on until that has happened.
  transfer_->CloseTicket(peer.ticket, [this, copy = peer.copy, region = peer.region,
                                       work = asio::make_work_guard(io_)]() mutable {
    asio::post(io_, [this, copy = std::move(copy), region, work = std::move(work)] {
      if (const Status status = transfer_->Deregister(region); !status.ok()) {
        LogError("expert group: {}", Message(status));
      }
    });
  });
  peer = Peer();
  landed_.notify_all();
}

void NetFabric::Lose(int32_t rank, const std::string& why) {
  Unlink(rank, why);
  const Members before = belief_.now();
  if (belief_.Lost(rank)) Tell(before, why);
}

// --- membership

group::GroupMembers NetFabric::Belief() const {
  group::GroupMembers members;
  members.set_formed(belief_.member());
  members.set_epoch(belief_.now().epoch);
  members.set_alive(static_cast<uint32_t>(belief_.now().alive));
  return members;
}

// Takes a changed belief: for this process, and for all that can be reached.
void NetFabric::Tell(const Members& before, const std::string& why) {
  const Members now = belief_.now();
  ForEach(now.alive, [&](int32_t rank) { control_.incarnations[rank].store(PeerOf(rank).incarnation); });
  control_.state.store(engine::MakeState(now.epoch, now.alive));
  group::GroupMessage message;
  *message.mutable_members() = Belief();
  message.mutable_members()->set_formed(true);  // also of a rank that says that it goes
  const RankMask gone = before.alive & ~now.alive;
  ForEach(Linked(), [&](int32_t rank) { PeerOf(rank).link->Send(message); });
  for (RankMask left = gone; left != 0; left &= left - 1) {
    const int32_t rank = std::countr_zero(left);
    if (!why.empty()) LogWarning("expert group: rank {} is out: {}; epoch {}", rank, why, now.epoch);
    if (rank != rank_ && PeerOf(rank).link != nullptr) Unlink(rank, "it was cast out");
  }
  Ring();
}

void NetFabric::Remove(int32_t rank, uint32_t epoch, const char* reason) {
  const std::lock_guard lock(mutex_);
  const Members before = belief_.now();
  if (!belief_.member() || before.epoch != epoch || (before.alive & RankBit(rank)) == 0) return;
  if (rank == rank_) {
    belief_.CastOut();
  } else {
    belief_.Lost(rank);
  }
  Tell(before, reason == nullptr ? "" : reason);
}

// --- messages

void NetFabric::OnMessage(int32_t rank, const group::GroupMessage& message) {
  const std::lock_guard lock(mutex_);
  if (PeerOf(rank).link == nullptr) return;  // lost meanwhile
  switch (message.body_case()) {
    case group::GroupMessage::kGrant:
      return OnGrant(rank, message.grant());
    case group::GroupMessage::kAt:
      return OnAt(rank, message.at());
    case group::GroupMessage::kBeat:
      return OnBeat(rank, message.beat());
    case group::GroupMessage::kTarget:
      return OnTarget(rank, message.target());
    case group::GroupMessage::kMembers: {
      const Members before = belief_.now();
      if (belief_.Heard(rank, {message.members().epoch(), message.members().alive()}, Linked()))
        Tell(before, fmt::format("rank {} says so", rank));
      return;
    }
    default:
      return PeerOf(rank).link->Close("a message that nobody expects");
  }
}

void NetFabric::OnGrant(int32_t rank, const group::GroupGrant& grant) {
  Peer& peer = PeerOf(rank);
  peer.their_ticket = grant.ticket();
  peer.their_region = grant.region();
  CopyHeld(peer, grant.held(), grant.held_version());
  peer.granted = true;
  if (belief_.member()) {
    group::GroupMessage message;
    *message.mutable_members() = Belief();
    peer.link->Send(message);
  }
}

void NetFabric::CopyHeld(Peer& peer, const std::string& held, uint64_t version) {
  if (held.size() != Cells()) return peer.link->Close("what it holds does not fit the model");
  for (size_t i = 0; i < held.size(); ++i)
    engine::Put(peer.copy->held()[i], static_cast<uint8_t>(held[i] != 0));
  peer.copy->header().held_version.store(version);
}

void NetFabric::OnAt(int32_t rank, const group::GroupAt& at) {
  if (Members{at.epoch(), at.alive()} != belief_.now()) return;  // of a time that is over
  Peer& peer = PeerOf(rank);
  engine::RankHeader& header = peer.copy->header();
  if (at.has_wish()) {
    if (!at.wish().held().empty()) CopyHeld(peer, at.wish().held(), at.wish().held_version());
    header.wanted.store(static_cast<int32_t>(at.wish().kind()), std::memory_order_relaxed);
    header.wanted_mtp.store(at.wish().mtp() ? 1 : 0, std::memory_order_relaxed);
  } else if (at.shown_case() == group::GroupAt::kNumRows) {
    header.num_rows.store(static_cast<int32_t>(std::min<uint32_t>(at.num_rows(), INT32_MAX)),
                          std::memory_order_relaxed);
  }
  header.at.store(engine::MakeAt(at.epoch(), at.step()));
  if (own_->header().sleeping.load() != 0) engine::WakeAllOnWord(&header.at);
  if (own_->header().idle.load() != 0) Ring();
}

void NetFabric::OnBeat(int32_t rank, const group::GroupBeat& beat) {
  Peer& peer = PeerOf(rank);
  peer.copy->header().beat.store(beat.beat());
  peer.links = beat.linked();
  peer.member = beat.formed();
  if (static_cast<size_t>(beat.loads_size()) == Cells()) {
    for (int i = 0; i < beat.loads_size(); ++i) engine::Put(peer.copy->loads()[i], uint64_t{beat.loads(i)});
  }
  if (peer.member) {
    // Two that joined by different parts of a group while they were connected.
    const bool foreign = belief_.member() && !belief_.Has(rank);
    peer.foreign_beats = foreign ? peer.foreign_beats + 1 : 0;
    if (peer.foreign_beats > kForeignBeatsMax) Lose(rank, "it belongs to another part of the group");
    return;
  }
  const Members before = belief_.now();
  if (!peer.granted || !belief_.Asked(rank, beat.linked())) return;
  LogInfo("expert group: rank {} is in; epoch {}", rank, belief_.now().epoch);
  Tell(before, "");
}

void NetFabric::TryToForm() {
  RankMask unformed = 0;
  ForEach(Linked(), [&](int32_t rank) {
    const RankMask others = (RankBit(shape_.num_ranks) - 1) & ~RankBit(rank);
    if (!PeerOf(rank).member && (others & ~PeerOf(rank).links) == 0) unformed |= RankBit(rank);
  });
  const Members before = belief_.now();
  if (belief_.Form(unformed)) Tell(before, "");
}

void NetFabric::OnTarget(int32_t rank, const group::GroupTarget& target) {
  if (static_cast<size_t>(target.target_size()) != Cells()) return;
  engine::RankHeader& header = PeerOf(rank).copy->header();
  header.target_version.fetch_add(1);
  header.target_epoch.store(target.epoch());
  for (int i = 0; i < target.target_size(); ++i) {
    engine::Put(PeerOf(rank).copy->target()[i], RankMask{target.target(i)});
  }
  header.target_version.fetch_add(1);
}

// Ten times a second: signs of life, what changes slowly, and another try to reach who is not there.
void NetFabric::Beat() {
  const TimePoint now = Clock::System().Now();
  RankMask away = 0;
  {
    const std::lock_guard lock(mutex_);
    if (stopping_ || belief_.cast_out()) return;
    TryToForm();
    for (int32_t rank = 0; rank < rank_; ++rank) {
      if (PeerOf(rank).link == nullptr) away |= RankBit(rank);
    }
    std::vector<uint64_t> loads(Cells());
    for (size_t i = 0; i < loads.size(); ++i) loads[i] = engine::Get(own_->loads()[i]);
    const uint64_t target = own_->header().target_version.load();
    ForEach(Linked(), [&](int32_t rank) {
      Peer& peer = PeerOf(rank);
      group::GroupMessage message;
      group::GroupBeat& beat = *message.mutable_beat();
      beat.set_beat(own_->header().beat.load());
      beat.set_formed(belief_.member());
      beat.set_linked(static_cast<uint32_t>(Linked() | RankBit(rank_)));
      if (loads != peer.loads_told && now - peer.loads_told_at >= kLoadsEvery) {
        beat.mutable_loads()->Assign(loads.begin(), loads.end());
        peer.loads_told = loads;
        peer.loads_told_at = now;
      }
      peer.link->Send(message);
      if (target % 2 != 0 || target == peer.target_told) return;
      group::GroupTarget& told = *message.mutable_target();
      told.set_epoch(own_->header().target_epoch.load());
      for (size_t i = 0; i < Cells(); ++i) {
        told.add_target(static_cast<uint32_t>(engine::Get(own_->target()[i])));
      }
      if (own_->header().target_version.load() != target) return;  // it is being written
      peer.target_told = target;
      peer.link->Send(message);
    });
  }
  ForEach(away & ~dialling_, [&](int32_t rank) { Dial(rank); });
  timer_.expires_after(kBeatEvery);
  timer_.async_wait([this](const boost::system::error_code& error) {
    if (!error) Beat();
  });
}

// --- exchanges

StatusOr<std::shared_ptr<const RankMemory>> NetFabric::Open(int32_t rank) {
  const std::lock_guard lock(mutex_);
  const Peer& peer = PeerOf(rank);
  if (!peer.granted || peer.incarnation != control_.incarnations[rank].load())
    return Unavailable("rank {} has just been lost", rank);
  return std::shared_ptr<const RankMemory>(peer.copy);
}

// What is on its way to a rank that was lost does not count: nobody will be told that it is there.
void NetFabric::Settle() {
  std::unique_lock lock(mutex_);
  ForEach(Linked(), [&](int32_t rank) {
    Peer& peer = PeerOf(rank);
    if (peer.under_way > 0) transfer_->Cancel(peer.transfer, peer.their_ticket, [] {});
    peer.telling.clear();
  });
  landed_.wait(lock, [&] {
    return std::all_of(peers_.begin(), peers_.end(), [](const Peer& peer) { return peer.under_way == 0; });
  });
}

group::GroupMessage NetFabric::Saying(Peer& peer, Shown what) {
  const engine::RankHeader& header = own_->header();
  const uint64_t position = header.at.load();
  group::GroupMessage message;
  group::GroupAt& at = *message.mutable_at();
  at.set_epoch(belief_.now().epoch);
  at.set_alive(static_cast<uint32_t>(belief_.now().alive));
  at.set_step(position & ((uint64_t{1} << engine::kStepBits) - 1));
  if (what == Shown::kWish) {
    group::GroupAt::Wish& wish = *at.mutable_wish();
    wish.set_kind(static_cast<uint32_t>(header.wanted.load()));
    wish.set_mtp(header.wanted_mtp.load() != 0);
    const uint64_t version = header.held_version.load();
    if (peer.held_told != version) {
      wish.set_held_version(version);
      wish.set_held(own_->held(), Cells());
      peer.held_told = version;
    }
  } else if (what == Shown::kRows) {
    at.set_num_rows(static_cast<uint32_t>(header.num_rows.load()));
  }
  return message;
}

// What that rank needs of this exchange: the rows that it computes, once each, or its products.
std::vector<transfer::Intent> NetFabric::Pieces(int32_t rank, Shown what) const {
  std::vector<transfer::Intent> pieces;
  const transfer::RegionId there = peers_[static_cast<size_t>(rank)].their_region;
  const auto add = [&](const void* from, size_t to, size_t bytes) {
    pieces.push_back(
        {.local = {own_region_, own_->OffsetOf(from), bytes}, .remote_region = there, .remote_offset = to});
  };
  const auto top_k = static_cast<size_t>(shape_.experts_per_token);
  if (what == Shown::kProducts) {
    const RankMemory& copy = *peers_[static_cast<size_t>(rank)].copy;
    const auto rows = static_cast<size_t>(std::clamp(copy.header().num_rows.load(), 0, shape_.rows_max));
    const auto mine = static_cast<size_t>(
        std::count(copy.owners(), copy.owners() + rows * top_k, static_cast<uint8_t>(rank_)));
    const size_t bytes = mine * static_cast<size_t>(shape_.hidden_size) * sizeof(float);
    if (bytes > 0) add(own_->products(rank), copy.OffsetOf(copy.products(rank_)), bytes);
    return pieces;
  }
  if (what != Shown::kRows) return pieces;
  const auto rows = static_cast<size_t>(own_->header().num_rows.load());
  const auto wants = [&](size_t row) {
    const uint8_t* const owners = own_->owners() + row * top_k;
    return std::find(owners, owners + top_k, static_cast<uint8_t>(rank)) != owners + top_k;
  };
  for (size_t row = 0; row < rows; ++row) {
    if (!wants(row)) continue;
    const size_t first = row;
    while (row + 1 < rows && wants(row + 1)) ++row;
    const std::byte* const from = own_->rows() + first * shape_.row_bytes;
    add(from, own_->OffsetOf(from), (row + 1 - first) * shape_.row_bytes);
  }
  if (pieces.empty()) return pieces;
  add(own_->experts(), own_->OffsetOf(own_->experts()), rows * top_k * sizeof(int32_t));
  add(own_->owners(), own_->OffsetOf(own_->owners()), rows * top_k);
  return pieces;
}

void NetFabric::Show(RankMask ranks, Shown what) {
  const std::lock_guard lock(mutex_);
  const uint32_t epoch = belief_.now().epoch;
  // The belief has changed under this pass: every wait of it ends.
  if (!engine::SameEpoch(own_->header().at.load(), engine::MakeAt(epoch, 0))) return;
  ForEach(ranks & belief_.now().alive & Linked(), [&](int32_t rank) {
    Peer& peer = PeerOf(rank);
    auto telling = std::make_shared<Telling>();
    telling->message = Saying(peer, what);
    transfer::Request request;
    request.intents = Pieces(rank, what);
    request.ticket = peer.their_ticket;
    request.deadline = Clock::System().Now() + stall_max_;
    if (request.intents.empty()) {
      // Nothing for that rank: as if there were no rows.
      if (what == Shown::kRows) telling->message.mutable_at()->set_num_rows(0);
      telling->landed = true;
    }
    peer.telling.push_back(telling);
    if (telling->landed) return Flush(peer);
    ++peer.under_way;
    const Status status = transfer_->Submit(
        peer.transfer, std::move(request),
        [this, rank, epoch, telling, link = std::weak_ptr(peer.link)](const Status& landed) {
          {
            const std::lock_guard done(mutex_);
            Peer& to = PeerOf(rank);
            if (to.link == nullptr || to.link != link.lock()) return;  // lost meanwhile
            --to.under_way;
            landed_.notify_all();
            if (landed.ok()) {
              telling->landed = true;
              return Flush(to);
            }
          }
          if (!landed.ok() && !absl::IsCancelled(landed))
            Remove(rank, epoch, fmt::format("rows did not get there: {}", Message(landed)).c_str());
        });
    if (!status.ok()) {
      --peer.under_way;
      peer.link->Close(fmt::format("rows cannot be sent: {}", Message(status)));
    }
  });
}

void NetFabric::Flush(Peer& peer) {
  for (; !peer.telling.empty() && peer.telling.front()->landed; peer.telling.pop_front()) {
    peer.link->Send(peer.telling.front()->message);
  }
}

}  // namespace

StatusOr<std::unique_ptr<engine::ExpertGroup>> JoinNetGroup(const engine::RankGroupOptions& options,
                                                            const NetGroupOptions& net) {
  MR_RETURN_IF_ERROR(CheckRank(options));
  MR_CHECK(net.peers.size() == static_cast<size_t>(options.shape.num_ranks));
  auto fabric = std::make_unique<NetFabric>(options, net);
  MR_RETURN_IF_ERROR(fabric->Listen());
  return engine::JoinGroup(options, std::move(fabric));
}

}  // namespace millrace::server
