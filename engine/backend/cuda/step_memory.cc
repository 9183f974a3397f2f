// What a step runner owns: the plan of its memory, the decode graphs, creation and destruction.
#include <algorithm>
#include <cstdio>

#include "engine/backend/cuda/step_buffers.h"

namespace millrace::engine::cuda {
namespace {

// Decode batches are padded up to one of these; beyond the last, rows are padded to a multiple of kRowTile.
constexpr int32_t kBuckets[] = {1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256};
constexpr int32_t kRowTile = 64;

std::string Gigabytes(size_t bytes) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.2f GB", static_cast<double>(bytes) / 1e9);
  return text;
}

}  // namespace

int32_t PadRows(int32_t rows) {
  if (rows == 0) return 0;
  for (const int32_t bucket : kBuckets) {
    if (rows <= bucket) return bucket;
  }
  return (rows + kRowTile - 1) / kRowTile * kRowTile;
}

StepRunner::StepRunner(const DeviceModel& model, const StepRunnerOptions& options)
    : model_(model), shape_(model_.shape), options_(options), buffers_(std::make_unique<Buffers>()) {}

Result StepRunner::Create(const DeviceModel& model, const StepRunnerOptions& options,
                          std::unique_ptr<StepRunner>* runner) {
  std::unique_ptr<StepRunner> made(new StepRunner(model, options));
  MR_CUDA_TRY(made->Allocate());
  MR_CUDA_TRY(made->CaptureGraphs());
  *runner = std::move(made);
  return Result();
}

size_t StepRunner::PlaceBuffers(std::byte* base) {
  Layout layout(base);
  const auto rows = static_cast<size_t>(padded_rows_max_);
  const auto logits = static_cast<size_t>(padded_logits_max_);
  const auto hidden = static_cast<size_t>(shape_.hidden);
  const auto vocab = static_cast<size_t>(shape_.vocab);
  const size_t slots = rows * static_cast<size_t>(shape_.slots_per_token());
  const size_t dense_width = shape_.dense_layers > 0 ? static_cast<size_t>(shape_.dense_width) : 0;
  Buffers& b = *buffers_;
  b.inputs = layout.Place<int32_t>(InputsMax());
  b.residual = layout.Place<float>(rows * hidden);
  b.normed = layout.Place<__nv_bfloat16>(rows * hidden);
  b.qkv = layout.Place<__nv_bfloat16>(rows * static_cast<size_t>(shape_.qkv_width()));
  b.query = layout.Place<__nv_bfloat16>(rows * static_cast<size_t>(shape_.q_width()));
  b.attended = layout.Place<__nv_bfloat16>(rows * static_cast<size_t>(shape_.q_width()));
  b.gate_up = layout.Place<__nv_bfloat16>(rows * 2 * dense_width);
  b.activation = layout.Place<__nv_bfloat16>(
      std::max(rows * dense_width, slots * static_cast<size_t>(shape_.expert_width)));
  b.expert_out = layout.Place<__nv_bfloat16>(slots * hidden);
  b.router_logits = layout.Place<float>(rows * static_cast<size_t>(shape_.num_experts));
  b.experts = layout.Place<int32_t>(slots);
  b.expert_weights = layout.Place<float>(slots);
  b.expert_offsets = layout.Place<int32_t>(static_cast<size_t>(shape_.experts_all()) + 1);
  b.slots = layout.Place<int32_t>(slots);
  b.slot_tokens = layout.Place<int32_t>(slots);
  b.slot_weights = layout.Place<float>(slots);
  b.head_input = layout.Place<__nv_bfloat16>(logits * hidden);
  b.logits = layout.Place<float>(logits * vocab);
  if (options_.with_mtp) {
    b.mtp_input = layout.Place<__nv_bfloat16>(rows * 2 * hidden);
    b.mtp_logits = layout.Place<float>(logits * vocab);
  }
  return layout.bytes();
}

// Integers of the largest input block: the row arrays of both passes, then every row with a full page table.
size_t StepRunner::InputsMax() const {
  const StepInputs end =
      StepInputs::Place(nullptr, padded_rows_max_, padded_logits_max_,
                        options_.with_mtp ? padded_rows_max_ : 0, options_.with_mtp ? padded_logits_max_ : 0);
  return static_cast<size_t>(end.pages - static_cast<int32_t*>(nullptr)) +
         static_cast<size_t>(options_.rows_max) * static_cast<size_t>(PagesFor(shape_.max_position));
}

