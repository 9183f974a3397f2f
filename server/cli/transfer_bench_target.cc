#include "server/cli/transfer_bench_target.h"

#include <poll.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include <future>

#include "base/log.h"
#include "base/thread.h"
#include "server/cli/transfer_bench_control.h"
#include "server/cli/transfer_bench_memory.h"
#include "server/cli/transfer_bench_pattern.h"

namespace millrace::server {
namespace {

constexpr size_t kSessionsMax = 256;
constexpr Duration kIdleMax = std::chrono::hours(1);  // an initiator that asks nothing for so long is gone

}  // namespace

struct BenchTarget::Listener {
  boost::asio::io_context io;
  boost::asio::ip::tcp::acceptor acceptor{io};
};

// One initiator thread's memory and ticket, and the thread that answers it.
class BenchTarget::Session {
 public:
  Session(BenchTarget* owner, std::unique_ptr<BenchControl::Stream> stream)
      : owner_(owner), fd_(stream->socket().native_handle()), control_(std::move(stream)) {
    thread_ = std::thread([this] { Run(); });
  }
  ~Session() {
    shutdown(fd_, SHUT_RDWR);  // wakes the thread; the descriptor is closed with control_, after it
    thread_.join();
  }
  bool ended() const { return ended_; }

 private:
  void Run() {
    SetThreadName("bench-session");
    for (auto question = control_.Receive(kIdleMax); question.ok(); question = control_.Receive(kIdleMax)) {
      auto answer = Answer(*question);
      const Json reply = answer.ok() ? *answer : Json{{"error", std::string(Message(answer.status()))}};
      if (!control_.Send(reply).ok()) break;
    }
    Release();
    ended_ = true;
  }

  StatusOr<Json> Answer(const Json& question) {
    if (question.is_object() && question.contains("open")) return Open(question["open"]);
    if (question.is_object() && question.contains("check")) return Check(question["check"]);
    if (question.is_object() && question.contains("usage")) return Usage();
    return InvalidArgument("a question that this version does not know");
  }

  static StatusOr<uint64_t> Number(const Json& object, const std::string& key) {
    MR_ASSIGN_OR_RETURN(const auto value, GetInt(object, key));
    if (!value.has_value() || *value < 0) return InvalidArgument("'{}' is missing or negative", key);
    return static_cast<uint64_t>(*value);
  }

  StatusOr<Json> Open(const Json& question) {
    if (memory_.bytes().data() != nullptr) return FailedPrecondition("the session is open already");
    MR_ASSIGN_OR_RETURN(const uint64_t bytes, Number(question, "bytes"));
    MR_ASSIGN_OR_RETURN(seed_, Number(question, "seed"));
    MR_ASSIGN_OR_RETURN(const auto epoch_digits, GetString(question, "epoch"));
    MR_ASSIGN_OR_RETURN(const std::string epoch_bytes, FromHex(epoch_digits.value_or("")));
    uint64_t epoch = 0;
    if (epoch_bytes.size() != sizeof(epoch)) return InvalidArgument("'epoch' is not 16 hexadecimal digits");
    std::memcpy(&epoch, epoch_bytes.data(), sizeof(epoch));
    if (owner_->lent_bytes_.fetch_add(bytes) + bytes > owner_->options_.memory_bytes_max) {
      owner_->lent_bytes_ -= bytes;
      return ResourceExhausted("{} bytes more than --memory-max {} allows", bytes,
                               owner_->options_.memory_bytes_max);
    }
    lent_ = bytes;
    MR_ASSIGN_OR_RETURN(memory_, BenchMemory::Allocate(bytes));
    BenchPattern(seed_, 0).Fill(memory_.bytes(), 0);
    transfer::Transfer& transfer = *owner_->transfer_;
    MR_ASSIGN_OR_RETURN(region_, transfer.Register(memory_.bytes(), /*writable=*/true));
    MR_ASSIGN_OR_RETURN(write_ticket_, transfer.OpenTicket(epoch, {{region_, 0, bytes}}));
    MR_ASSIGN_OR_RETURN(read_ticket_,
                        transfer.OpenTicket(epoch, {{region_, 0, bytes}}, transfer::Operation::kRead));
    return Json{{"descriptor", ToHex(transfer.Descriptor())},
                {"region", region_},
                {"write_ticket", write_ticket_},
                {"read_ticket", read_ticket_}};
  }

