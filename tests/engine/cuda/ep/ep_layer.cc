#include "tests/engine/cuda/ep/ep_layer.h"

#include <algorithm>
#include <numeric>

#include "engine/backend/cuda/kernels/grouped_gemm.h"
#include "engine/backend/cuda/kernels/quantize.h"
#include "engine/backend/cuda/kernels/router.h"

namespace millrace::test {

using engine::cuda::EpExchange;
using engine::cuda::EpExchangeOptions;
using engine::cuda::EpPlace;
using engine::cuda::Result;

namespace {

void Check(const Result& result) {
  if (result.ok()) return;
  std::printf("FAIL %s\n", result.message().c_str());
  std::exit(1);
}

// Codes of e4m3 without its NaN, or normal bf16 values.
std::vector<uint8_t> RandomMatrix(const LayerShape& shape, size_t count, int inputs, uint32_t seed) {
  if (!shape.e4m3()) {
    const std::vector<Bf16> values = Normal(count, 1.0f / std::sqrt(static_cast<float>(inputs)), seed);
    std::vector<uint8_t> bytes(count * sizeof(Bf16));
    std::memcpy(bytes.data(), values.data(), bytes.size());
    return bytes;
  }
  std::mt19937 engine(seed);
  std::vector<uint8_t> codes(count);
  for (uint8_t& code : codes) {
    code = static_cast<uint8_t>(engine());
    if ((code & 0x7f) == 0x7f) code = 0;
  }
  return codes;
}

std::vector<float> RandomScales(size_t count, int inputs, uint32_t seed) {
  std::mt19937 engine(seed);
  std::uniform_real_distribution<float> draw(0.5f, 1.5f);
  std::vector<float> scales(count);
  for (float& scale : scales) scale = draw(engine) / (60 * std::sqrt(static_cast<float>(inputs)));
  return scales;
}

// The parts of `all` that belong to the experts of `hosted`.
template <typename T>
std::vector<T> Shard(const std::vector<T>& all, int experts, const std::vector<int>& hosted) {
  const size_t each = all.size() / static_cast<size_t>(experts);
  std::vector<T> shard;
  for (const int e : hosted) shard.insert(shard.end(), all.begin() + e * each, all.begin() + (e + 1) * each);
  return shard;
}

}  // namespace

std::vector<RankInput> MakeInputs(const LayerShape& shape, Routing routing, uint32_t seed) {
  std::mt19937 engine(seed);
  std::vector<RankInput> inputs;
  for (int rank = 0; rank < shape.ranks; ++rank) {
    RankInput& input = inputs.emplace_back();
    const size_t values = static_cast<size_t>(shape.rows) * shape.hidden;
    input.x = Normal(values, 1.0f, engine());
    input.local = Normal(values, 1.0f, engine());
    for (const Bf16 value : Normal(values, 1.0f, engine())) input.residual.push_back(__bfloat162float(value));
    const int valid = rank % 3 == 2 ? 0 : 1 + static_cast<int>(engine() % shape.rows);
    std::vector<int> order(shape.experts);
    std::iota(order.begin(), order.end(), 0);
    for (int row = 0; row < shape.rows; ++row) {
      std::shuffle(order.begin(), order.end(), engine);
      if (routing == Routing::kOneRank) {  // experts of the last rank first
        std::stable_partition(order.begin(), order.end(),
                              [&](int e) { return e % shape.ranks == shape.ranks - 1; });
      } else if (routing == Routing::kSkewed) {
        std::stable_partition(order.begin(), order.end(), [&](int e) { return e < 3; });
      }
      for (int j = 0; j < shape.top_k; ++j) {
        input.experts.push_back(row < valid ? order[j] : -1);
        input.weights.push_back(static_cast<float>(engine() % 1000 + 1) / 1000);
      }
    }
  }
  return inputs;
}

std::vector<uint32_t> Placement::Table(const LayerShape& shape, int source) const {
  std::vector<uint32_t> table;
  for (int e = 0; e < shape.experts; ++e) {
    std::vector<uint32_t> replicas;
    for (int rank = 0; rank < shape.ranks; ++rank) {
      if ((alive >> rank & 1) == 0) continue;
      const auto found = std::find(hosted[rank].begin(), hosted[rank].end(), e);
      if (found != hosted[rank].end()) {
        replicas.push_back(EpPlace(rank, static_cast<int32_t>(found - hosted[rank].begin())));
      }
    }
    EXPECT(!replicas.empty(), "expert %d is on no living rank", e);
    table.push_back(replicas[static_cast<size_t>(source) % replicas.size()]);
  }
  return table;
}

Placement SpreadExperts(const LayerShape& shape, int replicas) {
  Placement placement;
  placement.hosted.resize(shape.ranks);
  placement.alive = (1u << shape.ranks) - 1;
  for (int e = shape.experts - 1; e >= 0; --e) placement.hosted[e % shape.ranks].push_back(e);
  for (int rank = 0; rank < shape.ranks; ++rank) {
    for (int i = 0, e = rank; i < replicas && e < shape.experts; ++e) {
      if (e % shape.ranks == rank) continue;
      placement.hosted[rank].push_back(e);
      ++i;
    }
  }
  return placement;
}

LayerWeights::LayerWeights(const LayerShape& shape, uint32_t seed) {
  const size_t values = static_cast<size_t>(shape.experts) * shape.hidden * shape.width;
  gate_up = RandomMatrix(shape, 2 * values, shape.hidden, seed);
  down = RandomMatrix(shape, values, shape.width, seed + 1);
  gate_up_scales =
      RandomScales(std::max<size_t>(2 * values / (128 * 128), shape.experts), shape.hidden, seed + 2);
  down_scales = RandomScales(std::max<size_t>(values / (128 * 128), shape.experts), shape.width, seed + 3);
  for (const Bf16 value : Normal(shape.hidden, 1.0f, seed + 4)) norm.push_back(__bfloat162float(value));
}

struct LayerRank::Buffers {
  Buffers(const LayerShape& s, const LayerWeights& w, const std::vector<int>& hosted)
      : gate_up(Shard(w.gate_up, s.experts, hosted)),
        down(Shard(w.down, s.experts, hosted)),
        gate_up_scales(Shard(w.gate_up_scales, s.experts, hosted)),
        down_scales(Shard(w.down_scales, s.experts, hosted)),
        norm(w.norm),
        x(own(s) * s.hidden),
        experts(own(s) * s.top_k),
        weights(own(s) * s.top_k),
        residual(own(s) * s.hidden),
        local(own(s) * s.hidden),
        normed(own(s) * s.hidden),
        x_codes(own(s) * s.hidden),
        x_scales(own(s) * s.hidden / 128 + 1),
        served_experts(slots(s)),
        served_weights(slots(s)),
        valid_rows(1),
        offsets(hosted.size() + 1),
        slot_numbers(slots(s)),
        slot_tokens(slots(s)),
        slot_weights(slots(s)),
        activation(slots(s) * s.width),
        activation_codes(slots(s) * s.width),
        activation_scales(slots(s) * s.width / 128 + 1),
        expert_out(slots(s) * s.hidden) {}
  static size_t own(const LayerShape& s) { return static_cast<size_t>(s.rows_max); }
  static size_t slots(const LayerShape& s) { return own(s) * s.ranks * s.top_k; }
  Device<uint8_t> gate_up, down;
  Device<float> gate_up_scales, down_scales, norm;
  Device<Bf16> x;
  Device<int32_t> experts;
  Device<float> weights, residual;
  Device<Bf16> local, normed;
  Device<uint8_t> x_codes;  // the reference's quantised input
  Device<float> x_scales;
  Device<int32_t> served_experts;
  Device<float> served_weights;
  Device<int32_t> valid_rows, offsets, slot_numbers, slot_tokens;
  Device<float> slot_weights;
  Device<Bf16> activation;
  Device<uint8_t> activation_codes;
  Device<float> activation_scales;
  Device<Bf16> expert_out;
};

LayerRank::LayerRank(const LayerShape& shape, const LayerWeights& weights, const std::vector<int>& hosted,
                     int device)
    : shape_(shape), device_(device), num_hosted_(static_cast<int>(hosted.size())), rows_(shape.rows) {
  Use();
  CUDA_OK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  b_ = std::make_unique<Buffers>(shape, weights, hosted);
}

LayerRank::~LayerRank() {
  Use();
  exchange_.reset();
  b_.reset();
  cudaStreamDestroy(stream_);
}

void LayerRank::MakeExchange(int rank, int64_t timeout_ns, int ranks_on_device) {
  Use();
  EpExchangeOptions options;
  options.shape = {shape_.ranks, shape_.rows_max, shape_.hidden, shape_.top_k, shape_.payload};
  options.rank = rank;
  options.num_experts = shape_.experts;
  options.timeout_ns = timeout_ns;
  options.ranks_on_device = ranks_on_device;
  Check(EpExchange::Create(options, &exchange_));
  // All but the flags may hold anything.
  engine::cuda::EpWindow window;
  engine::cuda::PlaceEpWindow(options.shape, exchange_->window().data(), &window);
  std::byte* const chosen = reinterpret_cast<std::byte*>(window.chosen);
  CUDA_OK(cudaMemset(chosen, 0xff, exchange_->window().data() + exchange_->window().size() - chosen));
  CUDA_OK(cudaDeviceSynchronize());
}

void LayerRank::Set(const RankInput& input) {
  Use();
  b_->x.Set(input.x);
  b_->experts.Set(input.experts);
  b_->weights.Set(input.weights);
  b_->residual.Set(input.residual);
  b_->local.Set(input.local);
  b_->normed.Poison();
  b_->expert_out.Poison();
  b_->activation.Poison();
  CUDA_OK(cudaDeviceSynchronize());
}

void LayerRank::Dispatch() {
  Use();
  Check(exchange_->Dispatch(b_->x.get(), b_->experts.get(), b_->weights.get(), rows_, stream_));
}

void LayerRank::Serve() {
  Use();
  Check(exchange_->Receive(b_->served_experts.get(), b_->served_weights.get(), b_->valid_rows.get(), rows_,
                           stream_));
  Experts(exchange_->tokens(), exchange_->scales(), shape_.ranks * rows_);
}

void LayerRank::Experts(const void* tokens, const float* scales, int rows) {
  const bool e4m3 = shape_.e4m3();
  engine::cuda::SortSlotsArgs sort;
  sort.experts = b_->served_experts.get();
  sort.weights = b_->served_weights.get();
  sort.valid_rows = b_->valid_rows.get();
  sort.offsets = b_->offsets.get();
  sort.slots = b_->slot_numbers.get();
  sort.tokens = b_->slot_tokens.get();
  sort.slot_weights = b_->slot_weights.get();
  sort.rows = rows;
  sort.num_experts = num_hosted_;
  sort.top_k = shape_.top_k;
  CUDA_OK(engine::cuda::LaunchSortSlots(sort, stream_));
  engine::cuda::GroupedGemmArgs up;
  up.matrix = engine::cuda::ExpertMatrix::kGateUp;
  up.type = e4m3 ? engine::cuda::ExpertType::kE4m3 : engine::cuda::ExpertType::kBf16;
  up.num_experts = num_hosted_;
  up.rows = 2 * shape_.width;
  up.k = shape_.hidden;
  up.num_slots_max = rows * shape_.top_k;
  up.weights = b_->gate_up.get();
  up.weight_scales = b_->gate_up_scales.get();
  up.expert_offsets = b_->offsets.get();
  up.x = tokens;
  up.x_stride = shape_.hidden;
  up.x_rows = b_->slot_tokens.get();
  up.x_scales = scales;
  up.x_scales_stride = shape_.hidden / 128;
  up.out = b_->activation.get();
  up.out_stride = shape_.width;
  CUDA_OK(engine::cuda::LaunchGroupedGemmDecode(up, stream_));
  engine::cuda::GroupedGemmArgs down = up;
  down.matrix = engine::cuda::ExpertMatrix::kDown;
  down.rows = shape_.hidden;
  down.k = shape_.width;
  down.weights = b_->down.get();
  down.weight_scales = b_->down_scales.get();
  down.x = b_->activation.get();
  down.x_stride = shape_.width;
  down.x_rows = nullptr;
  down.out = b_->expert_out.get();
  down.out_stride = shape_.hidden;
  down.out_rows = b_->slot_numbers.get();
  down.slot_scale = b_->slot_weights.get();
  if (e4m3) {
    CUDA_OK(engine::cuda::LaunchQuantizeRows(
        {rows * shape_.top_k, shape_.width, b_->activation.get(), shape_.width, b_->activation_codes.get(),
         b_->activation_scales.get()},
        stream_));
    down.x = b_->activation_codes.get();
    down.x_scales = b_->activation_scales.get();
    down.x_scales_stride = shape_.width / 128;
  }
  CUDA_OK(engine::cuda::LaunchGroupedGemmDecode(down, stream_));
}

void LayerRank::Return() {
  Use();
  Check(exchange_->Return(b_->expert_out.get(), rows_, stream_));
}

void LayerRank::Combine() {
  Use();
  engine::cuda::EpCombineArgs args;
  args.experts = b_->experts.get();
  args.local = b_->local.get();
  args.residual = b_->residual.get();
  args.norm_weight = b_->norm.get();
  args.normed = b_->normed.get();
  args.rows = rows_;
  args.eps = 1e-6f;
  Check(exchange_->Combine(args, stream_));
}

void LayerRank::Synchronize() {
  Use();
  CUDA_OK(cudaStreamSynchronize(stream_));
}

std::vector<float> LayerRank::Residual() {
  Use();
  std::vector<float> all = b_->residual.Get();
  all.resize(static_cast<size_t>(rows_) * shape_.hidden);
  return all;
}

std::vector<Bf16> LayerRank::Normed() {
  Use();
  std::vector<Bf16> all = b_->normed.Get();
  all.resize(static_cast<size_t>(rows_) * shape_.hidden);
  return all;
}

std::vector<Bf16> LayerRank::ExpertOutputs() {
  Use();
  b_->served_experts.Set(b_->experts.Get());
  b_->served_weights.Set(b_->weights.Get());
  b_->valid_rows.Set({rows_});
  const void* tokens = b_->x.get();
  if (shape_.e4m3()) {
    CUDA_OK(engine::cuda::LaunchQuantizeRows(
        {rows_, shape_.hidden, b_->x.get(), shape_.hidden, b_->x_codes.get(), b_->x_scales.get()}, stream_));
    tokens = b_->x_codes.get();
  }
  CUDA_OK(cudaDeviceSynchronize());
  Experts(tokens, b_->x_scales.get(), rows_);
  return b_->expert_out.Get();
}

std::vector<std::vector<float>> ExpectedResiduals(const LayerShape& shape,
                                                  const std::vector<RankInput>& inputs,
                                                  const Placement& placement, LayerRank& reference) {
  std::vector<std::vector<float>> expected;
  for (int source = 0; source < shape.ranks; ++source) {
    const RankInput& input = inputs[source];
    reference.Set(input);
    const std::vector<Bf16> outputs = reference.ExpertOutputs();
    const std::vector<uint32_t> table = placement.Table(shape, source);
    std::vector<float>& residual = expected.emplace_back(input.residual);
    for (int row = 0; row < shape.rows; ++row) {
      for (int c = 0; c < shape.hidden; ++c) {
        float sum = 0;
        for (int rank = 0; rank < shape.ranks; ++rank) {
          float part = 0;
          bool any = false;
          for (int j = 0; j < shape.top_k; ++j) {
            const int expert = input.experts[row * shape.top_k + j];
            if (expert < 0 || static_cast<int>(table[expert] >> 16) != rank) continue;
            any = true;
            part += __bfloat162float(outputs[(size_t(row) * shape.top_k + j) * shape.hidden + c]);
          }
          if (any) sum += __bfloat162float(__float2bfloat16(part));
        }
        sum += __bfloat162float(input.local[size_t(row) * shape.hidden + c]);
        residual[size_t(row) * shape.hidden + c] += sum;
      }
    }
  }
  return expected;
}

LayerGroup::LayerGroup(const LayerShape& s, const LayerWeights& weights, const Placement& placement,
                       int devices, int64_t timeout_ns)
    : shape(s) {
  std::vector<std::byte*> windows;
  for (int rank = 0; rank < shape.ranks; ++rank) {
    ranks.push_back(std::make_unique<LayerRank>(shape, weights, placement.hosted[rank], rank % devices));
    ranks.back()->MakeExchange(rank, timeout_ns, (shape.ranks + devices - 1) / devices);
    windows.push_back(ranks.back()->exchange().window().data());
  }
  for (auto& rank : ranks) {
    rank->Use();
    Check(rank->exchange().Connect(windows));
  }
  SetMembers(placement, 1);
}

void LayerGroup::SetMembers(const Placement& placement, uint32_t first_epoch) {
  for (int rank = 0; rank < shape.ranks; ++rank) {
    if ((placement.alive >> rank & 1) == 0) continue;
    ranks[rank]->Use();
    Check(ranks[rank]->exchange().SetMembers(placement.alive, placement.Table(shape, rank), first_epoch));
  }
}

void LayerGroup::Set(const std::vector<RankInput>& inputs) {
  for (int rank = 0; rank < shape.ranks; ++rank) ranks[rank]->Set(inputs[rank]);
}

void LayerGroup::Step() {
  for (auto& rank : ranks) rank->Step();
}

void LayerGroup::Synchronize() {
  for (auto& rank : ranks) rank->Synchronize();
}

}  // namespace millrace::test
