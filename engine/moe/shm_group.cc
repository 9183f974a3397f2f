#include "engine/moe/shm_group.h"

#include <sys/stat.h>

#include <array>
#include <bit>
#include <cerrno>
#include <cstring>

#include "base/log.h"
#include "base/random.h"
#include "engine/moe/rank_file.h"

namespace millrace::engine {
namespace {

class ShmFabric final : public GroupFabric {
 public:
  ShmFabric(const std::string& directory, int32_t rank, const GroupShape& shape,
            std::unique_ptr<ControlFile> control)
      : directory_(directory), rank_(rank), shape_(shape), control_(std::move(control)) {}

  // With the control file locked: forgets a group all of whose processes are gone; refuses one that is
  // another.
  Status Prepare() {
    ControlHeader& control = control_->header();
    const uint64_t state = control.state.load();
    RankMask lives = 0;
    for (int32_t rank = 0; rank < kGroupRanksMax; ++rank) {
      if ((LowOf(state) & RankBit(rank)) != 0 && RankLives(directory_, rank)) lives |= RankBit(rank);
    }
    if ((lives & RankBit(rank_)) != 0) {
      return FailedPrecondition("{}: rank {} runs already", directory_, rank_);
    }
    if (lives != 0 && control.layout.load() != LayoutOf(shape_)) {
      return FailedPrecondition(
          "{}: rank {} serves another model there, or with another weight format, instruction set, batch "
          "size or number of ranks",
          directory_, std::countr_zero(lives));
    }
    if (lives == 0) {
      control.layout.store(LayoutOf(shape_));
      control.state.store(MakeState(EpochOf(state) + 1, 0));
      control.formed.store(0);
    }
    MR_ASSIGN_OR_RETURN(own_, RankFile::Make(directory_, rank_, shape_, RandomId()));
    return OkStatus();
  }

  RankMemory& own() override { return *own_; }
  ControlHeader& control() override { return control_->header(); }

  Status Enter() override {
    ControlHeader& control = control_->header();
    control.incarnations[rank_].store(own_->header().incarnation);
    uint64_t state = control.state.load();
    if ((LowOf(state) & RankBit(rank_)) != 0) Remove(rank_, EpochOf(state), "a new process takes its place");
    do {
      state = control.state.load();
    } while (!control.state.compare_exchange_weak(
        state, MakeState(EpochOf(state) + 1, LowOf(state) | RankBit(rank_))));
    control_->Unlock();
    return OkStatus();
  }

  StatusOr<bool> Formed() override {
    ControlHeader& control = control_->header();
    if (present() == RankBit(shape_.num_ranks) - 1) control.formed.store(1);
    return control.formed.load() != 0;
  }
  RankMask present() override { return LowOf(control_->header().state.load()); }

  StatusOr<std::shared_ptr<const RankMemory>> Open(int32_t rank) override {
    MR_ASSIGN_OR_RETURN(std::shared_ptr<const RankMemory> file, RankFile::Open(directory_, rank, shape_));
    peers_[static_cast<size_t>(rank)] = file;
    return file;
  }

  void Settle() override {}  // it is seen when it is written

  void Show(RankMask peers, Shown what) override {
    bool idle = false;
    bool sleeper = false;
    for (RankMask left = peers; left != 0; left &= left - 1) {
      const RankHeader& header = peers_[static_cast<size_t>(std::countr_zero(left))]->header();
      sleeper |= header.sleeping.load() != 0;
      idle |= header.idle.load() != 0;
    }
    if (sleeper) WakeAllOnWord(&own_->header().at);
    if (idle && what == Shown::kWish) Ring();
  }

  void Remove(int32_t rank, uint32_t epoch, const char* reason) override {
    std::atomic<uint64_t>& state = control_->header().state;
    uint64_t expected = state.load();
    while (EpochOf(expected) == epoch && (LowOf(expected) & RankBit(rank)) != 0) {
      if (!state.compare_exchange_weak(expected, MakeState(epoch + 1, LowOf(expected) & ~RankBit(rank))))
        continue;
      if (reason != nullptr) {
        LogWarning("expert group: rank {} is out: {}; epoch {}", rank, reason, epoch + 1);
      }
      Ring();  // idle ranks look at once, not at their next beat
    }
  }

  void Ring() override {
    control_->header().bell.fetch_add(1);
    WakeAllOnWord(&control_->header().bell);
  }

 private:
  const std::string directory_;
  const int32_t rank_;
  const GroupShape shape_;
  const std::unique_ptr<ControlFile> control_;
  std::unique_ptr<RankFile> own_;
  std::array<std::shared_ptr<const RankMemory>, kGroupRanksMax> peers_;  // engine thread
};

}  // namespace

StatusOr<std::unique_ptr<ExpertGroup>> JoinShmGroup(const RankGroupOptions& options,
                                                    const std::string& directory) {
  MR_RETURN_IF_ERROR(CheckRank(options));
  if (mkdir(directory.c_str(), 0700) != 0 && errno != EEXIST) {
    return Internal("{}: {}", directory, std::strerror(errno));
  }
  MR_ASSIGN_OR_RETURN(std::unique_ptr<ControlFile> control, ControlFile::Open(directory));
  MR_RETURN_IF_ERROR(control->Lock());
  auto fabric = std::make_unique<ShmFabric>(directory, options.rank, options.shape, std::move(control));
  MR_RETURN_IF_ERROR(fabric->Prepare());
  return JoinGroup(options, std::move(fabric));
}

}  // namespace millrace::engine
