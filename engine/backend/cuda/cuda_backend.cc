#include "engine/backend/cuda/cuda_backend.h"

#include "base/check.h"
#include "engine/backend/cuda/cuda_weights.h"
#include "engine/backend/cuda/step_runner.h"

namespace millrace::engine {
namespace {

class CudaBackend : public Backend {
 public:
  CudaBackend(std::shared_ptr<const CudaWeights> weights, const CudaBackendOptions& options,
              const KvLayout& layout, std::string device, std::unique_ptr<cuda::StepRunner> runner)
      : weights_(std::move(weights)),
        options_(options),
        layout_(layout),
        device_(std::move(device)),
        runner_(std::move(runner)) {}

  const ModelConfig& config() const override { return weights_->config(); }
  const KvLayout& kv_layout() const override { return layout_; }
  std::span<std::byte> kv_memory() override { return runner_->mirror(); }
  std::string Describe() const override {
    return fmt::format("cuda, {}, bfloat16{}", device_,
                       weights_->model.shape.fp8_experts ? ", experts in block FP8" : "");
  }
  Status ToHost(std::span<const PageId> pages) override { return ToStatus(runner_->ToHost(pages)); }
  Status FromHost(std::span<const PageId> pages) override { return ToStatus(runner_->FromHost(pages)); }

  StatusOr<StepOutput> Forward(const Batch& batch, const LayerDone& layer_done) override {
    for (const Segment& segment : batch.segments) Check(segment);
    StepOutput output;
    MR_RETURN_IF_ERROR(ToStatus(runner_->Run(batch, layer_done, &output)));
    return output;
  }

 private:
  void Check(const Segment& segment) const {
    const auto count = static_cast<int32_t>(segment.tokens.size());
    MR_CHECK(count > 0 && segment.position >= 0 && segment.num_logits <= count);
    MR_CHECK(segment.position + count <= config().max_position, "position {}", segment.position + count);
    MR_CHECK(static_cast<int32_t>(segment.pages.size()) >= PagesFor(segment.position + count),
             "page table too short");
    MR_CHECK(segment.next_tokens.empty() ||
             (options_.with_mtp && segment.next_tokens.size() == segment.tokens.size()));
    for (const auto tokens : {segment.tokens, segment.next_tokens}) {
      for (const int32_t token : tokens)
        MR_CHECK(token >= 0 && token < config().vocab_size, "token {}", token);
    }
  }

  const std::shared_ptr<const CudaWeights> weights_;  // shared by the backends of this process
  const CudaBackendOptions options_;
  const KvLayout layout_;
  const std::string device_;
  const std::unique_ptr<cuda::StepRunner> runner_;
};

}  // namespace

StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(std::shared_ptr<const Weights> weights,
                                                   const CudaBackendOptions& options) {
  auto cuda_weights = std::dynamic_pointer_cast<const CudaWeights>(std::move(weights));
  MR_CHECK(cuda_weights != nullptr, "weights of another backend");
  const ModelConfig& config = cuda_weights->config();
  if (options.num_pages < 1 || options.batch_tokens_max < 1 || options.logit_rows_max < 1) {
    return InvalidArgument("num_pages, batch_tokens_max and logit_rows_max must be at least 1");
  }
  CudaBackendOptions effective = options;
  effective.with_mtp = options.with_mtp && config.num_mtp_layers > 0;
  KvLayout layout;
  layout.num_layers = config.num_layers + (effective.with_mtp ? config.num_mtp_layers : 0);
  layout.num_pages = options.num_pages;
  layout.num_kv_heads = config.num_kv_heads;
  layout.head_dim = config.head_dim;
  layout.dtype = KvDType::kBf16;

  cuda::StepRunnerOptions runner_options;
  runner_options.kv = layout;
  runner_options.rows_max = options.batch_tokens_max;
  runner_options.logit_rows_max = options.logit_rows_max;
  runner_options.with_mtp = effective.with_mtp;
  std::unique_ptr<cuda::StepRunner> runner;
  MR_RETURN_IF_ERROR(ToStatus(cuda::StepRunner::Create(cuda_weights->model, runner_options, &runner)));
  cudaDeviceProp device = {};
  int ordinal = 0;
  cudaGetDevice(&ordinal);
  cudaGetDeviceProperties(&device, ordinal);
  return std::unique_ptr<Backend>(std::make_unique<CudaBackend>(std::move(cuda_weights), effective, layout,
                                                                device.name, std::move(runner)));
}

}  // namespace millrace::engine
