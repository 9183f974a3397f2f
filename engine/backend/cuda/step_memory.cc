// What a step runner owns: the plan of its memory, the decode graphs, creation and destruction.
#include <algorithm>
#include <cstdio>

#include "engine/backend/cuda/kernels/decode_attention.h"
#include "engine/backend/cuda/kernels/grouped_gemm.h"
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
  for (int pass = 0; pass < (options_.with_mtp ? 2 : 1); ++pass) {
    b.inputs[pass] = layout.Place<int32_t>(InputsMax());
    b.page_tables[pass] = layout.Place<int32_t>(rows * static_cast<size_t>(table_stride()));
  }
  b.attention_workspace = layout.Place<std::byte>(AttentionWorkspaceBytes());
  b.residual = layout.Place<float>(rows * hidden);
  b.normed = layout.Place<__nv_bfloat16>(rows * hidden);
  b.qkv = layout.Place<__nv_bfloat16>(rows * static_cast<size_t>(shape_.qkv_width()));
  b.query = layout.Place<__nv_bfloat16>(rows * static_cast<size_t>(shape_.q_width()));
  b.attended = layout.Place<__nv_bfloat16>(rows * static_cast<size_t>(shape_.q_width()));
  b.gate_up = layout.Place<__nv_bfloat16>(rows * 2 * dense_width);
  b.activation = layout.Place<__nv_bfloat16>(
      std::max(rows * dense_width, slots * static_cast<size_t>(shape_.expert_width)));
  b.expert_out = layout.Place<__nv_bfloat16>(slots * hidden);
  if (shape_.fp8_experts) {
    const size_t widest = std::max(rows * hidden, slots * static_cast<size_t>(shape_.expert_width));
    b.quantized = layout.Place<uint8_t>(widest);
    b.quantized_scales = layout.Place<float>(widest / kScaleBlock);
  }
  b.router_logits = layout.Place<float>(rows * static_cast<size_t>(shape_.num_experts));
  b.route_blocks = layout.Place<int32_t>(1);
  b.experts = layout.Place<int32_t>(slots);
  b.expert_weights = layout.Place<float>(slots);
  b.expert_offsets = layout.Place<int32_t>(static_cast<size_t>(shape_.experts_all()) + 1);
  b.slots = layout.Place<int32_t>(slots);
  b.slot_tokens = layout.Place<int32_t>(slots);
  b.slot_weights = layout.Place<float>(slots);
  b.head_input = layout.Place<__nv_bfloat16>(logits * hidden);
  b.draws = layout.Place<DrawRow>(logits);
  b.drawn = layout.Place<int32_t>(logits);
  b.logits = layout.Place<float>(logits * vocab);
  if (options_.with_mtp) {
    b.mtp_input = layout.Place<__nv_bfloat16>(rows * 2 * hidden);
    b.mtp_logits = layout.Place<float>(logits * vocab);
  }
  return layout.bytes();
}

size_t StepRunner::PlaceHost(std::byte* base) {
  Layout layout(base);
  const size_t logits = static_cast<size_t>(options_.logit_rows_max) * static_cast<size_t>(shape_.vocab);
  host_logits_ = layout.Place<float>(logits);
  host_draws_ = layout.Place<DrawRow>(static_cast<size_t>(options_.logit_rows_max));
  host_drawn_ = layout.Place<int32_t>(static_cast<size_t>(options_.logit_rows_max));
  if (options_.with_mtp) host_mtp_logits_ = layout.Place<float>(logits);
  for (int pass = 0; pass < (options_.with_mtp ? 2 : 1); ++pass) {
    host_inputs_[pass] = layout.Place<int32_t>(InputsMax());
    host_tables_[pass] = layout.Place<int32_t>(static_cast<size_t>(padded_rows_max_) * table_stride());
  }
  return layout.bytes();
}

// Integers of the largest input block: every row a sequence of its own.
size_t StepRunner::InputsMax() const {
  PassCounts counts;
  counts.rows = counts.singles = counts.longer = padded_rows_max_;
  counts.logits = padded_logits_max_;
  return InputsSize(counts);
}

size_t StepRunner::AttentionWorkspaceBytes() const {
  return DecodeAttentionWorkspaceBytes(std::min(padded_rows_max_, kDecodeAttentionSeqsMax), shape_.heads,
                                       shape_.kv_heads, shape_.head_dim);
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
  MR_CUDA(cudaMemset(buffers_->attention_workspace, 0, AttentionWorkspaceBytes()));
  MR_CUDA(cudaMemset(buffers_->route_blocks, 0, sizeof(int32_t)));
  if (options_.mirror) MR_CUDA_TRY(PinnedMemory::Allocate(kv_bytes, "the mirror of the KV pages", &mirror_));

  MR_CUDA_TRY(PinnedMemory::Allocate(PlaceHost(nullptr), "inputs and logits", &host_));
  PlaceHost(host_.data());
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
    PassCounts padded;
    padded.rows = padded.logits = padded.singles = rows;
    Pass pass;
    MR_CUDA_TRY(UploadPass(Batch(), PassKind::kMain, padded, &pass));
    MR_CUDA_TRY(EnqueueMain(pass));
    MR_CUDA(cudaStreamSynchronize(compute_));
    MR_CUDA(cudaStreamBeginCapture(compute_, cudaStreamCaptureModeThreadLocal));
    const Result enqueued = EnqueueMain(pass);
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
