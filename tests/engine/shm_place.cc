// Ranks that meet in shared memory.
#include "engine/moe/shm_group.h"
#include "tests/engine/expert_group_rig.h"
#include "tests/engine/tiny_model.h"

namespace millrace::engine {
namespace {

class SharedDirectory final : public GroupPlace {
 public:
  StatusOr<std::unique_ptr<ExpertGroup>> Join(const RankGroupOptions& options) const override {
    return JoinShmGroup(options, directory_.path());
  }

 private:
  const TempDirectory directory_;
};

}  // namespace

std::unique_ptr<GroupPlace> MakeGroupPlace(int) { return std::make_unique<SharedDirectory>(); }

}  // namespace millrace::engine