  StatusOr<Json> Check(const Json& question) {
    MR_ASSIGN_OR_RETURN(const uint64_t offset, Number(question, "offset"));
    MR_ASSIGN_OR_RETURN(const uint64_t bytes, Number(question, "bytes"));
    MR_ASSIGN_OR_RETURN(const uint64_t round, Number(question, "round"));
    const auto memory = memory_.bytes();
    if (offset > memory.size() || bytes > memory.size() - offset || (offset | bytes) % 8 != 0)
      return InvalidArgument("a check outside the session's {} bytes", memory.size());
    const auto part = std::span<const std::byte>(memory).subspan(offset, bytes);
    return Json{{"wrong", BenchPattern(seed_, round).CountWrong(part, offset)}};
  }

  StatusOr<Json> Usage() {
    const transfer::Snapshot snapshot = owner_->transfer_->TakeSnapshot();
    return Json{{"cpu_seconds", ProcessCpuSeconds()}, {"slices_refused", snapshot.slices_refused}};
  }

  // The memory goes only when nothing can land in it any more.
  void Release() {
    transfer::Transfer& transfer = *owner_->transfer_;
    for (const transfer::TicketId ticket : {write_ticket_, read_ticket_}) {
      std::promise<void> drained;
      transfer.CloseTicket(ticket, [&drained] { drained.set_value(); });
      drained.get_future().wait();
    }
    if (region_ != 0) {
      if (const Status status = transfer.Deregister(region_); !status.ok())
        LogWarning("transfer-bench: {}", Message(status));
    }
    memory_ = BenchMemory();
    owner_->lent_bytes_ -= lent_;
  }

  BenchTarget* const owner_;
  const int fd_;
  BenchControl control_;
  size_t lent_ = 0;
  BenchMemory memory_;
  uint64_t seed_ = 0;
  transfer::RegionId region_ = 0;
  transfer::TicketId write_ticket_ = 0;
  transfer::TicketId read_ticket_ = 0;
  std::atomic<bool> ended_{false};
  std::thread thread_;
};

BenchTarget::BenchTarget(const BenchTargetOptions& options, std::unique_ptr<transfer::Transfer> transfer)
    : options_(options), transfer_(std::move(transfer)), listener_(std::make_unique<Listener>()) {}

StatusOr<std::unique_ptr<BenchTarget>> BenchTarget::Create(const BenchTargetOptions& options) {
  transfer::Options transfer_options = options.transfer;
  transfer_options.name = "bench-target";
  MR_ASSIGN_OR_RETURN(auto transfer, transfer::Transfer::Create(transfer_options));
  MR_ASSIGN_OR_RETURN(const HostPort wanted, ParseHostPort(options.listen));
  MR_ASSIGN_OR_RETURN(const std::vector<HostPort> addresses, Resolve(wanted));
  std::unique_ptr<BenchTarget> target(new BenchTarget(options, std::move(transfer)));
  auto& acceptor = target->listener_->acceptor;
  boost::system::error_code error;
  const auto host = boost::asio::ip::make_address(addresses.front().host, error);
  const boost::asio::ip::tcp::endpoint endpoint(host, addresses.front().port);
  if (!error) acceptor.open(endpoint.protocol(), error);
  if (!error) acceptor.set_option(boost::asio::socket_base::reuse_address(true), error);
  if (!error) acceptor.bind(endpoint, error);
  if (!error) acceptor.listen(boost::asio::socket_base::max_listen_connections, error);
  if (!error) acceptor.non_blocking(true, error);
  if (error) return Unavailable("--listen {}: {}", options.listen, error.message());
  target->address_ = {addresses.front().host, acceptor.local_endpoint(error).port()};
  target->thread_ = std::thread([raw = target.get()] { raw->Accept(); });
  return target;
}

void BenchTarget::Accept() {
  SetThreadName("bench-target");
  while (!stopping_) {
    pollfd ready{listener_->acceptor.native_handle(), POLLIN, 0};
    poll(&ready, 1, 100);
    std::erase_if(sessions_, [](const auto& session) { return session->ended(); });
    auto stream = std::make_unique<BenchControl::Stream>();
    boost::system::error_code error;
    listener_->acceptor.accept(stream->socket(), error);
    if (error || sessions_.size() >= kSessionsMax) continue;
    stream->socket().set_option(boost::asio::ip::tcp::no_delay(true), error);
    sessions_.push_back(std::make_unique<Session>(this, std::move(stream)));
  }
}

BenchTarget::~BenchTarget() {
  stopping_ = true;
  if (thread_.joinable()) thread_.join();
  sessions_.clear();
}

}  // namespace millrace::server
