#include "transfer/tcp/tcp_path.h"

#include <algorithm>

#include "base/check.h"
#include "proto/transfer.pb.h"

namespace millrace::transfer {

TcpPath::TcpPath(const RailEnvironment* environment, Target target)
    : environment_(environment), target_(std::move(target)) {}

void TcpPath::Connect() {
  const HostPort& remote = target_.remotes[next_remote_++ % target_.remotes.size()];
  for (Lane* const lane : {&bulk_, &express_}) {
    if (IsControl() && lane == &express_) break;
    auto fd = ConnectTcp(target_.local_host, remote);
    if (!fd.ok()) return owner_->OnBroken(this, fd.status());
    lane->stream = std::make_unique<FrameStream>(environment_->loop, *std::move(fd), true, lane);
  }
}

std::string TcpPath::Hello() const {
  v1::Hello hello;
  hello.set_protocol_version(kProtocolVersion);
  hello.set_epoch(environment_->epoch);
  hello.set_expected_epoch(target_.expected_epoch);
  hello.set_purpose(IsControl() ? v1::Hello::CONTROL : v1::Hello::DATA);
  return hello.SerializeAsString();
}

bool TcpPath::OnHello(Lane& lane, std::string_view message) {
  v1::Hello hello;
  if (!hello.ParseFromArray(message.data(), static_cast<int>(message.size())) ||
      hello.protocol_version() != kProtocolVersion || hello.epoch() != target_.expected_epoch ||
      !hello.refusal().empty()) {
    const Status why =
        Unavailable("{} is not the process that was looked for: {}", target_.traits.remote_rail,
                    hello.refusal().empty() ? "another epoch or protocol" : hello.refusal());
    owner_->OnRefused(why);
    Break(why);
    return false;
  }
  lane.ready = true;
  ready_ = bulk_.ready && (IsControl() || express_.ready);
  if (ready_) owner_->OnConnected(this);
  return true;
}

void TcpPath::Send(const Slice& slice) {
  MR_CHECK(ready_);
  Frame frame;
  frame.slice = slice.id;
  frame.ticket = slice.ticket;
  frame.region = slice.remote_region;
  frame.offset = slice.remote_offset;
  frame.length = static_cast<uint32_t>(slice.local.size());
  frame.attempt = slice.attempt;
  frame.retired_below = slice.retired_below;
  FrameStream& stream = slice.express ? *express_.stream : *bulk_.stream;
  const bool write = slice.operation == Operation::kWrite;
  in_flight_.emplace(slice.id, Reading{write ? nullptr : slice.local.data(), slice.local.size()});
  if (write) {
    frame.kind = FrameKind::kSlice;
    stream.Send(frame, slice.local);
  } else {
    frame.kind = FrameKind::kReadRequest;
    stream.Send(frame);
  }
}

void TcpPath::Probe(uint64_t probe) {
  MR_CHECK(ready_);
  bulk_.stream->Send({.kind = FrameKind::kProbe, .slice = probe});
}

std::byte* TcpPath::OnHeader(const Frame& frame) {
  if (frame.kind != FrameKind::kReadData) return nullptr;
  const auto found = in_flight_.find(frame.slice);
  if (found == in_flight_.end() || found->second.local == nullptr || found->second.bytes != frame.length) {
    Break(DataLoss("data that was not asked for"));
    return nullptr;
  }
  return found->second.local;
}

void TcpPath::OnFrame(const Frame& frame, bool right) {
  switch (frame.kind) {
    case FrameKind::kReadData:
      return OnAnswer(frame.slice, right ? SliceOutcome::kLanded : SliceOutcome::kBadChecksum);
    case FrameKind::kProbeAnswer:
      return owner_->OnProbeDone(this, frame.slice);
    case FrameKind::kAnswer:
      break;
    default:
      return Break(DataLoss("an unexpected frame"));
  }
  const auto found = in_flight_.find(frame.slice);
  // A read ends with its data, or with a refusal.
  if (found == in_flight_.end() || (found->second.local != nullptr && frame.code != SliceCode::kRefused))
    return Break(DataLoss("an answer to nothing that was asked"));
  switch (frame.code) {
    case SliceCode::kLanded:
      return OnAnswer(frame.slice, SliceOutcome::kLanded);
    case SliceCode::kRefused:
      return OnAnswer(frame.slice, SliceOutcome::kRefused);
    case SliceCode::kBadChecksum:
      return OnAnswer(frame.slice, SliceOutcome::kBadChecksum);
    case SliceCode::kSuperseded:
      return OnAnswer(frame.slice, SliceOutcome::kUnknown);
  }
}

void TcpPath::OnAnswer(uint64_t slice, SliceOutcome outcome) {
  in_flight_.erase(slice);
  owner_->OnSliceDone(this, slice, outcome);
}

void TcpPath::OnMessage(std::string_view body) {
  if (!IsControl()) return Break(DataLoss("a control message on a data connection"));
  OnControlMessage(body);
}

void TcpPath::OnControlMessage(std::string_view) {}

bool TcpPath::SendControl(const std::string& body) {
  if (!ready_) return false;
  bulk_.stream->SendMessage(body);
  return true;
}

void TcpPath::Drop() {
  ready_ = false;
  for (Lane* const lane : {&bulk_, &express_}) {
    lane->ready = false;
    if (lane->stream != nullptr) lane->stream->Close();
  }
}

void TcpPath::OnClosed(const Status& why) {
  ready_ = false;
  owner_->OnBroken(this, why);  // disconnects
}

void TcpPath::Break(const Status& why) {
  Drop();
  OnClosed(why);
}

void TcpPath::Disconnect() {
  Drop();
  ReportUnknown();
}

// With the socket closed nothing reads or lands in these slices' memory any more.
void TcpPath::ReportUnknown() {
  std::vector<uint64_t> lost;
  for (const auto& [id, reading] : in_flight_) lost.push_back(id);
  std::sort(lost.begin(), lost.end());
  in_flight_.clear();
  for (const uint64_t id : lost) owner_->OnSliceDone(this, id, SliceOutcome::kUnknown);
}

bool TcpControl::SendMessage(const std::string& kind, const std::string& body) {
  v1::RailMessage message;
  message.set_kind(kind);
  message.set_body(body);
  return SendControl(message.SerializeAsString());
}

void TcpControl::OnControlMessage(std::string_view body) {
  v1::RailMessage message;
  // A peer that speaks nonsense here will be found out by its silence.
  if (!message.ParseFromArray(body.data(), static_cast<int>(body.size()))) return;
  environment_->on_control(this, message.kind(), message.body());
}

}  // namespace millrace::transfer
