// Decode and prefill attention against an fp64 softmax: page edges, ragged batches, NaN in every page and row
// that must not be read, and the promise that an output depends on its own sequence alone.

#include <algorithm>
#include <numeric>
#include <string>

#include "engine/backend/cuda/kernels/decode_attention.h"
#include "engine/backend/cuda/kernels/prefill_attention.h"
#include "tests/engine/cuda/hot/support.h"
#include "tests/engine/cuda/hot/tests.h"

namespace millrace::test {
namespace {

using namespace engine::cuda;  // NOLINT: the two kernels under test

struct Heads {
  int q;
  int kv;
  int dim;
};

// Sequences of the given lengths in shuffled pages; what no sequence owns is NaN.
struct Cache {
  Heads heads;
  std::vector<int32_t> lengths;
  int num_pages = 0;
  int stride = 0;  // of the table
  std::vector<int32_t> table;
  std::vector<Bf16> kv;

  Cache(Heads h, std::vector<int32_t> l, uint32_t seed) : heads(h), lengths(std::move(l)) {
    int used = 0;
    for (int length : lengths) {
      stride = std::max(stride, (length + 63) / 64 + 1);
      used += (length + 63) / 64;
    }
    num_pages = used + 3;
    std::vector<int32_t> pages(num_pages);
    std::iota(pages.begin(), pages.end(), 0);
    std::shuffle(pages.begin(), pages.end(), std::mt19937(seed));
    kv.assign(size_t(num_pages) * 2 * heads.kv * 64 * heads.dim, __float2bfloat16(NAN));
    table.assign(lengths.size() * stride, -1);
    size_t next = 0;
    const std::vector<Bf16> values = Normal(1 << 20, 1.0f, seed + 1);
    std::mt19937 engine(seed + 2);
    for (size_t s = 0; s < lengths.size(); ++s) {
      for (int token = 0; token < lengths[s]; ++token) {
        if (token % 64 == 0) table[s * stride + token / 64] = pages[next++];
        for (int v = 0; v < 2; ++v) {
          for (int head = 0; head < heads.kv; ++head) {
            std::copy_n(values.data() + engine() % (values.size() - heads.dim), heads.dim,
                        Row(s, token, v, head));
          }
        }
      }
    }
  }
  Bf16* Row(size_t s, int token, int v, int head) {
    const size_t page = table[s * stride + token / 64];
    return kv.data() + (((page * 2 + v) * heads.kv + head) * 64 + token % 64) * heads.dim;
  }
};

// Adds one head's output at one position to the comparison. `tokens`: how many keys it sees.
void CompareRow(Cache& cache, size_t s, int tokens, int head, const Bf16* q, const Bf16* out,
                Comparison* comparison) {
  const int dim = cache.heads.dim;
  const int kv_head = head / (cache.heads.q / cache.heads.kv);
  std::vector<double> p(tokens);
  double max = -INFINITY;
  for (int t = 0; t < tokens; ++t) {
    const Bf16* k = cache.Row(s, t, 0, kv_head);
    double score = 0;
    for (int d = 0; d < dim; ++d) score += Value(q[d]) * Value(k[d]);
    p[t] = score / std::sqrt(double(dim));
    max = std::max(max, p[t]);
  }
  double total = 0;
  for (double& x : p) total += x = std::exp(x - max);
  std::vector<double> sum(dim), magnitude(dim);
  for (int t = 0; t < tokens; ++t) {
    const Bf16* v = cache.Row(s, t, 1, kv_head);
    for (int d = 0; d < dim; ++d) {
      sum[d] += p[t] / total * Value(v[d]);
      magnitude[d] += p[t] / total * std::fabs(Value(v[d]));
    }
  }
  for (int d = 0; d < dim; ++d) {
    // bf16 of the output, and of the probabilities before they meet V (2^-9 each, plus exp2 and score
    // rounding).
    comparison->Add(Value(out[d]), sum[d], std::fabs(sum[d]) / 256 + magnitude[d] / 128 + 1e-6);
  }
}

void TestDecode(Heads heads, const std::vector<int32_t>& lengths, uint32_t seed) {
  Cache cache(heads, lengths, seed);
  const int n = int(lengths.size());
  const int row = heads.q * heads.dim;
  const int q_stride = row + 2 * heads.kv * heads.dim;  // as inside a fused QKV row
  const std::vector<Bf16> q = Normal(size_t(n) * q_stride, 1.5f, seed + 3);
  Device<Bf16> d_q(q), d_kv(cache.kv), d_out(size_t(n) * row);
  Device<int32_t> d_table(cache.table), d_lengths(lengths);
  Device<uint8_t> workspace(DecodeAttentionWorkspaceBytes(n, heads.q, heads.kv, heads.dim));
  workspace.Zero();
  DecodeAttentionArgs args;
  args.num_seqs = n;
  args.num_q_heads = heads.q;
  args.num_kv_heads = heads.kv;
  args.head_dim = heads.dim;
  args.scale = 1.0f / std::sqrt(float(heads.dim));
  args.q = d_q.get();
  args.q_stride = q_stride;
  args.kv = d_kv.get();
  args.page_table = d_table.get();
  args.page_table_stride = cache.stride;
  args.lengths = d_lengths.get();
  args.out = d_out.get();
  args.out_stride = row;
  args.workspace = workspace.get();
  CUDA_OK(LaunchDecodeAttention(args, nullptr));
  const std::vector<Bf16> out = d_out.Get();
  const std::string name = "decode attention q " + std::to_string(heads.q) + " kv " +
                           std::to_string(heads.kv) + " dim " + std::to_string(heads.dim) + " seqs " +
                           std::to_string(n) + " seed " + std::to_string(seed);
  Comparison comparison;
  for (int s = 0; s < n; ++s) {
    for (int head = 0; head < heads.q; ++head) {
      const Bf16* y = out.data() + size_t(s) * row + head * heads.dim;
      if (lengths[s] == 0) {
        EXPECT(std::all_of(y, y + heads.dim, [](Bf16 v) { return Value(v) == 0; }), "%s: empty sequence %d",
               name.c_str(), s);
        continue;
      }
      CompareRow(cache, s, lengths[s], head, q.data() + size_t(s) * q_stride + head * heads.dim, y,
                 &comparison);
    }
  }
  EXPECT_CLOSE(comparison, 1e-4, name.c_str());
  // Each sequence alone, in the same workspace, gives the same bits.
  for (int s = 0; s < n; ++s) {
    d_out.Poison();
    DecodeAttentionArgs alone = args;
    alone.num_seqs = 1;
    alone.q += size_t(s) * q_stride;
    alone.page_table += size_t(s) * cache.stride;
    alone.lengths += s;
    CUDA_OK(LaunchDecodeAttention(alone, nullptr));
    const std::vector<Bf16> single = d_out.Get();
    EXPECT(std::equal(single.begin(), single.begin() + row, out.begin() + size_t(s) * row, SameBits),
           "%s: sequence %d of length %d depends on its batch", name.c_str(), s, lengths[s]);
  }
  d_out.Poison();
  CUDA_OK(LaunchDecodeAttention(args, nullptr));
  const std::vector<Bf16> again = d_out.Get();
  EXPECT(std::equal(again.begin(), again.end(), out.begin(), SameBits), "%s: not repeatable", name.c_str());
}

using Launcher = cudaError_t (*)(const PrefillAttentionArgs&, cudaStream_t);

struct Segment {
  int sequence;  // of the cache
  int first;     // position of the first query
  int last;      // and one past the last: the context's length
};

// Rows of the queries of all segments, one after the other; `q` holds a row per (sequence, position).
std::vector<Bf16> RunPrefill(Launcher launch, Cache& cache, const std::vector<Segment>& segments,
                             const std::vector<std::vector<Bf16>>& q) {
  const Heads heads = cache.heads;
  const int row = heads.q * heads.dim;
  std::vector<Bf16> rows;
  std::vector<int32_t> begin = {0}, lengths, table;
  for (const Segment& s : segments) {
    rows.insert(rows.end(), q[s.sequence].begin() + size_t(s.first) * row,
                q[s.sequence].begin() + size_t(s.last) * row);
    begin.push_back(begin.back() + s.last - s.first);
    lengths.push_back(s.last);
    for (int i = 0; i < cache.stride; ++i) {
      table.push_back(i < (s.last + 63) / 64 ? cache.table[s.sequence * cache.stride + i] : -1);
    }
  }
  const int tokens = begin.back();
  // A chunk must not see rows after its end: poison them as they are before they are written.
  std::vector<Bf16> kv = cache.kv;
  for (const Segment& s : segments) {
    for (int token = s.last; token < cache.lengths[s.sequence]; ++token) {
      for (int v = 0; v < 2; ++v) {
        for (int head = 0; head < heads.kv; ++head) {
          const size_t at = cache.Row(s.sequence, token, v, head) - cache.kv.data();
          std::fill_n(kv.begin() + at, heads.dim, __float2bfloat16(NAN));
        }
      }
    }
  }
  Device<Bf16> d_q(rows), d_kv(kv), d_out(size_t(tokens) * row);
  Device<int32_t> d_begin(begin), d_lengths(lengths), d_table(table);
  PrefillAttentionArgs args;
  args.num_segments = int(segments.size());
  args.num_tokens = tokens;
  args.num_q_heads = heads.q;
  args.num_kv_heads = heads.kv;
  args.head_dim = heads.dim;
  args.scale = 1.0f / std::sqrt(float(heads.dim));
  args.q = d_q.get();
  args.q_stride = row;
  args.q_begin = d_begin.get();
  args.kv_lengths = d_lengths.get();
  args.kv = d_kv.get();
  args.num_pages = cache.num_pages;
  args.page_table = d_table.get();
  args.page_table_stride = cache.stride;
  args.out = d_out.get();
  args.out_stride = row;
  CUDA_OK(launch(args, nullptr));
  return d_out.Get();
}

void TestPrefill(Launcher launch, const char* kernel, Heads heads, uint32_t seed) {
  const std::vector<int32_t> lengths = {1, 64, 65, 200, 128, 400, 777, 1000, 31};
  Cache cache(heads, lengths, seed);
  const int row = heads.q * heads.dim;
  std::vector<std::vector<Bf16>> q;
  for (size_t s = 0; s < lengths.size(); ++s)
    q.push_back(Normal(size_t(lengths[s]) * row, 1.5f, seed + 5 + s));
  const std::vector<Segment> segments = {{0, 0, 1},     {1, 0, 64},     {2, 0, 65},
                                         {3, 73, 200},  {4, 0, 128},    {5, 271, 400},
                                         {6, 776, 777}, {7, 700, 1000}, {8, 0, 31}};
  const std::vector<Bf16> out = RunPrefill(launch, cache, segments, q);
  const std::string name = std::string("prefill attention ") + kernel + " q " + std::to_string(heads.q) +
                           " kv " + std::to_string(heads.kv) + " dim " + std::to_string(heads.dim) +
                           " seed " + std::to_string(seed);
  Comparison comparison;
  size_t at = 0;
  for (const Segment& s : segments) {
    for (int position = s.first; position < s.last; ++position, at += row) {
      for (int head = position % 3; head < heads.q; head += 3) {
        CompareRow(cache, s.sequence, position + 1, head,
                   q[s.sequence].data() + size_t(position) * row + head * heads.dim,
                   out.data() + at + head * heads.dim, &comparison);
      }
    }
  }
  EXPECT_CLOSE(comparison, 1e-4, name.c_str());
  // One sequence whole, then in chunks of odd sizes: the same bits.
  const std::vector<Bf16> whole = RunPrefill(launch, cache, {{7, 0, 1000}}, q);
  for (int first = 0, size = 1; first < 1000; first += size, size = size * 2 + 37) {
    const int last = std::min(first + size, 1000);
    const std::vector<Bf16> chunk = RunPrefill(launch, cache, {{7, first, last}}, q);
    EXPECT(std::equal(chunk.begin(), chunk.end(), whole.begin() + size_t(first) * row, SameBits),
           "%s: chunk %d..%d differs from the whole", name.c_str(), first, last);
  }
}

}  // namespace

void TestAttention() {
  const std::vector<int32_t> edges = {1, 0, 15, 16, 17, 63, 64, 65, 0, 255, 256, 257, 1000};
  const std::vector<int32_t> large = {4097, 3, 8192, 9001, 0};
  TestDecode({16, 4, 128}, edges, 1);
  TestDecode({32, 4, 128}, edges, 2);
  TestDecode({28, 4, 96}, edges, 3);
  TestDecode({8, 2, 64}, edges, 4);
  TestDecode({4, 2, 32}, edges, 5);
  TestDecode({8, 4, 128}, large, 6);
  TestDecode({2, 2, 32}, std::vector<int32_t>(300, 70), 7);
  const Launcher mma = LaunchPrefillAttentionMma;
  const Launcher wgmma = LaunchPrefillAttentionWgmma;
  TestPrefill(mma, "mma", {4, 2, 128}, 20);
  TestPrefill(mma, "mma", {4, 2, 96}, 30);
  TestPrefill(mma, "mma", {4, 1, 64}, 40);
  TestPrefill(mma, "mma", {4, 2, 32}, 50);
  TestPrefill(wgmma, "wgmma", {4, 2, 128}, 60);
  TestPrefill(wgmma, "wgmma", {8, 1, 128}, 70);
}

}  // namespace millrace::test
