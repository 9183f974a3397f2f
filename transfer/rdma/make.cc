#include "transfer/rdma/make.h"

#include "transfer/rdma/rdma_rails.h"

namespace millrace::transfer::rdma {

std::unique_ptr<RailKind> MakeRdmaRails(const RailEnvironment& environment) {
  return std::make_unique<RdmaRails>(environment, SystemVerbs());
}

}  // namespace millrace::transfer::rdma
