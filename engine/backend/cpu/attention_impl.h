#pragma once
// Attention of a block of queries over pages of 64 keys (online softmax: Milakov and Gimelshein 2018; blocked
// as in FlashAttention: Dao 2022). Included by kernels_impl.h.

#include "engine/backend/cpu/kernels.h"
#include "engine/backend/cpu/vector.h"

namespace millrace::engine::MILLRACE_KERNEL_NAMESPACE {

constexpr int32_t kPageKeys = 64;

MILLRACE_INLINE float Widen(float x) { return x; }
MILLRACE_INLINE float Widen(uint16_t x) { return Bits<float>(static_cast<uint32_t>(x) << 16); }

// keys [64][head_dim] -> out [head_dim][64] fp32, a multiple of 16 keys that covers `count`.
template <typename T>
MILLRACE_INLINE void TransposeKeys(const T* keys, int32_t head_dim, int32_t count, float* out) {
  for (int32_t key = 0; key < count; key += 16) {
    int32_t d = 0;
    if constexpr (kTransposeInRegisters) {
      for (; d + 16 <= head_dim; d += 16) {
        V16 block[16];
        for (int i = 0; i < 16; ++i) block[i] = Load(keys + static_cast<int64_t>(key + i) * head_dim + d);
        Transpose16(block);
        for (int i = 0; i < 16; ++i) Store(out + static_cast<int64_t>(d + i) * kPageKeys + key, block[i]);
      }
    }
    for (; d < head_dim; ++d) {
      for (int32_t i = key; i < key + 16; ++i) {
        out[static_cast<int64_t>(d) * kPageKeys + i] = Widen(keys[static_cast<int64_t>(i) * head_dim + d]);
      }
    }
  }
}

// scores[q][64] = query . key, one chain over the dimensions each.
template <int kQueries>
MILLRACE_INLINE void Scores(const float* const* queries, const float* keys, int32_t head_dim, float* scores) {
  for (int32_t first = 0; first < kPageKeys; first += 16 * kAttendVectors) {
    V16 sums[kQueries][kAttendVectors] = {};
    const float* at = keys + first;
    for (int32_t d = 0; d < head_dim; ++d, at += kPageKeys) {
      V16 key[kAttendVectors];
      for (int v = 0; v < kAttendVectors; ++v) key[v] = Load(at + 16 * v);
      for (int q = 0; q < kQueries; ++q) {
        for (int v = 0; v < kAttendVectors; ++v) sums[q][v] += key[v] * queries[q][d];
      }
    }
    for (int q = 0; q < kQueries; ++q) {
      for (int v = 0; v < kAttendVectors; ++v) Store(scores + q * kPageKeys + first + 16 * v, sums[q][v]);
    }
  }
}

// Turns one query's scores into weights against the running maximum, 0 for keys that it does not see. Returns
// what the sums so far are multiplied by.
MILLRACE_INLINE float Weights(float* scores, int32_t visible, float* state) {
  const I16x32 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const V16 none = Splat(-__builtin_inff());
  V16 masked[4];
  for (int v = 0; v < 4; ++v) masked[v] = lane < visible - 16 * v ? Load(scores + 16 * v) : none;
  const float before = state[0];
  const float largest = Max(Max(Max(masked[0], masked[1]), Max(masked[2], masked[3])));
  const float max = largest > before ? largest : before;
  V16 weights[4];
  for (int v = 0; v < 4; ++v) {
    weights[v] = Exp(masked[v] - max);
    Store(scores + 16 * v, weights[v]);
  }
  float change[16];
  Store(change, Exp(Splat(before - max)));
  state[0] = max;
  state[1] = state[1] * change[0] + Sum((weights[0] + weights[1]) + (weights[2] + weights[3]));
  return change[0];
}

// The last `lanes` values of a row whose length is no multiple of 16.
template <typename T>
MILLRACE_INLINE V16 LoadLanes(const T* p, int32_t lanes) {
  T padded[16] = {};
  std::memcpy(padded, p, static_cast<size_t>(lanes) * sizeof(T));
  return Load(padded);
}

// partial = partial * shrink + sum over keys of weight * value for dimensions from `first` on, one chain over
// the keys each; the last `lanes` dimensions if lanes < 16.
template <typename T, int kQueries, int kVectors>
MILLRACE_INLINE void AddValues(const T* values, int32_t head_dim, int32_t first, int32_t lanes, int32_t count,
                               const float* weights, const float* shrink, float* partials) {
  const int32_t stride = head_dim + 2;
  const bool whole = kVectors > 1 || lanes == 16;
  V16 sums[kQueries][kVectors];
  for (int q = 0; q < kQueries; ++q) {
    for (int v = 0; v < kVectors; ++v) {
      const float* const partial = partials + q * stride + first + 16 * v;
      sums[q][v] = Rounded((whole ? Load(partial) : LoadLanes(partial, lanes)) * shrink[q]);
    }
  }
  const T* at = values + first;
  for (int32_t key = 0; key < count; ++key, at += head_dim) {
    V16 value[kVectors];
    for (int v = 0; v < kVectors; ++v) value[v] = whole ? Load(at + 16 * v) : LoadLanes(at, lanes);
    for (int q = 0; q < kQueries; ++q) {
      for (int v = 0; v < kVectors; ++v) sums[q][v] += value[v] * weights[q * kPageKeys + key];
    }
  }
  for (int q = 0; q < kQueries; ++q) {
    for (int v = 0; v < kVectors; ++v) {
      std::memcpy(partials + q * stride + first + 16 * v, &sums[q][v],
                  static_cast<size_t>(lanes) * sizeof(float));
    }
  }
}

// kQueries queries, from `query` on, over one page.
template <typename T, int kQueries>
MILLRACE_INLINE void AttendTile(const AttentionArgs& args, int32_t query, int32_t page, const float* keys,
                                const T* values, float* scores) {
  const int32_t stride = args.head_dim + 2;
  float* const partials = args.partials + static_cast<int64_t>(query) * stride;
  Scores<kQueries>(args.queries + query, keys, args.head_dim, scores);
  float shrink[kQueries];
  int32_t count = 0;
  for (int q = 0; q < kQueries; ++q) {
    int32_t visible = args.num_keys[query + q] - page * kPageKeys;
    visible = visible < kPageKeys ? visible : kPageKeys;
    count = visible > count ? visible : count;
    shrink[q] = Weights(scores + q * kPageKeys, visible, partials + q * stride + args.head_dim);
  }
  int32_t d = 0;
  for (; d + 16 * kAttendVectors <= args.head_dim; d += 16 * kAttendVectors) {
    AddValues<T, kQueries, kAttendVectors>(values, args.head_dim, d, 16, count, scores, shrink, partials);
  }
  for (; d < args.head_dim; d += 16) {
    const int32_t lanes = args.head_dim - d < 16 ? args.head_dim - d : 16;
    AddValues<T, kQueries, 1>(values, args.head_dim, d, lanes, count, scores, shrink, partials);
  }
}

template <typename T>
void Attend(const AttentionArgs& args) {
  const int32_t stride = args.head_dim + 2;
  for (int32_t q = 0; q < args.num_queries; ++q) {
    float* const partial = args.partials + static_cast<int64_t>(q) * stride;
    for (int32_t d = 0; d < args.head_dim; ++d) partial[d] = 0;
    partial[args.head_dim] = -__builtin_inff();
    partial[args.head_dim + 1] = 0;
  }
  float* const keys = args.scratch;
  float* const scores = keys + static_cast<int64_t>(args.head_dim) * kPageKeys;
  int32_t q = 0;
  for (int32_t page = args.page_begin; page < args.page_end; ++page) {
    while (q < args.num_queries && args.num_keys[q] <= page * kPageKeys) ++q;  // sees nothing from here on
    if (q == args.num_queries) return;
    const int32_t left = args.num_keys[args.num_queries - 1] - page * kPageKeys;
    const char* const piece = args.pages[page];
    const auto* const values = reinterpret_cast<const T*>(piece + args.value_offset);
    TransposeKeys(reinterpret_cast<const T*>(piece + args.key_offset), args.head_dim,
                  left < kPageKeys ? left : kPageKeys, keys);
    int32_t at = q;
    for (; at + kAttendQueries <= args.num_queries; at += kAttendQueries) {
      AttendTile<T, kAttendQueries>(args, at, page, keys, values, scores);
    }
    if constexpr (kAttendQueries > 4) {
      for (; at + 4 <= args.num_queries; at += 4) AttendTile<T, 4>(args, at, page, keys, values, scores);
    }
    for (; at + 2 <= args.num_queries; at += 2) AttendTile<T, 2>(args, at, page, keys, values, scores);
    for (; at < args.num_queries; ++at) AttendTile<T, 1>(args, at, page, keys, values, scores);
  }
}

inline void MergePartials(float* into, const float* partial, int32_t head_dim) {
  const float max = into[head_dim] > partial[head_dim] ? into[head_dim] : partial[head_dim];
  if (!(max > -__builtin_inff())) return;  // neither has seen a key
  float factors[16];
  V16 exponents = {into[head_dim] - max, partial[head_dim] - max};
  Store(factors, Exp(exponents));
  for (int32_t d = 0; d < head_dim; ++d) into[d] = into[d] * factors[0] + partial[d] * factors[1];
  into[head_dim] = max;
  into[head_dim + 1] = into[head_dim + 1] * factors[0] + partial[head_dim + 1] * factors[1];
}

}  // namespace millrace::engine::MILLRACE_KERNEL_NAMESPACE
