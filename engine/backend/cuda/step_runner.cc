// One step on the device: inputs in, layers, logits out. step_memory.cc owns what a step computes in.
#include "engine/backend/cuda/step_runner.h"

#include <cmath>

#include "engine/backend/cuda/kernels/combine.h"
#include "engine/backend/cuda/kernels/norm.h"
#include "engine/backend/cuda/kernels/qk_rope.h"
#include "engine/backend/cuda/kernels/reference.h"
#include "engine/backend/cuda/kernels/router.h"
#include "engine/backend/cuda/step_buffers.h"

namespace millrace::engine::cuda {

Result StepRunner::Run(const Batch& batch, const LayerDone& layer_done, StepOutput* output) {
  const StepCounts counts = CountBatch(batch);
  if (counts.rows > options_.rows_max || counts.logits > options_.logit_rows_max ||
      (counts.mtp_rows > 0 && !options_.with_mtp)) {
    return Result("a step of " + std::to_string(counts.rows) + " tokens and " +
                  std::to_string(counts.logits) + " rows of logits is larger than planned");
  }
  StepCounts padded = counts;
  padded.rows = PadRows(counts.rows);
  padded.logits = PadRows(counts.logits);
  padded.mtp_rows = PadRows(counts.mtp_rows);
  padded.mtp_logits = PadRows(counts.mtp_logits);
  const bool decode = IsDecode(batch, counts);
  if (decode) padded.logits = padded.rows;
  const StepInputs host =
      StepInputs::Place(host_inputs_, padded.rows, padded.logits, padded.mtp_rows, padded.mtp_logits);
  FillInputs(batch, padded, host);
  const size_t input_bytes = static_cast<size_t>(host.pages + counts.pages - host_inputs_) * sizeof(int32_t);
  MR_CUDA(cudaMemcpyAsync(buffers_->inputs, host_inputs_, input_bytes, cudaMemcpyHostToDevice, compute_));
  bool exports = false;
  for (const Segment& segment : batch.segments) exports |= segment.exported;
  if (decode) {
    MR_CUDA(cudaGraphLaunch(graphs_.at(padded.rows), compute_));
  } else {
    const StepInputs inputs =
        StepInputs::Place(buffers_->inputs, padded.rows, padded.logits, padded.mtp_rows, padded.mtp_logits);
    MR_CUDA_TRY(Enqueue(exports ? &batch : nullptr, inputs, padded));
  }
  const auto vocab = static_cast<size_t>(shape_.vocab);
  const size_t logits = static_cast<size_t>(counts.logits) * vocab;
  const size_t mtp_logits = static_cast<size_t>(counts.mtp_logits) * vocab;
  MR_CUDA(cudaMemcpyAsync(host_logits_, buffers_->logits, logits * sizeof(float), cudaMemcpyDeviceToHost,
                          compute_));
  if (mtp_logits > 0) {
    MR_CUDA(cudaMemcpyAsync(host_mtp_logits_, buffers_->mtp_logits, mtp_logits * sizeof(float),
                            cudaMemcpyDeviceToHost, compute_));
  }
  MR_CUDA_TRY(TellLayers(exports, shape_.num_layers + (counts.mtp_rows > 0 ? 1 : 0), layer_done));
  output->logits = {host_logits_, logits};
  output->mtp_logits = {host_mtp_logits_, mtp_logits};
  return Result();
}

// Returns when the whole step is done.
Result StepRunner::TellLayers(bool exports, int32_t layers, const LayerDone& layer_done) {
  if (!exports) MR_CUDA(cudaStreamSynchronize(compute_));
  for (int32_t layer = 0; layer < layers; ++layer) {
    if (exports) MR_CUDA(cudaEventSynchronize(exported_[static_cast<size_t>(layer)]));
    if (layer_done) layer_done(layer);
  }
  if (exports) MR_CUDA(cudaStreamSynchronize(compute_));
  return Result();
}

bool StepRunner::IsDecode(const Batch& batch, const StepCounts& counts) const {
  if (counts.rows == 0 || counts.rows > graph_rows_max_ || counts.mtp_rows > 0) return false;
  for (const Segment& segment : batch.segments) {
    if (segment.tokens.size() != 1 || segment.num_logits != 1 || segment.exported) return false;
  }
  return true;
}

// `exporting` is the batch if one of its segments is exported, else null.
Result StepRunner::Enqueue(const Batch* exporting, const StepInputs& inputs, const StepCounts& padded) {
  const Pass pass = {&inputs.main, inputs.pages, padded.rows, padded.logits};
  MR_CUDA(LaunchEmbed({inputs.main.tokens, model_.embedding, buffers_->residual, padded.rows, shape_.hidden},
                      compute_));
  MR_CUDA_TRY(Norm(nullptr, model_.layers.front().input_norm, padded.rows));
  for (int32_t l = 0; l < shape_.num_layers; ++l) {
    const bool last = l + 1 == shape_.num_layers;
    MR_CUDA_TRY(EnqueueLayer(exporting, l, pass,
                             last ? nullptr : model_.layers[static_cast<size_t>(l) + 1].input_norm));
  }
  MR_CUDA_TRY(EnqueueHead(model_.final_norm, pass, buffers_->logits));
  if (padded.mtp_rows > 0) MR_CUDA_TRY(EnqueueMtp(exporting, inputs, padded));
  return Result();
}

Result StepRunner::EnqueueMtp(const Batch* exporting, const StepInputs& inputs, const StepCounts& padded) {
  const Pass pass = {&inputs.mtp, inputs.pages, padded.mtp_rows, padded.mtp_logits};
  MtpInputArgs args;
  args.residual = buffers_->residual;
  args.index = inputs.mtp_source;
  args.next_tokens = inputs.mtp.tokens;
  args.table = model_.embedding;
  args.final_norm = model_.final_norm;
  args.hidden_norm = model_.mtp_hidden_norm;
  args.embedding_norm = model_.mtp_embedding_norm;
  args.out = buffers_->mtp_input;
  args.rows = pass.rows;
  args.hidden = shape_.hidden;
  args.eps = shape_.eps;
  MR_CUDA(LaunchMtpInput(args, compute_));
  MR_CUDA_TRY(Multiply(model_.mtp_projection, buffers_->mtp_input, buffers_->residual, true, false, pass.rows,
                       shape_.hidden, 2 * shape_.hidden));
  MR_CUDA_TRY(Norm(nullptr, model_.layers.back().input_norm, pass.rows));
  MR_CUDA_TRY(EnqueueLayer(exporting, shape_.num_layers, pass, nullptr));
  return EnqueueHead(model_.mtp_final_norm, pass, buffers_->mtp_logits);
}

// From the normed residual to the residual; norms for the layer that follows, if `next_norm` is its weight.
Result StepRunner::EnqueueLayer(const Batch* exporting, int32_t index, const Pass& pass,
                                const float* next_norm) {
  const DeviceLayer& layer = model_.layers[static_cast<size_t>(index)];
  MR_CUDA_TRY(EnqueueAttention(layer, index, exporting, pass));
  MR_CUDA_TRY(Multiply(layer.attention_out, buffers_->attended, buffers_->residual, true, true, pass.rows,
                       shape_.hidden, shape_.q_width()));
  MR_CUDA_TRY(Norm(layer.attention_out_bias, layer.post_norm, pass.rows));
  return layer.moe ? EnqueueExperts(layer, pass, next_norm) : EnqueueDense(layer, pass, next_norm);
}

Result StepRunner::EnqueueAttention(const DeviceLayer& layer, int32_t index, const Batch* exporting,
                                    const Pass& pass) {
  MR_CUDA_TRY(Multiply(layer.qkv, buffers_->normed, buffers_->qkv, false, false, pass.rows,
                       shape_.qkv_width(), shape_.hidden));
  auto* const kv_layer = reinterpret_cast<__nv_bfloat16*>(kv_.data() + options_.kv.piece_offset(index, 0));
  QkRopeArgs rope;
  rope.qkv = buffers_->qkv;
  rope.bias = layer.qkv_bias;
  rope.query_norm = layer.query_norm;
  rope.key_norm = layer.key_norm;
  rope.rope = model_.rope;
  rope.positions = pass.inputs->positions;
  rope.kv_slots = pass.inputs->kv_slots;
  rope.query = buffers_->query;
  rope.kv_layer = kv_layer;
  rope.rows = pass.rows;
  rope.heads = shape_.heads;
  rope.kv_heads = shape_.kv_heads;
  rope.head_dim = shape_.head_dim;
  rope.pairs = shape_.rotary_pairs;
  rope.eps = shape_.eps;
  MR_CUDA(LaunchQkRope(rope, compute_));
  if (exporting != nullptr) MR_CUDA_TRY(EnqueueExport(*exporting, index));
  AttentionReferenceArgs attention;
  attention.query = buffers_->query;
  attention.kv_layer = kv_layer;
  attention.num_keys = pass.inputs->num_keys;
  attention.page_begin = pass.inputs->page_begin;
  attention.pages = pass.pages;
  attention.out = buffers_->attended;
  attention.rows = pass.rows;
  attention.heads = shape_.heads;
  attention.kv_heads = shape_.kv_heads;
  attention.head_dim = shape_.head_dim;
  attention.scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
  MR_CUDA(LaunchAttentionReference(attention, compute_));
  return Result();
}

Result StepRunner::EnqueueDense(const DeviceLayer& layer, const Pass& pass, const float* next_norm) {
  const int32_t width = shape_.dense_width;
  MR_CUDA_TRY(Multiply(layer.gate_up, buffers_->normed, buffers_->gate_up, false, false, pass.rows, 2 * width,
                       shape_.hidden));
  MR_CUDA(LaunchSwiglu({buffers_->gate_up, buffers_->activation, pass.rows, width}, compute_));
  MR_CUDA_TRY(Multiply(layer.down, buffers_->activation, buffers_->residual, true, true, pass.rows,
                       shape_.hidden, width));
  return next_norm == nullptr ? Result() : Norm(nullptr, next_norm, pass.rows);
}

Result StepRunner::EnqueueExperts(const DeviceLayer& layer, const Pass& pass, const float* next_norm) {
  MR_CUDA_TRY(Multiply(layer.router, buffers_->normed, buffers_->router_logits, true, false, pass.rows,
                       shape_.num_experts, shape_.hidden));
  if (layer.router_low != nullptr) {
    MR_CUDA_TRY(Multiply(layer.router_low, buffers_->normed, buffers_->router_logits, true, true, pass.rows,
                         shape_.num_experts, shape_.hidden));
  }
  SelectExpertsArgs select;
  select.logits = buffers_->router_logits;
  select.bias = layer.expert_bias;
  select.valid_rows = pass.inputs->valid_rows;
  select.experts = buffers_->experts;
  select.weights = buffers_->expert_weights;
  select.rows = pass.rows;
  select.num_experts = shape_.num_experts;
  select.top_k = shape_.top_k;
  select.num_shared = shape_.num_shared;
  select.num_groups = shape_.num_groups;
  select.groups_per_token = shape_.groups_per_token;
  select.sigmoid = shape_.sigmoid_router;
  select.norm_topk_prob = shape_.norm_topk_prob;
  select.scaling = shape_.scaling;
  MR_CUDA(LaunchSelectExperts(select, compute_));
  SortSlotsArgs sort;
  sort.experts = buffers_->experts;
  sort.weights = buffers_->expert_weights;
  sort.valid_rows = pass.inputs->valid_rows;
  sort.offsets = buffers_->expert_offsets;
  sort.slots = buffers_->slots;
  sort.tokens = buffers_->slot_tokens;
  sort.slot_weights = buffers_->slot_weights;
  sort.rows = pass.rows;
  sort.num_experts = shape_.num_experts;
  sort.top_k = shape_.top_k;
  sort.num_shared = shape_.num_shared;
  MR_CUDA(LaunchSortSlots(sort, compute_));

  GroupedGemmArgs up;
  up.matrix = ExpertMatrix::kGateUp;
  up.num_experts = shape_.experts_all();
  up.rows = 2 * shape_.expert_width;
  up.k = shape_.hidden;
  up.num_slots_max = pass.rows * shape_.slots_per_token();
  up.weights = layer.gate_up;
  up.expert_offsets = buffers_->expert_offsets;
  up.x = buffers_->normed;
  up.x_stride = shape_.hidden;
  up.x_rows = buffers_->slot_tokens;
  up.out = buffers_->activation;
  up.out_stride = shape_.expert_width;
  MR_CUDA(LaunchGroupedGemmReference(up, compute_));
  GroupedGemmArgs down = up;
  down.matrix = ExpertMatrix::kDown;
  down.rows = shape_.hidden;
  down.k = shape_.expert_width;
  down.weights = layer.down;
  down.x = buffers_->activation;
  down.x_stride = shape_.expert_width;
  down.x_rows = nullptr;
  down.out = buffers_->expert_out;
  down.out_stride = shape_.hidden;
  down.out_rows = buffers_->slots;
  down.slot_scale = buffers_->slot_weights;
  MR_CUDA(LaunchGroupedGemmReference(down, compute_));

  CombineArgs combine;
  combine.expert_out = buffers_->expert_out;
  combine.valid_rows = pass.inputs->valid_rows;
  combine.residual = buffers_->residual;
  combine.norm_weight = next_norm;
  combine.normed = buffers_->normed;
  combine.rows = pass.rows;
  combine.slots_per_token = shape_.slots_per_token();
  combine.hidden = shape_.hidden;
  combine.eps = shape_.eps;
  MR_CUDA(LaunchCombine(combine, compute_));
  return Result();
}

Result StepRunner::EnqueueHead(const float* norm, const Pass& pass, float* logits) {
  if (pass.logits == 0) return Result();
  RmsNormArgs args;
  args.residual = buffers_->residual;
  args.weight = norm;
  args.index = pass.inputs->logit_rows;
  args.out = buffers_->head_input;
  args.rows = pass.logits;
  args.hidden = shape_.hidden;
  args.eps = shape_.eps;
  MR_CUDA(LaunchRmsNorm(args, compute_));
  return Multiply(model_.head, buffers_->head_input, logits, true, false, pass.logits, shape_.vocab,
                  shape_.hidden);
}

// normed = RMSNorm(residual + bias)
Result StepRunner::Norm(const float* bias, const float* weight, int32_t rows) {
  RmsNormArgs args;
  args.residual = buffers_->residual;
  args.bias = bias;
  args.weight = weight;
  args.out = buffers_->normed;
  args.rows = rows;
  args.hidden = shape_.hidden;
  args.eps = shape_.eps;
  MR_CUDA(LaunchRmsNorm(args, compute_));
  return Result();
}

Result StepRunner::Multiply(const __nv_bfloat16* weights, const __nv_bfloat16* x, void* out, bool out_float,
                            bool accumulate, int32_t rows, int32_t n, int32_t k) {
  return gemm_->Run({weights, x, out, out_float, accumulate, rows, n, k}, compute_);
}

// The pages that exported segments write go to the mirror while the layer's attention runs.
Result StepRunner::EnqueueExport(const Batch& batch, int32_t layer) {
  const auto at = static_cast<size_t>(layer);
  MR_CUDA(cudaEventRecord(kv_written_[at], compute_));
  MR_CUDA(cudaStreamWaitEvent(copy_, kv_written_[at]));
  for (const Segment& segment : batch.segments) {
    if (!segment.exported) continue;
    const int32_t end = PagesFor(segment.position + static_cast<int64_t>(segment.tokens.size()));
    for (int32_t page = segment.position / kPageTokens; page < end; ++page) {
      const size_t offset = options_.kv.piece_offset(layer, segment.pages[static_cast<size_t>(page)]);
      MR_CUDA(cudaMemcpyAsync(mirror_.data() + offset, kv_.data() + offset, options_.kv.piece_bytes(),
                              cudaMemcpyDeviceToHost, copy_));
    }
  }
  MR_CUDA(cudaEventRecord(exported_[at], copy_));
  return Result();
}

Result StepRunner::ToHost(std::span<const PageId> pages) { return CopyPages(pages, cudaMemcpyDeviceToHost); }
Result StepRunner::FromHost(std::span<const PageId> pages) {
  return CopyPages(pages, cudaMemcpyHostToDevice);
}

// One copy per run of neighbouring pages: a row of it per layer.
Result StepRunner::CopyPages(std::span<const PageId> pages, cudaMemcpyKind direction) {
  const KvLayout& kv = options_.kv;
  const size_t layer_bytes = kv.piece_bytes() * static_cast<size_t>(kv.num_pages);
  for (size_t begin = 0; begin < pages.size();) {
    size_t end = begin + 1;
    while (end < pages.size() && pages[end] == pages[end - 1] + 1) ++end;
    const size_t offset = kv.piece_offset(0, pages[begin]);
    std::byte* to = kv_.data() + offset;
    const std::byte* from = mirror_.data() + offset;
    if (direction == cudaMemcpyDeviceToHost) {
      to = mirror_.data() + offset;
      from = kv_.data() + offset;
    }
    MR_CUDA(cudaMemcpy2DAsync(to, layer_bytes, from, layer_bytes, (end - begin) * kv.piece_bytes(),
                              static_cast<size_t>(kv.num_layers), direction, copy_));
    begin = end;
  }
  MR_CUDA(cudaStreamSynchronize(copy_));
  return Result();
}

Result StepRunner::ReplayDecode(int32_t rows, cudaStream_t* stream) {
  const auto graph = graphs_.find(PadRows(rows));
  if (graph == graphs_.end()) return Result("no decode graph for " + std::to_string(rows) + " rows");
  MR_CUDA(cudaGraphLaunch(graph->second, compute_));
  *stream = compute_;
  return Result();
}

}  // namespace millrace::engine::cuda