Result StepRunner::Allocate() {
  padded_rows_max_ = PadRows(options_.rows_max);
  padded_logits_max_ = PadRows(options_.logit_rows_max);
  const size_t kv_bytes = options_.kv.total_bytes();
  const size_t scratch_bytes = PlaceBuffers(nullptr);
  MR_CUDA_TRY(Gemm::Create(&gemm_));
  size_t free_bytes = 0;
  size_t all_bytes = 0;
  MR_CUDA(cudaMemGetInfo(&free_bytes, &all_bytes));
  if (kv_bytes + scratch_bytes > free_bytes) {
    return Result("not enough GPU memory: KV pages " + Gigabytes(kv_bytes) + " + steps of " +
                  std::to_string(options_.rows_max) + " tokens " + Gigabytes(scratch_bytes) +
                  " are wanted, " + Gigabytes(free_bytes) + " of " + Gigabytes(all_bytes) +
                  " are free beside the weights");
  }
  MR_CUDA_TRY(DeviceMemory::Allocate(kv_bytes, "KV pages", &kv_));
  MR_CUDA(cudaMemset(kv_.data(), 0, kv_bytes));
  MR_CUDA_TRY(DeviceMemory::Allocate(scratch_bytes, "steps", &scratch_));
  PlaceBuffers(scratch_.data());
  if (options_.mirror) MR_CUDA_TRY(PinnedMemory::Allocate(kv_bytes, "the mirror of the KV pages", &mirror_));

  const size_t logits = static_cast<size_t>(options_.logit_rows_max) * static_cast<size_t>(shape_.vocab);
  const size_t inputs_bytes = (InputsMax() * sizeof(int32_t) + 255) / 256 * 256;
  MR_CUDA_TRY(PinnedMemory::Allocate(inputs_bytes + (options_.with_mtp ? 2 : 1) * logits * sizeof(float),
                                     "inputs and logits", &host_));
  host_inputs_ = reinterpret_cast<int32_t*>(host_.data());
  host_logits_ = reinterpret_cast<float*>(host_.data() + inputs_bytes);
  host_mtp_logits_ = host_logits_ + (options_.with_mtp ? logits : 0);

  MR_CUDA(cudaStreamCreateWithFlags(&compute_, cudaStreamNonBlocking));
  MR_CUDA(cudaStreamCreateWithFlags(&copy_, cudaStreamNonBlocking));
  for (int32_t l = 0; l < options_.kv.num_layers; ++l) {
    for (auto* events : {&kv_written_, &exported_}) {
      MR_CUDA(cudaEventCreateWithFlags(&events->emplace_back(), cudaEventDisableTiming));
    }
  }
  return Result();
}

// A first pass of each bucket outside the capture loads kernels and chooses algorithms; it has no valid row.
Result StepRunner::CaptureGraphs() {
  for (const int32_t rows : kBuckets) {
    if (rows > padded_rows_max_ || rows > padded_logits_max_) break;
    StepCounts padded;
    padded.rows = rows;
    padded.logits = rows;
    FillInputs(Batch(), padded, StepInputs::Place(host_inputs_, rows, rows, 0, 0));
    const StepInputs inputs = StepInputs::Place(buffers_->inputs, rows, rows, 0, 0);
    MR_CUDA(cudaMemcpyAsync(buffers_->inputs, host_inputs_,
                            static_cast<size_t>(inputs.pages - buffers_->inputs) * sizeof(int32_t),
                            cudaMemcpyHostToDevice, compute_));
    MR_CUDA_TRY(Enqueue(nullptr, inputs, padded));
    MR_CUDA(cudaStreamSynchronize(compute_));
    MR_CUDA(cudaStreamBeginCapture(compute_, cudaStreamCaptureModeThreadLocal));
    const Result enqueued = Enqueue(nullptr, inputs, padded);
    cudaGraph_t graph = nullptr;
    const cudaError_t ended = cudaStreamEndCapture(compute_, &graph);
    MR_CUDA_TRY(enqueued);
    MR_CUDA(ended);
    const cudaError_t made = cudaGraphInstantiate(&graphs_[rows], graph, 0);
    cudaGraphDestroy(graph);
    MR_CUDA(made);
    graph_rows_max_ = std::min({rows, options_.rows_max, options_.logit_rows_max});
  }
  return Result();
}

StepRunner::~StepRunner() {
  if (compute_ != nullptr) cudaStreamSynchronize(compute_);
  if (copy_ != nullptr) cudaStreamSynchronize(copy_);
  for (const auto& [rows, graph] : graphs_) {
    if (graph != nullptr) cudaGraphExecDestroy(graph);
  }
  for (const auto* events : {&kv_written_, &exported_}) {
    for (const cudaEvent_t event : *events) cudaEventDestroy(event);
  }
  for (const cudaStream_t stream : {compute_, copy_}) {
    if (stream != nullptr) cudaStreamDestroy(stream);
  }
}

}  // namespace millrace::engine::cuda
