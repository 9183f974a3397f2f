#pragma once
// A rank of a group over several hosts, as the protocol of passes sees it; net_group.h makes it. What comes
// from the others: net_fabric_links.cc. What is shown to them: net_fabric_rows.cc.
//
// State is guarded by one mutex; calls of the transfer engine that wait for its thread are made without it,
// as its callbacks take it.

#include <atomic>
#include <bit>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "engine/moe/group_fabric.h"
#include "server/group/members.h"
#include "server/group/net_group.h"
#include "server/group/rank_connection.h"
#include "server/group/rank_link.h"
#include "transfer/transfer.h"

namespace millrace::server {

// A rank's own memory, or the copy of another rank's.
class HeapMemory final : public engine::RankMemory {
 public:
  // `homes`: as RankMemory has it. ResourceExhausted.
  static StatusOr<std::shared_ptr<HeapMemory>> Make(const engine::GroupShape& shape, int32_t homes,
                                                    uint64_t incarnation);
  ~HeapMemory() override;
  bool OwnerLives() const override { return lives_.load(); }
  void OwnerIsLost() { lives_.store(false); }
  std::span<std::byte> all() const { return {data(), bytes()}; }

 private:
  HeapMemory(const engine::GroupShape& shape, int32_t homes) : RankMemory(shape, homes) {}

  std::atomic<bool> lives_{true};
};

class NetFabric final : public engine::GroupFabric {
 public:
  NetFabric(const engine::RankGroupOptions& options, const NetGroupOptions& net)
      : rank_(options.rank),
        shape_(options.shape),
        stall_max_(options.stall_max),
        net_(net),
        timer_(io_),
        resolver_(io_),
        belief_(options.rank, options.shape.num_ranks),
        peers_(static_cast<size_t>(options.shape.num_ranks)) {}

  ~NetFabric() override;
  Status Listen();

  engine::RankMemory& own() override { return *own_; }
  engine::ControlHeader& control() override { return control_; }

  Status Enter() override;
  StatusOr<bool> Formed() override {
    const std::lock_guard lock(mutex_);
    MR_RETURN_IF_ERROR(refused_);
    return belief_.member();
  }
  engine::RankMask present() override {
    const std::lock_guard lock(mutex_);
    return Linked() | engine::RankBit(rank_);
  }
  StatusOr<std::shared_ptr<const engine::RankMemory>> Open(int32_t rank) override;
  void Settle() override;
  void Show(engine::RankMask peers, engine::Shown what) override;
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
    std::vector<group::GroupAt> early;  // of a belief that this rank does not share yet
    int64_t under_way = 0;              // requests whose end has not been told
    uint64_t held_told = ~uint64_t{0};
    std::vector<uint64_t> loads_told;
    TimePoint loads_told_at;
    uint64_t target_told = 0;
    TimePoint heard;             // its last message
    std::vector<HostPort> ways;  // where it is dialled: the address that it was met at first
    size_t way = 0;              // the one that was tried last
    engine::RankMask links = 0;  // as it says
    bool member = false;
    int foreign_beats = 0;  // that said that it is a member, while this one does not believe that
  };

  size_t Cells() const {
    return static_cast<size_t>(shape_.num_layers) * static_cast<size_t>(shape_.num_experts);
  }
  Peer& PeerOf(int32_t rank) { return peers_[static_cast<size_t>(rank)]; }
  template <typename F>
  void ForEach(engine::RankMask ranks, F&& f) {
    for (engine::RankMask left = ranks & ~engine::RankBit(rank_); left != 0; left &= left - 1)
      f(std::countr_zero(left));
  }

  // One connection that has been made, until it ends.
  struct Meeting {
    int32_t dialled = -1;               // the rank; -1: it has dialled
    std::shared_ptr<RankLink> goes_on;  // the link that it is to go on with; null: a new one
    std::shared_ptr<RankLink> link;     // once met
    int32_t rank = -1;                  // the other one, once met
    std::weak_ptr<RankConnection> connection;
    HostPort remote;  // the other end
    TimePoint until;  // it has to be met
  };

  // Thread of io_.
  Status ListenAt(const boost::asio::ip::tcp::endpoint& endpoint);
  void Accept(boost::asio::ip::tcp::acceptor& acceptor);
  void Dial(int32_t rank);
  void Connect(const std::vector<boost::asio::ip::tcp::endpoint>& addresses,
               const std::shared_ptr<Meeting>& meeting);
  void Greet(boost::asio::ip::tcp::socket socket, const std::shared_ptr<Meeting>& meeting);
  void SayHello(RankConnection& connection, uint64_t session, const RankLink* link, uint64_t attempt = 0);
  void OnConnectionEnded(const RankConnection* connection, const Meeting& meeting, const std::string& why,
                         bool by_peer);
  Status Meet(const std::shared_ptr<RankConnection>& connection, const group::GroupHello& hello,
              Meeting& meeting);
  Status MeetAnew(const std::shared_ptr<RankConnection>& connection, const group::GroupHello& hello,
                  Meeting& meeting);
  Status GoOn(const std::shared_ptr<RankConnection>& connection, const group::GroupHello& hello,
              Meeting& meeting);
  StatusOr<Peer> MakePeer(const group::GroupHello& hello);
  void OnMessage(const Meeting& meeting, const group::GroupMessage& message);
  void OnGrant(int32_t rank, const group::GroupGrant& grant);
  void OnMembers(int32_t rank, const group::GroupMembers& members);
  void OnAt(int32_t rank, const group::GroupAt& at);
  void OnBeat(int32_t rank, const group::GroupBeat& beat);
  void OnTarget(int32_t rank, const group::GroupTarget& target);
  void Beat();
  void LookAtLinks(TimePoint now);

  // With mutex_.
  Status MayMeet(int32_t rank, const group::GroupHello& hello);
  engine::RankMask Linked() const;
  void Lose(int32_t rank, const std::string& why);
  void Unlink(int32_t rank, const std::string& why);
  void Tell(const Members& before, const std::string& why);
  group::GroupMembers Belief() const;
  group::GroupMessage Saying(Peer& peer, engine::Shown what);
  std::vector<transfer::Intent> Pieces(int32_t rank, engine::Shown what) const;
  void Flush(Peer& peer);
  void TryToForm();
  void Take(Peer& peer, const group::GroupAt& at);
  void CopyHeld(Peer& peer, const std::string& held, uint64_t version);

  const int32_t rank_;
  const engine::GroupShape shape_;
  const Duration stall_max_;
  const NetGroupOptions net_;
  std::unique_ptr<transfer::Transfer> transfer_;
  std::shared_ptr<HeapMemory> own_;
  transfer::RegionId own_region_ = 0;
  engine::ControlHeader control_{};

  boost::asio::io_context io_;
  std::deque<boost::asio::ip::tcp::acceptor> acceptors_;  // the first at net_.listen
  boost::asio::steady_timer timer_;
  boost::asio::ip::tcp::resolver resolver_;
  std::thread thread_;
  // Thread of io_.
  engine::RankMask dialling_ = 0;
  std::vector<std::shared_ptr<Meeting>> meetings_;  // that have not met yet

  std::mutex mutex_;
  MembersBelief belief_;
  std::vector<Peer> peers_;
  Status refused_;
  std::condition_variable landed_;  // a peer's under_way has changed
  bool stopping_ = false;
};

}  // namespace millrace::server
