#pragma once
// Whether this build has RDMA rails is CMake's choice of file.

#include <memory>

#include "transfer/rail.h"

namespace millrace::transfer::rdma {

std::unique_ptr<RailKind> MakeRdmaRails(const RailEnvironment& environment);

}  // namespace millrace::transfer::rdma
