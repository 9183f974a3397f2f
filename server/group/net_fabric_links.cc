#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <boost/asio/connect.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/post.hpp>

#include "base/log.h"
#include "base/random.h"
#include "base/thread.h"
#include "server/group/net_fabric.h"

namespace millrace::server {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using engine::GroupShape;
using engine::RankBit;
using engine::RankMask;

constexpr uint32_t kVersion = 2;
constexpr auto kBeatEvery = std::chrono::milliseconds(100);
constexpr Duration kLoadsEvery = std::chrono::seconds(1);
constexpr Duration kSilenceMax = std::chrono::seconds(5);
constexpr Duration kMeetMax = std::chrono::seconds(1);  // to connect
// A link on which nothing is heard or acknowledged for this long goes on over another connection. Attempts
// come one after the other and get kTryMax each: with the usual heartbeat_max of 2 s up to five ways are
// tried.
constexpr Duration kQuietMax = std::chrono::milliseconds(500);
constexpr Duration kTryMax = std::chrono::milliseconds(300);
constexpr int kForeignBeatsMax = 20;
constexpr int kWaysMax = 16;
constexpr size_t kEarlyMax = 16;

}  // namespace

StatusOr<std::shared_ptr<HeapMemory>> HeapMemory::Make(const GroupShape& shape, int32_t homes,
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

HeapMemory::~HeapMemory() {
  if (data_ != nullptr) munmap(data_, bytes());
}

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
  const auto main = asio::ip::make_address(addresses.front().host, error);
  const Status listens = error ? Unavailable("{}", error.message()) : ListenAt({main, net_.listen.port});
  if (!listens.ok())
    return Unavailable("rank {} cannot listen on {}: {}", rank_, net_.listen.ToString(), Message(listens));
  // More ways for the others' links, where a rail has an address of its own.
  std::vector<asio::ip::address> taken = {main};
  for (const std::string& rail : net_.rails) {
    const StatusOr<HostPort> parsed = ParseHostPort(rail);
    if (!parsed.ok()) continue;
    const auto address = asio::ip::make_address(parsed->host, error);
    if (error || address.is_unspecified() || std::find(taken.begin(), taken.end(), address) != taken.end())
      continue;
    taken.push_back(address);
    MR_RETURN_IF_ERROR(ListenAt({address, 0}));
  }
  for (tcp::acceptor& acceptor : acceptors_) Accept(acceptor);
  asio::post(io_, [this] { Beat(); });
  return OkStatus();
}

Status NetFabric::ListenAt(const tcp::endpoint& endpoint) {
  boost::system::error_code error;
  tcp::acceptor& acceptor = acceptors_.emplace_back(io_);
  acceptor.open(endpoint.protocol(), error);
  if (!error) acceptor.set_option(tcp::acceptor::reuse_address(true), error);
  if (!error) acceptor.bind(endpoint, error);
  if (!error) acceptor.listen(asio::socket_base::max_listen_connections, error);
  return error ? Unavailable("{}: {}", endpoint.address().to_string(), error.message()) : OkStatus();
}

