// In the place of the RDMA kind where the build found no rdma-core headers.
#include <algorithm>

#include "transfer/rdma/make.h"

namespace millrace::transfer::rdma {
namespace {

class AbsentRails : public RailKind {
 public:
  explicit AbsentRails(const RailEnvironment& environment) : kinds_(environment.options->kinds) {}
  const char* name() const override { return "rdma"; }
  Status Start() override {
    if (std::find(kinds_.begin(), kinds_.end(), "rdma") == kinds_.end()) return OkStatus();
    return Unimplemented("RDMA was asked for and this build has none: libibverbs-dev was not found");
  }
  std::vector<RailAddress> Addresses() const override { return {}; }
  StatusOr<std::vector<std::unique_ptr<Path>>> MakePaths(const RemotePeer&, ControlChannel*) override {
    return std::vector<std::unique_ptr<Path>>();
  }
  void CloseAll() override {}

 private:
  const std::vector<std::string>& kinds_;
};

}  // namespace

std::unique_ptr<RailKind> MakeRdmaRails(const RailEnvironment& environment) {
  return std::make_unique<AbsentRails>(environment);
}

}  // namespace millrace::transfer::rdma
