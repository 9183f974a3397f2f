// One step on the device: inputs in, layers, logits out. step_memory.cc owns what a step computes in.
#include "engine/backend/cuda/step_runner.h"

#include <algorithm>
#include <cmath>

#include "engine/backend/cuda/kernels/combine.h"
#include "engine/backend/cuda/kernels/decode_attention.h"
#include "engine/backend/cuda/kernels/few_rows.h"
#include "engine/backend/cuda/kernels/grouped_gemm.h"
#include "engine/backend/cuda/kernels/norm.h"
#include "engine/backend/cuda/kernels/prefill_attention.h"
#include "engine/backend/cuda/kernels/qk_rope.h"
#include "engine/backend/cuda/kernels/quantize.h"
#include "engine/backend/cuda/kernels/router.h"
#include "engine/backend/cuda/step_buffers.h"

namespace millrace::engine::cuda {
namespace {

constexpr int32_t kDecodeSlotsPerExpert = 16;
// Larger products of few rows are bound by their bytes, which cuBLASLt streams as fast as the memory can.
constexpr int64_t kFewRowsWeightsMax = int64_t{32} << 20;

}  // namespace

Result StepRunner::Run(const Batch& batch, const LayerDone& layer_done, StepOutput* output) {
  const PassCounts counts = CountPass(batch, PassKind::kMain);
  const PassCounts mtp_counts = CountPass(batch, PassKind::kMtp);
  if (counts.rows > options_.rows_max || counts.logits > options_.logit_rows_max ||
      (mtp_counts.rows > 0 && !options_.with_mtp)) {
    return Result("a step of " + std::to_string(counts.rows) + " tokens and " +
                  std::to_string(counts.logits) + " rows of logits is larger than planned");
  }
  bool exports = false;
  for (const Segment& segment : batch.segments) exports |= segment.exported;
  const bool decode = IsDecode(batch, counts);
  PassCounts padded = counts;
  padded.rows = PadRows(counts.rows);
  padded.logits = decode ? padded.rows : PadRows(counts.logits);
  if (decode) padded.singles = padded.rows;
  Pass pass;
  pass.exporting = exports ? &batch : nullptr;
  MR_CUDA_TRY(UploadPass(batch, PassKind::kMain, padded, &pass));
  if (decode) {
    MR_CUDA(cudaGraphLaunch(graphs_.at(padded.rows), compute_));
  } else {
    MR_CUDA_TRY(EnqueueMain(pass));
  }
  if (mtp_counts.rows > 0) {
    PassCounts mtp_padded = mtp_counts;
    mtp_padded.rows = PadRows(mtp_counts.rows);
    mtp_padded.logits = PadRows(mtp_counts.logits);
    MR_CUDA_TRY(UploadPass(batch, PassKind::kMtp, mtp_padded, &pass));
    MR_CUDA_TRY(EnqueueMtp(pass));
  }
  const auto vocab = static_cast<size_t>(shape_.vocab);
  output->logits = {host_logits_, static_cast<size_t>(counts.logits) * vocab};
  output->mtp_logits = {host_mtp_logits_, static_cast<size_t>(mtp_counts.logits) * vocab};
  MR_CUDA_TRY(EnqueueOutputs(batch, counts.logits, output));
  if (!output->mtp_logits.empty()) {
    MR_CUDA(cudaMemcpyAsync(host_mtp_logits_, buffers_->mtp_logits, output->mtp_logits.size_bytes(),
                            cudaMemcpyDeviceToHost, compute_));
  }
  MR_CUDA_TRY(TellLayers(exports, shape_.num_layers + (mtp_counts.rows > 0 ? 1 : 0), layer_done));
  return FetchUndrawn(batch, output);
}

// Draws what segments ask for. Logits go to the host at once only if some row is nobody's to draw here: they
// are large (2.5 MB for four rows of Ling-mini), and a whole batch of them costs as much as a third of its
// step.
Result StepRunner::EnqueueOutputs(const Batch& batch, int32_t rows, StepOutput* output) {
  bool any = false;
  bool all = true;
  int32_t row = 0;
  for (const Segment& segment : batch.segments) {
    for (int32_t i = 0; i < segment.num_logits; ++i) {
      DrawRow& draw = host_draws_[row++] = DrawRow();
      if (!segment.draw.has_value() || segment.num_logits != 1) {
        all = false;
        continue;
      }
      any = true;
      draw.uniform = segment.draw->uniform;
      draw.inverse_temperature = segment.draw->temperature > 0 ? 1.0 / double{segment.draw->temperature} : 0;
      draw.top_p = segment.draw->top_p;
      draw.min_p = segment.draw->min_p;
      draw.top_k = segment.draw->top_k;
      draw.num_tokens = segment.draw->num_tokens;
    }
  }
  if (any) {
    const auto count = static_cast<size_t>(rows);
    MR_CUDA(cudaMemcpyAsync(buffers_->draws, host_draws_, count * sizeof(DrawRow), cudaMemcpyHostToDevice,
                            compute_));
    MR_CUDA(LaunchDraw({buffers_->logits, shape_.vocab, buffers_->draws, buffers_->drawn, rows}, compute_));
    MR_CUDA(cudaMemcpyAsync(host_drawn_, buffers_->drawn, count * sizeof(int32_t), cudaMemcpyDeviceToHost,
                            compute_));
    output->drawn = {host_drawn_, count};
  }
  if (!all) {
    MR_CUDA(cudaMemcpyAsync(host_logits_, buffers_->logits, output->logits.size_bytes(),
                            cudaMemcpyDeviceToHost, compute_));
  }
  return Result();
}

// After the step: logits of rows that the kernel was asked to draw and could not.
Result StepRunner::FetchUndrawn(const Batch& batch, StepOutput* output) {
  if (output->drawn.empty()) return Result();
  bool all = true;
  bool missed = false;
  size_t row = 0;
  for (const Segment& segment : batch.segments) {
    for (int32_t i = 0; i < segment.num_logits; ++i, ++row) {
      const bool asked = segment.draw.has_value() && segment.num_logits == 1;
      all &= asked;
      missed |= asked && output->drawn[row] < 0;
    }
  }
  if (!missed || !all)
    return Result();  // with a row that nobody was asked to draw, all logits are here already
  MR_CUDA(cudaMemcpyAsync(host_logits_, buffers_->logits, output->logits.size_bytes(), cudaMemcpyDeviceToHost,
                          compute_));
  MR_CUDA(cudaStreamSynchronize(compute_));
  return Result();
}

// Fills the host's block and copies it; of the page tables, the columns in use.
Result StepRunner::UploadPass(const Batch& batch, PassKind kind, const PassCounts& padded, Pass* pass) {
  const int at = kind == PassKind::kMain ? 0 : 1;
  const PassInputs host = PlaceInputs(host_inputs_[at], padded);
  FillPass(batch, kind, padded, host, host_tables_[at], table_stride());
  MR_CUDA(cudaMemcpyAsync(buffers_->inputs[at], host_inputs_[at],
                          static_cast<size_t>(host.end - host_inputs_[at]) * sizeof(int32_t),
                          cudaMemcpyHostToDevice, compute_));
  const size_t pitch = static_cast<size_t>(table_stride()) * sizeof(int32_t);
  const auto pages = static_cast<size_t>(PagesMax(batch));
  if (pages > 0) {
    MR_CUDA(cudaMemcpy2DAsync(buffers_->page_tables[at], pitch, host_tables_[at], pitch,
                              pages * sizeof(int32_t), static_cast<size_t>(padded.sequences()),
                              cudaMemcpyHostToDevice, compute_));
  }
  pass->inputs = PlaceInputs(buffers_->inputs[at], padded);
  pass->counts = padded;
  pass->page_table = buffers_->page_tables[at];
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

// What a graph can do: one token and its logits for each of not too many sequences.
bool StepRunner::IsDecode(const Batch& batch, const PassCounts& counts) const {
  if (counts.rows == 0 || counts.rows > graph_rows_max_ || counts.longer > 0) return false;
  for (const Segment& segment : batch.segments) {
    if (segment.num_logits != 1 || segment.exported) return false;
  }
  return true;
}

Result StepRunner::EnqueueMain(const Pass& pass) {
  MR_CUDA(LaunchEmbed(
      {pass.inputs.tokens, model_.embedding, buffers_->residual, pass.counts.rows, shape_.hidden}, compute_));
  MR_CUDA_TRY(Norm(nullptr, model_.layers.front().input_norm, pass.counts.rows));
  for (int32_t l = 0; l < shape_.num_layers; ++l) {
    const bool last = l + 1 == shape_.num_layers;
    MR_CUDA_TRY(EnqueueLayer(l, pass, last ? nullptr : model_.layers[static_cast<size_t>(l) + 1].input_norm));
  }
  return EnqueueHead(model_.final_norm, pass, buffers_->logits);
}

Result StepRunner::EnqueueMtp(const Pass& pass) {
  MtpInputArgs args;
  args.residual = buffers_->residual;
  args.index = pass.inputs.source;
  args.next_tokens = pass.inputs.tokens;
  args.table = model_.embedding;
  args.final_norm = model_.final_norm;
  args.hidden_norm = model_.mtp_hidden_norm;
  args.embedding_norm = model_.mtp_embedding_norm;
  args.out = buffers_->mtp_input;
  args.rows = pass.counts.rows;
  args.hidden = shape_.hidden;
  args.eps = shape_.eps;
  MR_CUDA(LaunchMtpInput(args, compute_));
  MR_CUDA_TRY(Multiply(model_.mtp_projection, buffers_->mtp_input, buffers_->residual, true, false,
                       pass.counts.rows, shape_.hidden, 2 * shape_.hidden));
  MR_CUDA_TRY(Norm(nullptr, model_.layers.back().input_norm, pass.counts.rows));
  MR_CUDA_TRY(EnqueueLayer(shape_.num_layers, pass, nullptr));
  return EnqueueHead(model_.mtp_final_norm, pass, buffers_->mtp_logits);
}

// From the normed residual to the residual; norms for the layer that follows, if `next_norm` is its weight.
Result StepRunner::EnqueueLayer(int32_t index, const Pass& pass, const float* next_norm) {
  const DeviceLayer& layer = model_.layers[static_cast<size_t>(index)];
  MR_CUDA_TRY(EnqueueAttention(layer, index, pass));
  MR_CUDA_TRY(Multiply(layer.attention_out, buffers_->attended, buffers_->residual, true, true,
                       pass.counts.rows, shape_.hidden, shape_.q_width()));
  if (!layer.moe) {
    MR_CUDA_TRY(Norm(layer.attention_out_bias, layer.post_norm, pass.counts.rows));
    return EnqueueDense(layer, pass, next_norm);
  }
  MR_CUDA_TRY(EnqueueRouting(layer, pass));
  MR_CUDA_TRY(FewRows(layer, pass) ? EnqueueFewRowsExperts(layer, pass) : EnqueueExperts(layer, pass));
  return EnqueueCombine(pass, next_norm);
}

Result StepRunner::EnqueueAttention(const DeviceLayer& layer, int32_t index, const Pass& pass) {
  MR_CUDA_TRY(Multiply(layer.qkv, buffers_->normed, buffers_->qkv, false, false, pass.counts.rows,
                       shape_.qkv_width(), shape_.hidden));
  auto* const kv_layer = reinterpret_cast<__nv_bfloat16*>(kv_.data() + options_.kv.piece_offset(index, 0));
  QkRopeArgs rope;
  rope.qkv = buffers_->qkv;
  rope.bias = layer.qkv_bias;
  rope.query_norm = layer.query_norm;
  rope.key_norm = layer.key_norm;
  rope.rope = model_.rope;
  rope.positions = pass.inputs.positions;
  rope.kv_slots = pass.inputs.kv_slots;
  rope.query = buffers_->query;
  rope.kv_layer = kv_layer;
  rope.rows = pass.counts.rows;
  rope.heads = shape_.heads;
  rope.kv_heads = shape_.kv_heads;
  rope.head_dim = shape_.head_dim;
  rope.pairs = shape_.rotary_pairs;
  rope.eps = shape_.eps;
  MR_CUDA(LaunchQkRope(rope, compute_));
  if (pass.exporting != nullptr) MR_CUDA_TRY(EnqueueExport(*pass.exporting, index));
  if (pass.counts.singles > 0) MR_CUDA_TRY(EnqueueSingles(pass, kv_layer));
  if (pass.counts.longer > 0) MR_CUDA_TRY(EnqueueLonger(pass, kv_layer));
  return Result();
}

Result StepRunner::EnqueueSingles(const Pass& pass, const __nv_bfloat16* kv_layer) {
  DecodeAttentionArgs args;
  args.num_q_heads = shape_.heads;
  args.num_kv_heads = shape_.kv_heads;
  args.head_dim = shape_.head_dim;
  args.scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
  args.q_stride = shape_.q_width();
  args.kv = kv_layer;
  args.page_table_stride = table_stride();
  args.out_stride = shape_.q_width();
  args.workspace = buffers_->attention_workspace;
  for (int32_t first = 0; first < pass.counts.singles; first += kDecodeAttentionSeqsMax) {
    args.num_seqs = std::min(pass.counts.singles - first, kDecodeAttentionSeqsMax);
    args.q = buffers_->query + first * args.q_stride;
    args.page_table = pass.page_table + first * args.page_table_stride;
    args.lengths = pass.inputs.lengths + first;
    args.out = buffers_->attended + first * args.out_stride;
    MR_CUDA(LaunchDecodeAttention(args, compute_));
  }
  return Result();
}

Result StepRunner::EnqueueLonger(const Pass& pass, const __nv_bfloat16* kv_layer) {
  const int64_t first_row = pass.counts.singles;
  PrefillAttentionArgs args;
  args.num_segments = pass.counts.longer;
  args.num_tokens = pass.counts.rows - pass.counts.singles;
  args.num_q_heads = shape_.heads;
  args.num_kv_heads = shape_.kv_heads;
  args.head_dim = shape_.head_dim;
  args.scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
  args.q = buffers_->query + first_row * shape_.q_width();
  args.q_stride = shape_.q_width();
  args.q_begin = pass.inputs.row_begin;
  args.kv_lengths = pass.inputs.lengths + first_row;
  args.kv = kv_layer;
  args.num_pages = options_.kv.num_pages;
  args.page_table = pass.page_table + first_row * table_stride();
  args.page_table_stride = table_stride();
  args.out = buffers_->attended + first_row * shape_.q_width();
  args.out_stride = shape_.q_width();
  MR_CUDA(LaunchPrefillAttention(args, compute_));
  return Result();
}

Result StepRunner::EnqueueDense(const DeviceLayer& layer, const Pass& pass, const float* next_norm) {
  const int32_t width = shape_.dense_width;
  MR_CUDA_TRY(Multiply(layer.gate_up, buffers_->normed, buffers_->gate_up, false, false, pass.counts.rows,
                       2 * width, shape_.hidden));
  MR_CUDA(LaunchSwiglu({buffers_->gate_up, buffers_->activation, pass.counts.rows, width}, compute_));
  MR_CUDA_TRY(Multiply(layer.down, buffers_->activation, buffers_->residual, true, true, pass.counts.rows,
                       shape_.hidden, width));
  return next_norm == nullptr ? Result() : Norm(nullptr, next_norm, pass.counts.rows);
}

SelectExpertsArgs StepRunner::Selection(const DeviceLayer& layer, const Pass& pass) const {
  SelectExpertsArgs select;
  select.logits = buffers_->router_logits;
  select.bias = layer.expert_bias;
  select.valid_rows = pass.inputs.valid_rows;
  select.experts = buffers_->experts;
  select.weights = buffers_->expert_weights;
  select.rows = pass.counts.rows;
  select.num_experts = shape_.num_experts;
  select.top_k = shape_.top_k;
  select.num_groups = shape_.num_groups;
  select.groups_per_token = shape_.groups_per_token;
  select.sigmoid = shape_.sigmoid_router;
  select.norm_topk_prob = shape_.norm_topk_prob;
  select.scaling = shape_.scaling;
  return select;
}

// The launches of few_rows.h do this layer.
bool StepRunner::FewRows(const DeviceLayer& layer, const Pass& pass) const {
  return pass.counts.rows <= kFewRowsMax && shape_.hidden <= kFewRowsHiddenMax &&
         layer.attention_out_bias == nullptr && layer.router_low == nullptr;
}

// From the residual to the normed rows and their experts; sorted slots unless few rows do without.
Result StepRunner::EnqueueRouting(const DeviceLayer& layer, const Pass& pass) {
  if (FewRows(layer, pass)) {
    FewRowsRouteArgs route;
    route.residual = buffers_->residual;
    route.norm_weight = layer.post_norm;
    route.router = layer.router;
    route.normed = buffers_->normed;
    route.logits = buffers_->router_logits;
    route.blocks_done = buffers_->route_blocks;
    route.select = Selection(layer, pass);
    route.hidden = shape_.hidden;
    route.eps = shape_.eps;
    MR_CUDA(LaunchFewRowsRoute(route, compute_));
    return Result();
  }
  MR_CUDA_TRY(Norm(layer.attention_out_bias, layer.post_norm, pass.counts.rows));
  MR_CUDA_TRY(Multiply(layer.router, buffers_->normed, buffers_->router_logits, true, false, pass.counts.rows,
                       shape_.num_experts, shape_.hidden));
  if (layer.router_low != nullptr) {
    MR_CUDA_TRY(Multiply(layer.router_low, buffers_->normed, buffers_->router_logits, true, true,
                         pass.counts.rows, shape_.num_experts, shape_.hidden));
  }
  MR_CUDA(LaunchSelectExperts(Selection(layer, pass), compute_));
  SortSlotsArgs sort;
  sort.experts = buffers_->experts;
  sort.weights = buffers_->expert_weights;
  sort.valid_rows = pass.inputs.valid_rows;
  sort.offsets = buffers_->expert_offsets;
  sort.slots = buffers_->slots;
  sort.tokens = buffers_->slot_tokens;
  sort.slot_weights = buffers_->slot_weights;
  sort.rows = pass.counts.rows;
  sort.num_experts = shape_.num_experts;
  sort.top_k = shape_.top_k;
  sort.num_shared = shape_.num_shared;
  MR_CUDA(LaunchSortSlots(sort, compute_));
  return Result();
}

Result StepRunner::EnqueueFewRowsExperts(const DeviceLayer& layer, const Pass& pass) {
  FewRowsExpertsArgs up;
  up.matrix = ExpertMatrix::kGateUp;
  up.tokens = pass.counts.rows;
  up.top_k = shape_.top_k;
  up.num_experts = shape_.num_experts;
  up.num_shared = shape_.num_shared;
  up.rows = 2 * shape_.expert_width;
  up.k = shape_.hidden;
  up.weights = layer.gate_up;
  up.experts = buffers_->experts;
  up.expert_weights = buffers_->expert_weights;
  up.valid_rows = pass.inputs.valid_rows;
  up.x = buffers_->normed;
  up.out = buffers_->activation;
  FewRowsExpertsArgs down = up;
  down.matrix = ExpertMatrix::kDown;
  down.rows = shape_.hidden;
  down.k = shape_.expert_width;
  down.weights = layer.down;
  down.x = buffers_->activation;
  down.out = buffers_->expert_out;
  if (shape_.fp8_experts) {
    up.type = down.type = ExpertType::kE4m3;
    up.weights = layer.gate_up_e4m3;
    up.weight_scales = layer.gate_up_scales;
    down.weights = layer.down_e4m3;
    down.weight_scales = layer.down_scales;
  }
  MR_CUDA(LaunchFewRowsExperts(up, compute_));
  MR_CUDA(LaunchFewRowsExperts(down, compute_));
  return Result();
}

Result StepRunner::EnqueueExperts(const DeviceLayer& layer, const Pass& pass) {
  // The crossover of grouped_gemm.h: slots per routed expert.
  const bool few = pass.counts.rows * shape_.top_k <= kDecodeSlotsPerExpert * shape_.num_experts;
  const auto launch = few ? LaunchGroupedGemmDecode : LaunchGroupedGemmPrefill;
  const int32_t slots = pass.counts.rows * shape_.slots_per_token();
  GroupedGemmArgs up;
  up.matrix = ExpertMatrix::kGateUp;
  up.num_experts = shape_.experts_all();
  up.rows = 2 * shape_.expert_width;
  up.k = shape_.hidden;
  up.num_slots_max = slots;
  up.weights = layer.gate_up;
  up.expert_offsets = buffers_->expert_offsets;
  up.x = buffers_->normed;
  up.x_stride = shape_.hidden;
  up.x_rows = buffers_->slot_tokens;
  up.out = buffers_->activation;
  up.out_stride = shape_.expert_width;
  if (shape_.fp8_experts) {
    up.weights = layer.gate_up_e4m3;
    up.weight_scales = layer.gate_up_scales;
    MR_CUDA_TRY(QuantizeInput(buffers_->normed, pass.counts.rows, &up));
  }
  MR_CUDA(launch(up, compute_));
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
  if (shape_.fp8_experts) {
    down.weights = layer.down_e4m3;
    down.weight_scales = layer.down_scales;
    MR_CUDA_TRY(QuantizeInput(buffers_->activation, slots, &down));
  }
  MR_CUDA(launch(down, compute_));
  return Result();
}

Result StepRunner::EnqueueCombine(const Pass& pass, const float* next_norm) {
  CombineArgs combine;
  combine.expert_out = buffers_->expert_out;
  combine.valid_rows = pass.inputs.valid_rows;
  combine.residual = buffers_->residual;
  combine.norm_weight = next_norm;
  combine.normed = buffers_->normed;
  combine.rows = pass.counts.rows;
  combine.slots_per_token = shape_.slots_per_token();
  combine.hidden = shape_.hidden;
  combine.eps = shape_.eps;
  MR_CUDA(LaunchCombine(combine, compute_));
  return Result();
}

// Makes `rows` bf16 rows of args->k the e4m3 input of a grouped product.
Result StepRunner::QuantizeInput(const __nv_bfloat16* x, int32_t rows, GroupedGemmArgs* args) {
  QuantizeRowsArgs quantize;
  quantize.num_rows = rows;
  quantize.k = args->k;
  quantize.x = x;
  quantize.x_stride = args->k;
  quantize.q = buffers_->quantized;
  quantize.scales = buffers_->quantized_scales;
  MR_CUDA(LaunchQuantizeRows(quantize, compute_));
  args->type = ExpertType::kE4m3;
  args->x = buffers_->quantized;
  args->x_stride = args->k;
  args->x_scales = buffers_->quantized_scales;
  args->x_scales_stride = args->k / kScaleBlock;
  return Result();
}

Result StepRunner::EnqueueHead(const float* norm, const Pass& pass, float* logits) {
  if (pass.counts.logits == 0) return Result();
  RmsNormArgs args;
  args.residual = buffers_->residual;
  args.weight = norm;
  args.index = pass.inputs.logit_rows;
  args.out = buffers_->head_input;
  args.rows = pass.counts.logits;
  args.hidden = shape_.hidden;
  args.eps = shape_.eps;
  MR_CUDA(LaunchRmsNorm(args, compute_));
  return Multiply(model_.head, buffers_->head_input, logits, true, false, pass.counts.logits, shape_.vocab,
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
  if (rows >= 1 && rows <= kFewRowsMax && int64_t{n} * k <= kFewRowsWeightsMax) {
    MR_CUDA(LaunchFewRowsGemm({weights, x, out, out_float, accumulate, rows, n, k}, compute_));
    return Result();
  }
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