Status NetFabric::Enter() {
  thread_ = std::thread([this] {
    SetThreadName("group-links");
    io_.run();
  });
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
    for (tcp::acceptor& acceptor : acceptors_) acceptor.close(ignored);
    for (const auto& meeting : meetings_) {
      const std::shared_ptr<RankConnection> connection = meeting->connection.lock();
      if (connection != nullptr && meeting->link == nullptr) connection->Close("this rank ends");
    }
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

void NetFabric::Accept(tcp::acceptor& acceptor) {
  acceptor.async_accept([this, &acceptor](const boost::system::error_code& error, tcp::socket socket) {
    if (error == asio::error::operation_aborted || !acceptor.is_open()) return;
    if (!error) Greet(std::move(socket), std::make_shared<Meeting>());
    Accept(acceptor);
  });
}

// A rank that is not there, at the address that was given; or the next way to one whose link is quiet.
void NetFabric::Dial(int32_t rank) {
  dialling_ |= RankBit(rank);
  const auto meeting = std::make_shared<Meeting>();
  meeting->dialled = rank;
  HostPort address = net_.peers[static_cast<size_t>(rank)];
  {
    const std::lock_guard lock(mutex_);
    if (Peer& peer = PeerOf(rank); peer.link != nullptr) {
      meeting->goes_on = peer.link;
      meeting->until = Clock::System().Now() + kTryMax;
      peer.way = (peer.way + 1) % peer.ways.size();
      address = peer.ways[peer.way];
    }
  }
  // A number does not wait behind the names of others.
  boost::system::error_code no_number;
  const auto number = asio::ip::make_address(address.host, no_number);
  if (!no_number) return Connect({{number, address.port}}, meeting);
  resolver_.async_resolve(
      address.host, std::to_string(address.port),
      [this, meeting](const boost::system::error_code& error, const tcp::resolver::results_type& found) {
        if (!error) return Connect({found.begin(), found.end()}, meeting);
        dialling_ &= ~RankBit(meeting->dialled);
      });
}

void NetFabric::Connect(const std::vector<tcp::endpoint>& addresses,
                        const std::shared_ptr<Meeting>& meeting) {
  auto socket = std::make_shared<tcp::socket>(io_);
  // A host that is not there must not hold up what comes back at another address.
  auto limit = std::make_shared<asio::steady_timer>(io_, meeting->goes_on != nullptr ? kTryMax : kMeetMax);
  limit->async_wait([socket](const boost::system::error_code& cancelled) {
    boost::system::error_code ignored;
    if (!cancelled) socket->close(ignored);
  });
  asio::async_connect(
      *socket, addresses,
      [this, meeting, socket, limit](const boost::system::error_code& refused, const tcp::endpoint&) {
        limit->cancel();
        if (!refused && socket->is_open()) return Greet(std::move(*socket), meeting);
        dialling_ &= ~RankBit(meeting->dialled);
      });
}

// Who has dialled says who it is, and the other one answers.
void NetFabric::Greet(tcp::socket socket, const std::shared_ptr<Meeting>& meeting) {
  {
    const std::lock_guard lock(mutex_);
    if (stopping_) return;  // whoever comes now would keep the loop running
  }
  boost::system::error_code ignored;
  const tcp::endpoint remote = socket.remote_endpoint(ignored);
  meeting->remote = {remote.address().to_string(), remote.port()};
  if (meeting->goes_on == nullptr) meeting->until = Clock::System().Now() + kSilenceMax;
  const auto connection = std::make_shared<RankConnection>(std::move(socket));
  meeting->connection = connection;
  meetings_.push_back(meeting);
  connection->Start(
      [this, meeting](const group::GroupMessage& message) {
        if (meeting->link != nullptr) return OnMessage(*meeting, message);
        const std::shared_ptr<RankConnection> self = meeting->connection.lock();
        const Status status = message.has_hello() ? Meet(self, message.hello(), *meeting)
                                                  : InvalidArgument("a message before the greeting");
        if (!status.ok()) self->Close(std::string(Message(status)));
      },
      [this, meeting, raw = connection.get()](const std::string& why, bool by_peer) {
        OnConnectionEnded(raw, *meeting, why, by_peer);
      });
  if (meeting->dialled < 0) return;
  RankLink* const link = meeting->goes_on.get();
  if (link == nullptr) return SayHello(*connection, 0, nullptr);
  SayHello(*connection, link->session(), link, link->NextAttempt());
}

void NetFabric::SayHello(RankConnection& connection, uint64_t session, const RankLink* link,
                         uint64_t attempt) {
  group::GroupMessage message;
  group::GroupHello& hello = *message.mutable_hello();
  hello.set_version(kVersion);
  hello.set_rank(static_cast<uint32_t>(rank_));
  hello.set_layout(own_->header().layout);
  hello.set_incarnation(own_->header().incarnation);
  hello.set_transfer(transfer_->Descriptor());
  hello.set_transfer_epoch(transfer_->epoch());
  hello.set_session(session);
  hello.set_attempt(attempt);
  if (link != nullptr) {
    hello.set_taken(link->taken());
    hello.set_next(link->acknowledged());
  }
  for (size_t i = 1; i < acceptors_.size(); ++i) {
    boost::system::error_code ignored;
    const tcp::endpoint way = acceptors_[i].local_endpoint(ignored);
    hello.add_ways(HostPort{way.address().to_string(), way.port()}.ToString());
  }
  {
    const std::lock_guard lock(mutex_);
    *hello.mutable_members() = Belief();
  }
  connection.Send(RankConnection::Frame(message));
}

void NetFabric::OnConnectionEnded(const RankConnection* connection, const Meeting& meeting,
                                  const std::string& why, bool by_peer) {
  if (meeting.link == nullptr) {
    LogDebug("expert group: a connection was not taken: {}", why);
    if (meeting.dialled >= 0) dialling_ &= ~RankBit(meeting.dialled);
    return;
  }
  const std::lock_guard lock(mutex_);
  if (PeerOf(meeting.rank).link == meeting.link && meeting.link->Ended(connection, why, by_peer))
    Lose(meeting.rank, "the connection to it ended: " + why);
}

// Not OK: the connection is given up. Who dials does so again.
Status NetFabric::Meet(const std::shared_ptr<RankConnection>& connection, const group::GroupHello& hello,
                       Meeting& meeting) {
  const auto theirs = static_cast<int32_t>(std::min<uint32_t>(hello.rank(), INT32_MAX));
  if (hello.version() != kVersion) return InvalidArgument("version {} of the protocol", hello.version());
  if (theirs >= shape_.num_ranks || theirs == rank_ ||
      (meeting.dialled >= 0 ? theirs != meeting.dialled : theirs < rank_)) {
    return InvalidArgument("rank {} is not expected there", hello.rank());
  }
  meeting.rank = theirs;
  const bool goes_on = meeting.dialled >= 0 ? meeting.goes_on != nullptr : hello.session() != 0;
  return goes_on ? GoOn(connection, hello, meeting) : MeetAnew(connection, hello, meeting);
}

Status NetFabric::MeetAnew(const std::shared_ptr<RankConnection>& connection, const group::GroupHello& hello,
                           Meeting& meeting) {
  const bool dialled = meeting.dialled >= 0;
  const uint64_t session = dialled ? hello.session() : RandomId() | 1;
  if (session == 0) return InvalidArgument("an answer without a link");
  if (!dialled) SayHello(*connection, session, nullptr);
  {
    const std::lock_guard lock(mutex_);
    MR_RETURN_IF_ERROR(MayMeet(meeting.rank, hello));
  }
  // Without the lock: the transfer engine's thread may wait for that in a callback.
  MR_ASSIGN_OR_RETURN(Peer made, MakePeer(hello));
  const std::lock_guard lock(mutex_);
  if (dialled) dialling_ &= ~RankBit(meeting.rank);
  Peer& peer = PeerOf(meeting.rank);
  peer = std::move(made);
  peer.link = meeting.link = std::make_shared<RankLink>(session);
  peer.ways = {meeting.remote};
  for (int i = 0; i < std::min(hello.ways_size(), kWaysMax); ++i) {
    if (const StatusOr<HostPort> parsed = ParseHostPort(hello.ways(i)); parsed.ok())
      peer.ways.push_back(*parsed);
  }
  peer.link->Attach(connection, 0, 0, /*sure=*/true, Clock::System().Now());
  group::GroupMessage message;
  group::GroupGrant& grant = *message.mutable_grant();
  grant.set_ticket(peer.ticket);
  grant.set_region(peer.region);
  grant.set_held_version(own_->header().held_version.load());
  grant.set_held(own_->held(), Cells());
  peer.link->Send(message);
  return OkStatus();
}

// The same link over another connection.
Status NetFabric::GoOn(const std::shared_ptr<RankConnection>& connection, const group::GroupHello& hello,
                       Meeting& meeting) {
  const bool dialled = meeting.dialled >= 0;
  std::shared_ptr<RankLink> link = meeting.goes_on;
  if (!dialled) {
    {
      const std::lock_guard lock(mutex_);
      const Peer& peer = PeerOf(meeting.rank);
      if (!stopping_ && peer.link != nullptr && peer.link->session() == hello.session() &&
          peer.incarnation == hello.incarnation() && !peer.link->over() &&
          peer.link->Acknowledge(hello.taken())) {
        link = peer.link;
      }
    }
    if (link != nullptr && !link->IsNewAttempt(hello.attempt()))
      return Cancelled("an attempt that was given up comes late");
    SayHello(*connection, link == nullptr ? 0 : link->session(), link.get());
  }
  const std::lock_guard lock(mutex_);
  Peer& peer = PeerOf(meeting.rank);
  if (link == nullptr || peer.link != link)
    return FailedPrecondition("the link that it goes on with is over");
  const bool fits = hello.session() == link->session() &&
                    link->Attach(connection, dialled ? hello.next() : link->taken(), hello.taken(),
                                 /*sure=*/dialled, Clock::System().Now());
  if (!fits) {
    Lose(meeting.rank, "it has given up the link");
    return FailedPrecondition("the link is over");
  }
  if (dialled) dialling_ &= ~RankBit(meeting.rank);
  meeting.link = link;
  LogWarning("expert group: the link with rank {} goes on over another connection", meeting.rank);
  return OkStatus();
}

Status NetFabric::MayMeet(int32_t rank, const group::GroupHello& hello) {
  if (stopping_ || belief_.cast_out()) return Cancelled("this rank ends");
  if (hello.layout() != own_->header().layout) {
    const Status mismatch = FailedPrecondition(
        "rank {} serves another model, or with another weight format, instruction set, batch size or "
        "number of ranks",
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
  peer.heard = Clock::System().Now();
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
  ForEach(now.alive, [&](int32_t rank) {
    Peer& peer = PeerOf(rank);
    for (const group::GroupAt& at : std::exchange(peer.early, {})) {
      if (Members{at.epoch(), at.alive()} == now) {
        Take(peer, at);
      } else if (at.epoch() > now.epoch) {
        peer.early.push_back(at);
      }
    }
  });
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

void NetFabric::OnMessage(const Meeting& meeting, const group::GroupMessage& message) {
  const int32_t rank = meeting.rank;
  const TimePoint now = Clock::System().Now();
  const std::lock_guard lock(mutex_);
  if (PeerOf(rank).link != meeting.link) return;                     // lost meanwhile
  if (!meeting.link->Uses(meeting.connection.lock().get())) return;  // another one goes on with it
  PeerOf(rank).heard = now;
  if (!meeting.link->Take(now)) return;
  switch (message.body_case()) {
    case group::GroupMessage::kGrant:
      return OnGrant(rank, message.grant());
    case group::GroupMessage::kAt:
      return OnAt(rank, message.at());
    case group::GroupMessage::kBeat:
      return OnBeat(rank, message.beat());
    case group::GroupMessage::kTarget:
      return OnTarget(rank, message.target());
    case group::GroupMessage::kMembers:
      return OnMembers(rank, message.members());
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

void NetFabric::OnMembers(int32_t rank, const group::GroupMembers& members) {
  const Members before = belief_.now();
  if (!members.formed() || !belief_.Heard(rank, {members.epoch(), members.alive()}, Linked())) return;
  Tell(before, fmt::format("rank {} says so", rank));
}

void NetFabric::OnAt(int32_t rank, const group::GroupAt& at) {
  Peer& peer = PeerOf(rank);
  // What a rank holds it says once, whoever its members are.
  if (!at.wish().held().empty()) CopyHeld(peer, at.wish().held(), at.wish().held_version());
  const Members theirs{at.epoch(), at.alive()};
  if (theirs == belief_.now()) return Take(peer, at);
  // Of a time that is over; or of one that has not begun here. Then it waits: it is not said again. Without
  // this rank the other one gets no further than to the exchange after it.
  if (theirs.epoch >= belief_.now().epoch && peer.early.size() < kEarlyMax) peer.early.push_back(at);
}

void NetFabric::Take(Peer& peer, const group::GroupAt& at) {
  engine::RankHeader& header = peer.copy->header();
  if (at.has_wish()) {
    const uint32_t kind = std::min(at.wish().kind(), static_cast<uint32_t>(engine::PassKind::kStep));
    header.wanted.store(static_cast<int32_t>(kind), std::memory_order_relaxed);
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
  if (!peer.link->Acknowledge(beat.taken())) return peer.link->Close("it has taken what was not sent");
  peer.copy->header().beat.store(beat.beat());
  peer.links = beat.linked();
  peer.member = beat.members().formed();
  if (static_cast<size_t>(beat.loads_size()) == Cells()) {
    for (int i = 0; i < beat.loads_size(); ++i) engine::Put(peer.copy->loads()[i], uint64_t{beat.loads(i)});
  }
  if (peer.member) {
    // Two that joined by different parts of a group while they were connected.
    const bool foreign = belief_.member() && !belief_.Has(rank);
    peer.foreign_beats = foreign ? peer.foreign_beats + 1 : 0;
    if (peer.foreign_beats > kForeignBeatsMax) return Lose(rank, "it belongs to another part of the group");
    return OnMembers(rank, beat.members());
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

// Links that are over; and ranks that are no members and fall silent. Of members that is noticed by their
// beats (heartbeat_max).
void NetFabric::LookAtLinks(TimePoint now) {
  for (int32_t rank = 0; rank < shape_.num_ranks; ++rank) {
    const Peer& peer = PeerOf(rank);
    if (peer.link == nullptr) continue;
    if (peer.link->over()) {
      Lose(rank, "the connection to it ended: " + peer.link->why());
    } else if (!belief_.Has(rank) && now - peer.heard > kSilenceMax) {
      Lose(rank, "nothing is heard of it");
    }
  }
}

// Ten times a second: signs of life, what changes slowly, and another try to reach who is not there.
void NetFabric::Beat() {
  const TimePoint now = Clock::System().Now();
  std::erase_if(meetings_, [&](const std::shared_ptr<Meeting>& meeting) {
    const std::shared_ptr<RankConnection> connection = meeting->connection.lock();
    if (connection != nullptr && meeting->link == nullptr && now <= meeting->until) return false;
    if (connection != nullptr && meeting->link == nullptr) connection->Close("it does not say who it is");
    return true;
  });
  RankMask away = 0;
  {
    const std::lock_guard lock(mutex_);
    if (stopping_ || belief_.cast_out()) return;
    TryToForm();
    LookAtLinks(now);
    for (int32_t rank = 0; rank < rank_; ++rank) {
      const auto& link = PeerOf(rank).link;
      if (link == nullptr || link->Quiet(now, kQuietMax)) away |= RankBit(rank);
    }
    std::vector<uint64_t> loads(Cells());
    for (size_t i = 0; i < loads.size(); ++i) loads[i] = engine::Get(own_->loads()[i]);
    const uint64_t target = own_->header().target_version.load();
    ForEach(Linked(), [&](int32_t rank) {
      Peer& peer = PeerOf(rank);
      group::GroupMessage message;
      group::GroupBeat& beat = *message.mutable_beat();
      beat.set_beat(own_->header().beat.load());
      *beat.mutable_members() = Belief();
      beat.set_linked(static_cast<uint32_t>(Linked() | RankBit(rank_)));
      beat.set_taken(peer.link->taken());
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

}  // namespace millrace::server
