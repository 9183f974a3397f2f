// An MoE layer of an expert group. Rows are read where their rank wrote them, and products are read where
// their owner wrote them, so that nothing is copied but each rank's own rows, once.
#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "engine/backend/cpu/moe_layer.h"
#include "engine/backend/cpu/packing.h"

namespace millrace::engine {

Status FfnRunner::RunInGroup(const LayerWeights& layer, std::span<const FfnWeights> experts, int32_t index,
                             std::span<const void* const> normed, std::span<const void* const> x,
                             std::span<float* const> residual, const Trace& trace) {
  if (!x.empty()) {
    Route(layer, normed, trace);
    SendRows(index, x);
  }
  MR_RETURN_IF_ERROR(group_->Dispatch(static_cast<int32_t>(x.size())));
  ClearJobs();
  MR_RETURN_IF_ERROR(TakeRows(experts));
  const bool shared = layer.ffn.width > 0;
  if (shared && !x.empty()) {
    const size_t inner_bytes = ActivationBytes(format_, layer.ffn.width);
    jobs_.push_back({&layer.ffn, static_cast<int32_t>(in_rows_.size()), static_cast<int32_t>(x.size())});
    for (size_t t = 0; t < x.size(); ++t) AddRow(x[t], shared_[t], std::nullopt, inner_bytes);
  }
  if (!jobs_.empty()) RunJobs();
  MR_RETURN_IF_ERROR(group_->Combine());
  if (!x.empty()) AddProducts(residual, shared);
  return OkStatus();
}

// Shows this rank's rows, and which rank computes each of their experts.
void FfnRunner::SendRows(int32_t index, std::span<const void* const> x) {
  const auto top_k = static_cast<size_t>(config_.experts_per_token);
  const size_t slots = x.size() * top_k;
  std::byte* const rows = group_->outgoing_rows();
  const size_t row_bytes = group_->shape().row_bytes;
  uint8_t* const owners = group_->outgoing_owners();
  std::copy_n(expert_ids_.begin(), slots, group_->outgoing_experts());
  for (size_t s = 0; s < slots; ++s) {
    owners[s] = static_cast<uint8_t>(ChooseHolder(group_->Holders(index, expert_ids_[s]), group_->rank(),
                                                  static_cast<int32_t>(s / top_k)));
  }
  group_->CountLoad(index, std::span(expert_ids_).first(slots));
  pool_.Run(static_cast<int64_t>(x.size()), static_cast<int64_t>(x.size() * row_bytes), [&](int64_t t, int) {
    const auto r = static_cast<size_t>(t);
    std::memcpy(rows + r * row_bytes, x[r], row_bytes);
  });
}

// Sorts by expert the (row, slot) pairs of all ranks that this one owns: a job per expert, as in a single
// process. Products lie in the order of the pairs, which their rank knows too.
Status FfnRunner::TakeRows(std::span<const FfnWeights> experts) {
  MR_RETURN_IF_ERROR(ListPairs(experts));
  std::fill(expert_begin_.begin(), expert_begin_.end(), 0);
  for (const Pair& pair : pairs_) ++expert_begin_[static_cast<size_t>(pair.expert) + 1];
  for (size_t e = 0; e < experts.size(); ++e) {
    expert_begin_[e + 1] += expert_begin_[e];
    expert_next_[e] = expert_begin_[e];
  }
  const size_t inner_bytes = ActivationBytes(format_, config_.moe_intermediate_size);
  MR_CHECK(pairs_.size() * inner_bytes <= inner_.size());
  in_rows_.resize(pairs_.size());
  inner_rows_.resize(pairs_.size());
  out_rows_.resize(pairs_.size());
  inner_used_ = pairs_.size() * inner_bytes;
  int32_t last_home = -1;
  float* out = nullptr;
  for (const Pair& pair : pairs_) {
    if (pair.home != last_home) {
      last_home = pair.home;
      out = group_->ProductsFor(pair.home);
    }
    const auto place = static_cast<size_t>(expert_next_[static_cast<size_t>(pair.expert)]++);
    in_rows_[place] = pair.row;
    inner_rows_[place] = inner_.data() + place * inner_bytes;
    out_rows_[place] = out;
    out += config_.hidden_size;
  }
  for (size_t e = 0; e < experts.size(); ++e) {
    const int32_t count = expert_begin_[e + 1] - expert_begin_[e];
    if (count > 0) jobs_.push_back({&experts[e], expert_begin_[e], count});
  }
  return OkStatus();
}

// Copies what other ranks wrote, and believes none of it: they have gone on if this one was cast out.
Status FfnRunner::ListPairs(std::span<const FfnWeights> experts) {
  const auto top_k = static_cast<size_t>(config_.experts_per_token);
  const auto me = static_cast<uint8_t>(group_->rank());
  const size_t row_bytes = group_->shape().row_bytes;
  pairs_.clear();
  for (int32_t home = 0; home < group_->shape().num_ranks; ++home) {
    const GroupRows rows = group_->From(home);
    for (size_t s = 0; s < static_cast<size_t>(rows.count) * top_k; ++s) {
      if (rows.owners[s] != me) continue;
      const int32_t expert = rows.experts[s];
      if (expert < 0 || expert >= config_.num_experts || experts[static_cast<size_t>(expert)].width == 0) {
        MR_CHECK(!group_->current(), "rank {} sent a row for expert {}, which is not here", home, expert);
        return Aborted("the group has gone on without this rank");
      }
      pairs_.push_back({home, expert, rows.rows + s / top_k * row_bytes});
    }
  }
  return OkStatus();
}

// residual += weight * product, experts in ascending order, the shared one last: the order of a single
// process.
void FfnRunner::AddProducts(std::span<float* const> residual, bool shared) {
  const auto top_k = static_cast<size_t>(config_.experts_per_token);
  const size_t slots = residual.size() * top_k;
  const uint8_t* const owners = group_->outgoing_owners();
  const float* next[kRanksMax];
  for (int32_t rank = 0; rank < group_->shape().num_ranks; ++rank) next[rank] = nullptr;
  for (size_t s = 0; s < slots; ++s) {
    const float*& product = next[owners[s]];
    if (product == nullptr) product = group_->ProductsOf(owners[s]);
    products_[s] = product;
    product += config_.hidden_size;
  }
  pool_.Run(static_cast<int64_t>(residual.size()), static_cast<int64_t>(slots) * config_.hidden_size,
            [&](int64_t row, int) {
              const auto t = static_cast<size_t>(row);
              const std::span<int32_t> order = std::span(order_).subspan(t * top_k, top_k);
              for (size_t k = 0; k < top_k; ++k) order[k] = static_cast<int32_t>(t * top_k + k);
              std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
                return expert_ids_[static_cast<size_t>(a)] < expert_ids_[static_cast<size_t>(b)];
              });
              for (const int32_t s : order) {
                kernels_.add_scaled(products_[static_cast<size_t>(s)],
                                    expert_weights_[static_cast<size_t>(s)], config_.hidden_size,
                                    residual[t]);
              }
              if (shared) kernels_.add_scaled(shared_[t], 1.0f, config_.hidden_size, residual[t]);
            });
}

}  // namespace millrace::engine
