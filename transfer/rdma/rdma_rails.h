#pragma once
// The RDMA kind of rail: one rail per usable port. Owns devices, registered memory, and the targets of peers'
// links. Transfer thread only, except where rail.h says otherwise.

#include <map>
#include <memory>
#include <vector>

#include "transfer/rail.h"
#include "transfer/rdma/device.h"
#include "transfer/rdma/rdma_path.h"
#include "transfer/rdma/rdma_target.h"
#include "transfer/rdma/regions.h"

namespace millrace::transfer::rdma {

// For each of `count` paths the indices of a local and a remote rail: every rail of the longer list is used
// once, each with the one of the other list whose GID shares the longest prefix with its own (the same
// network, most likely), among those used least. Pure.
std::vector<std::pair<size_t, size_t>> PairRails(const std::vector<std::array<uint8_t, 16>>& local,
                                                 const std::vector<std::array<uint8_t, 16>>& remote);

class RdmaRails : public RailKind {
 public:
  // `verbs` outlives it; an error says why there is no RDMA here.
  RdmaRails(const RailEnvironment& environment, StatusOr<const Verbs*> verbs);
  ~RdmaRails() override;

  const char* name() const override { return "rdma"; }
  Status Start() override;
  std::vector<RailAddress> Addresses() const override;
  Status RegisterRegion(RegionId region, std::span<std::byte> memory, bool writable) override;
  void DeregisterRegion(RegionId region) override;
  StatusOr<std::vector<std::unique_ptr<Path>>> MakePaths(const RemotePeer& peer,
                                                         ControlChannel* control) override;
  void OnControl(ControlChannel* channel, const std::string& body) override;
  void OnControlClosed(ControlChannel* channel) override;
  void OnTicketClosing(TicketId ticket) override;
  TimePoint Tick(TimePoint now) override;
  void CloseAll() override;
  ReceiverCounters counters() const override { return counters_; }

 private:
  using LinkName = std::pair<uint64_t, uint64_t>;  // the initiator's epoch, and its name for the link
  RdmaPath* FindPath(uint64_t link, const ControlChannel* channel) const;  // null: there is none
  void OnConnect(const v1::Connect& connect, ControlChannel* channel);
  void OnDeviceEvents(size_t device);
  void BreakDevice(size_t device, const Status& why);
  template <typename Element>
  void BreakOwner(const Element* element, const Status& why);

  const RailEnvironment env_;
  const StatusOr<const Verbs*> verbs_;
  std::vector<std::unique_ptr<Device>> devices_;
  std::unique_ptr<Regions> regions_;
  std::vector<RailAddress> addresses_;  // fixed after Start
  ReceiverCounters counters_;
  std::map<LinkName, std::unique_ptr<RdmaTarget>> targets_;
  std::map<uint64_t, RdmaPath*> paths_;  // by link; owned by peers
  uint64_t next_link_ = 1;
};

}  // namespace millrace::transfer::rdma
