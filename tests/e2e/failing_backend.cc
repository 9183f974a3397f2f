// The linker puts this MakeCpuBackend before the real one (CMakeLists.txt): its backends fail for good at
// step number MILLRACE_FAIL_AT, as one does whose device is gone.

#include <cstdlib>
#include <memory>
#include <string>
#include <utility>

#include "base/check.h"
#include "engine/backend/cpu/cpu_backend.h"

namespace millrace::engine {
namespace {

class FailingBackend final : public Backend {
 public:
  FailingBackend(std::unique_ptr<Backend> real, int64_t fail_at) : real_(std::move(real)), left_(fail_at) {}

  const ModelConfig& config() const override { return real_->config(); }
  const KvLayout& kv_layout() const override { return real_->kv_layout(); }
  std::span<std::byte> kv_memory() override { return real_->kv_memory(); }
  std::string Describe() const override { return real_->Describe(); }
  Status ToHost(std::span<const PageId> pages) override { return real_->ToHost(pages); }
  Status FromHost(std::span<const PageId> pages) override { return real_->FromHost(pages); }
  StatusOr<StepOutput> Forward(const Batch& batch, const LayerDone& layer_done) override {
    if (left_ == 0 || --left_ == 0) return Internal("step: an illegal memory access was encountered");
    return real_->Forward(batch, layer_done);
  }
  StatusOr<std::span<const float>> ForwardMtp(std::span<const MtpSegment> segments) override {
    return real_->ForwardMtp(segments);
  }
  void RunParallel(int64_t num_tasks, int64_t work, absl::FunctionRef<void(int64_t)> task) override {
    real_->RunParallel(num_tasks, work, task);
  }

 private:
  const std::unique_ptr<Backend> real_;
  int64_t left_;
};

}  // namespace

StatusOr<std::unique_ptr<Backend>>
RealMakeCpuBackend(std::shared_ptr<const Weights> weights, const CpuBackendOptions& options) asm(
    "__real__ZN8millrace6engine14MakeCpuBackendESt10shared_ptrIKNS0_7WeightsEERKNS0_17CpuBackendOptionsE");
StatusOr<std::unique_ptr<Backend>>
MakeFailingBackend(std::shared_ptr<const Weights> weights, const CpuBackendOptions& options) asm(
    "__wrap__ZN8millrace6engine14MakeCpuBackendESt10shared_ptrIKNS0_7WeightsEERKNS0_17CpuBackendOptionsE");

StatusOr<std::unique_ptr<Backend>> MakeFailingBackend(std::shared_ptr<const Weights> weights,
                                                      const CpuBackendOptions& options) {
  const char* const fail_at = std::getenv("MILLRACE_FAIL_AT");
  MR_CHECK(fail_at != nullptr && std::atoll(fail_at) > 0, "MILLRACE_FAIL_AT: which step?");
  MR_ASSIGN_OR_RETURN(std::unique_ptr<Backend> real, RealMakeCpuBackend(std::move(weights), options));
  return std::unique_ptr<Backend>(std::make_unique<FailingBackend>(std::move(real), std::atoll(fail_at)));
}

}  // namespace millrace::engine
