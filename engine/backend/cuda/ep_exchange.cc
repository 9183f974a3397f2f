#include "engine/backend/cuda/ep_exchange.h"

#include <vector>

namespace millrace::engine::cuda {
namespace {

std::string Ranks(uint32_t mask) {
  std::string text;
  for (int32_t rank = 0; rank < kEpRanksMax; ++rank) {
    if ((mask >> rank & 1) != 0) text += (text.empty() ? "rank " : ", ") + std::to_string(rank);
  }
  return text;
}

}  // namespace

Result EpExchange::Create(const EpExchangeOptions& options, std::unique_ptr<EpExchange>* exchange) {
  const EpShape& shape = options.shape;
  if (shape.ranks < 1 || shape.ranks > kEpRanksMax || options.rank < 0 || options.rank >= shape.ranks ||
      shape.top_k < 1 || shape.top_k > kEpTopKMax || shape.rows_max < 1 || options.num_experts < 1 ||
      options.num_experts > 0xffff || options.timeout_ns < 1 || options.ranks_on_device < 1) {
    return Result("expert exchange: a shape that the kernels cannot do");
  }
  std::unique_ptr<EpExchange> made(new EpExchange(options));
  const size_t bytes = PlaceEpWindow(shape, nullptr, &made->group_.windows[options.rank]);
  MR_CUDA_TRY(DeviceMemory::Allocate(bytes, "the window of the expert exchange", &made->window_));
  // Epochs start at zero. What else a window holds is read only where it has been written.
  MR_CUDA(cudaMemset(made->window_.data(), 0, bytes));
  Layout layout(nullptr);
  layout.Place<EpControl>(1);
  layout.Place<uint32_t>(static_cast<size_t>(options.num_experts));
  MR_CUDA_TRY(DeviceMemory::Allocate(layout.bytes(), "the state of the expert exchange", &made->state_));
  MR_CUDA(cudaMemset(made->state_.data(), 0, made->state_.bytes()));
  MR_CUDA_TRY(
      PinnedMemory::Allocate(sizeof(uint32_t), "the error word of the expert exchange", &made->error_));
  Layout state(made->state_.data());
  EpGroup& group = made->group_;
  group.shape = shape;
  group.rank = options.rank;
  group.control = state.Place<EpControl>(1);
  group.places = state.Place<uint32_t>(static_cast<size_t>(options.num_experts));
  group.timeout_ns = options.timeout_ns;
  int device = 0;
  int num_sms = 0;
  MR_CUDA(cudaGetDevice(&device));
  MR_CUDA(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  group.waiting_blocks_max = 4 * num_sms / options.ranks_on_device;
  void* host_error = nullptr;
  MR_CUDA(cudaHostGetDevicePointer(&host_error, made->error_.data(), 0));
  group.host_error = static_cast<uint32_t*>(host_error);
  MR_CUDA(cudaDeviceSynchronize());  // peers may write from now on
  *exchange = std::move(made);
  return Result();
}

EpExchange::~EpExchange() { cudaDeviceSynchronize(); }

Result EpExchange::Connect(std::span<std::byte* const> windows) {
  const EpShape& shape = options_.shape;
  if (windows.size() != static_cast<size_t>(shape.ranks))
    return Result("expert exchange: a window per rank is wanted");
  for (int32_t rank = 0; rank < shape.ranks; ++rank) {
    std::byte* const base = rank == options_.rank ? window_.data() : windows[static_cast<size_t>(rank)];
    if (base == nullptr) return Result("expert exchange: no window of " + Ranks(1u << rank));
    PlaceEpWindow(shape, base, &group_.windows[rank]);
  }
  return Result();
}

Result EpExchange::SetMembers(uint32_t alive, std::span<const uint32_t> places, uint32_t first_epoch) {
  if (places.size() != static_cast<size_t>(options_.num_experts) || (alive >> options_.rank & 1) == 0 ||
      alive >> options_.shape.ranks != 0 || first_epoch == 0) {
    return Result("expert exchange: members or placement of another group");
  }
  for (size_t expert = 0; expert < places.size(); ++expert) {
    const uint32_t rank = places[expert] >> 16;
    if (rank >= static_cast<uint32_t>(options_.shape.ranks) || (alive >> rank & 1) == 0) {
      return Result("expert exchange: expert " + std::to_string(expert) + " is on " + std::to_string(rank) +
                    ", which takes no part");
    }
  }
  EpControl control;
  control.epoch = first_epoch - 1;
  control.alive = alive;
  MR_CUDA(cudaMemcpy(group_.control, &control, sizeof(control), cudaMemcpyHostToDevice));
  MR_CUDA(cudaMemcpy(const_cast<uint32_t*>(group_.places), places.data(), places.size_bytes(),
                     cudaMemcpyHostToDevice));
  *reinterpret_cast<volatile uint32_t*>(error_.data()) = 0;
  return Result();
}

Result EpExchange::Dispatch(const __nv_bfloat16* x, const int32_t* experts, const float* weights,
                            int32_t rows, cudaStream_t stream) {
  MR_CUDA(LaunchEpDispatch({group_, x, experts, weights, rows}, stream));
  return Result();
}

Result EpExchange::Receive(int32_t* experts, float* weights, int32_t* valid_rows, int32_t rows,
                           cudaStream_t stream) {
  MR_CUDA(LaunchEpReceive({group_, experts, weights, valid_rows, rows}, stream));
  return Result();
}

Result EpExchange::Return(const __nv_bfloat16* expert_out, int32_t rows, cudaStream_t stream) {
  MR_CUDA(LaunchEpReturn({group_, expert_out, rows}, stream));
  return Result();
}

Result EpExchange::Combine(EpCombineArgs args, cudaStream_t stream) {
  args.group = group_;
  MR_CUDA(LaunchEpCombine(args, stream));
  return Result();
}

Result EpExchange::Check() const {
  const uint32_t word = *error();
  if (word == 0) return Result();
  const uint32_t phases = word >> 16;
  std::string what;
  const auto add = [&](EpPhase phase, const char* text) {
    if ((phases & static_cast<uint32_t>(phase)) != 0) what += (what.empty() ? "" : ", ") + std::string(text);
  };
  add(EpPhase::kDispatch, "did not dispatch");
  add(EpPhase::kReturn, "did not return its sums");
  add(EpPhase::kRows, "came with another number of rows");
  return Result("expert exchange: " + Ranks(word & 0xffff) + " " + what + " within " +
                std::to_string(options_.timeout_ns / 1000) + " us");
}

}  // namespace millrace::engine::cuda
