// Every kernel of every instruction set that this processor has, against plain loops in double.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/cpu.h"
#include "base/random.h"
#include "engine/backend/cpu/activations.h"
#include "engine/backend/cpu/bfloat16.h"
#include "engine/backend/cpu/kernels.h"
#include "engine/backend/cpu/packing.h"
#include "engine/backend/cpu/thread_pool.h"

namespace millrace::engine {
namespace {

constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();

std::vector<const KernelTable*> Tables() {
  std::vector<const KernelTable*> tables = {&PortableKernels()};
  if (GetCpuFeatures().avx2_fma) tables.push_back(&Avx2Kernels());
  if (GetCpuFeatures().avx512_vnni) tables.push_back(&Avx512Kernels());
  if (GetCpuFeatures().avx512_vnni && GetCpuFeatures().amx_int8 && AskForAmx())
    tables.push_back(&AmxKernels());
  return tables;
}

TEST(Tables, NamesThoseThatCannotRunHere) {
  const CpuFeatures& cpu = GetCpuFeatures();
  if (!cpu.avx2_fma || !cpu.avx512_vnni || !cpu.amx_int8) {
    GTEST_SKIP() << "not run by the tests below:" << (cpu.avx2_fma ? "" : " avx2")
                 << (cpu.avx512_vnni ? "" : " avx512") << (cpu.amx_int8 ? "" : " amx")
                 << ", which this processor does not have";
  }
}

std::vector<float> Noise(size_t count, uint64_t seed, float scale = 1) {
  Random random(seed << 20);
  std::vector<float> values(count);
  for (float& value : values) value = scale * static_cast<float>(2 * random.Uniform() - 1);
  return values;
}

// What the packed bytes stand for, read back by the layout of kernels.h.
double WeightAt(const PackedMatrix& w, int32_t row, int32_t col) {
  const char* strip = w.data + row / kStripRows * w.strip_bytes;
  const int32_t r = row % kStripRows;
  uint16_t narrow;
  if (w.format == WeightFormat::kF32) {
    float value;
    std::memcpy(&value, strip + (int64_t{col} * kStripRows + r) * 4, 4);
    return value;
  }
  if (w.format == WeightFormat::kBf16) {
    std::memcpy(&narrow, strip + ((int64_t{col} / 2 * kStripRows + r) * 2 + col % 2) * 2, 2);
    return FromBf16(narrow);
  }
  const int32_t group = col / kGroupCols;
  const int32_t quad = col % kGroupCols / 4;
  std::memcpy(&narrow, strip + w.scale_offset + (group * kStripRows + r) * 2, 2);
  if (w.format == WeightFormat::kInt8) {
    const auto code = static_cast<uint8_t>(strip[group * 1024 + quad * 64 + r * 4 + col % 4]);
    return (code - 128) * double{FromBf16(narrow)};
  }
  const auto both = static_cast<uint8_t>(strip[group * 512 + quad % 8 * 64 + r * 4 + col % 4]);
  return ((quad < 8 ? both & 15 : both >> 4) - 8) * double{FromBf16(narrow)};
}

struct Packed {
  Packed(WeightFormat format, int32_t rows, int32_t cols, const std::vector<float>& values,
         const KernelTable& kernels = PortableKernels())
      : matrix(MakePackedMatrix(format, rows, cols)), memory(PackedBytes(matrix)) {
    std::memset(memory.data(), 0xa5, memory.size());
    matrix.data = reinterpret_cast<const char*>(memory.data());
    PackRows(kernels, matrix, memory.data(), 0, values);
  }
  PackedMatrix matrix;
  AlignedBytes memory;
};

bool IsInteger(WeightFormat format) { return format == WeightFormat::kInt8 || format == WeightFormat::kInt4; }

// Rows as products want them; `exact` gets what they stand for.
Rows Inputs(const KernelTable& table, WeightFormat format, const std::vector<float>& x, int32_t tokens,
            int32_t cols, std::vector<double>* exact) {
  Rows rows(static_cast<size_t>(tokens), ActivationBytes(format, cols));
  for (int32_t t = 0; t < tokens; ++t) {
    float* const row = rows[static_cast<size_t>(t)];
    const float* const from = x.data() + int64_t{t} * cols;
    if (!IsInteger(format)) std::memcpy(row, from, static_cast<size_t>(cols) * 4);
    auto* const values = reinterpret_cast<int8_t*>(row);
    auto* const groups = reinterpret_cast<ActivationGroup*>(values + (cols + 63) / 64 * 64);
    if (IsInteger(format)) table.quantize(from, cols, values, groups);
    for (int32_t k = 0; k < cols; ++k) {
      exact->push_back(IsInteger(format) ? double{groups[k / 64].scale} * values[k] : double{from[k]});
    }
  }
  return rows;
}

std::vector<float> Multiply(const KernelTable& table, const PackedMatrix& w, const Rows& x, int32_t tokens,
                            int32_t strip_step, int32_t token_step, const float* scale) {
  // Poison after every row: a product must not write there.
  const size_t stride = static_cast<size_t>(w.rows) + 3;
  std::vector<float> y(stride * static_cast<size_t>(tokens), kPoison);
  std::vector<float*> rows;
  for (size_t t = 0; t < static_cast<size_t>(tokens); ++t) {
    rows.push_back(y.data() + t * stride);
    if (scale != nullptr) std::fill_n(rows.back(), w.rows, 0.25f);
  }
  for (int32_t t = 0; t < tokens; t += token_step) {
    for (int32_t strip = 0; strip < w.strips; strip += strip_step) {
      GemmArgs args{};
      args.w = &w;
      args.strip_begin = strip;
      args.strip_end = std::min(strip + strip_step, w.strips);
      args.x = x.input(static_cast<size_t>(tokens)).data() + t;
      args.y = rows.data() + t;
      args.y_offset = int64_t{strip} * kStripRows;
      args.scale = scale == nullptr ? nullptr : scale + t;
      args.tokens = std::min(token_step, tokens - t);
      table.gemm[static_cast<size_t>(w.format)](args);
    }
  }
  for (int32_t t = 0; t < tokens; ++t) {
    for (size_t i = 0; i < 3; ++i)
      EXPECT_TRUE(std::isnan(rows[static_cast<size_t>(t)][static_cast<size_t>(w.rows) + i]));
  }
  std::vector<float> result;
  for (const float* row : rows) result.insert(result.end(), row, row + w.rows);
  return result;
}

class Products : public ::testing::TestWithParam<WeightFormat> {};

TEST_P(Products, EqualPlainSumsOnEverySetAndInEveryTile) {
  const struct {
    int32_t rows, cols;
  } shapes[] = {{16, 64}, {17, 96}, {130, 130}, {48, 333}, {1, 48}, {272, 512}};
  for (const auto& shape : shapes) {
    SCOPED_TRACE(::testing::Message() << shape.rows << " x " << shape.cols);
    const int32_t tokens = 27;
    const Packed packed(GetParam(), shape.rows, shape.cols,
                        Noise(static_cast<size_t>(shape.rows * shape.cols), 1, 0.1f));
    const std::vector<float> x = Noise(static_cast<size_t>(tokens * shape.cols), 2);
    const std::vector<float> scale = Noise(static_cast<size_t>(tokens), 3);
    std::vector<std::vector<float>> by_table;
    for (const KernelTable* table : Tables()) {
      SCOPED_TRACE(table->name);
      std::vector<double> exact;
      const Rows inputs = Inputs(*table, GetParam(), x, tokens, shape.cols, &exact);
      const std::vector<float> whole = Multiply(*table, packed.matrix, inputs, tokens, 1000, tokens, nullptr);
      const std::vector<float> added =
          Multiply(*table, packed.matrix, inputs, tokens, 1000, tokens, scale.data());
      for (int32_t t = 0; t < tokens; ++t) {
        for (int32_t r = 0; r < shape.rows; ++r) {
          double sum = 0;
          double magnitude = 0;
          for (int32_t k = 0; k < shape.cols; ++k) {
            const double product =
                exact[static_cast<size_t>(t * shape.cols + k)] * WeightAt(packed.matrix, r, k);
            sum += product;
            magnitude += std::fabs(product);
          }
          const auto at = static_cast<size_t>(t * shape.rows + r);
          const double bound = 3e-6 * magnitude + 1e-7;  // fp32 sums: about sqrt(cols) roundings
          ASSERT_NEAR(whole[at], sum, bound) << t << " " << r;
          ASSERT_NEAR(added[at], 0.25 + double{scale[static_cast<size_t>(t)]} * sum, bound + 1e-7)
              << t << " " << r;
        }
      }
      // One order of sums, whatever the tile: the bits are equal.
      for (const int32_t strip_step : {1, 2, 3}) {
        for (const int32_t token_step : {1, 2, 3, 5, 6, 7, 8, 14, 20}) {
          ASSERT_EQ(Multiply(*table, packed.matrix, inputs, tokens, strip_step, token_step, nullptr), whole)
              << strip_step << " strips, " << token_step << " tokens";
          ASSERT_EQ(Multiply(*table, packed.matrix, inputs, tokens, strip_step, token_step, scale.data()),
                    added);
        }
      }
      by_table.push_back(whole);
    }
    // The sets with fused multiply-add agree to the bit.
    for (size_t table = 2; table < by_table.size(); ++table) EXPECT_EQ(by_table[1], by_table[table]);
  }
}

std::string FormatName(const ::testing::TestParamInfo<WeightFormat>& test) {
  return std::vector{"f32", "bf16", "int8", "int4"}[static_cast<size_t>(test.param)];
}
INSTANTIATE_TEST_SUITE_P(Formats, Products,
                         ::testing::Values(WeightFormat::kF32, WeightFormat::kBf16, WeightFormat::kInt8,
                                           WeightFormat::kInt4),
                         FormatName);

TEST(Packing, Int8ErrsByHalfAStepAtMost) {
  std::vector<float> values = Noise(64 * 128, 4);
  values[5] = 30;  // a group with one large value has large steps
  const Packed packed(WeightFormat::kInt8, 64, 128, values);
  for (int32_t r = 0; r < 64; ++r) {
    for (int32_t k = 0; k < 128; ++k) {
      float largest = 0;
      for (int32_t i = k / 64 * 64; i < k / 64 * 64 + 64; ++i) {
        largest = std::max(largest, std::fabs(values[static_cast<size_t>(r * 128 + i)]));
      }
      // Half a step; the bf16 scale may be 2^-9 off, which the largest value feels 127 times.
      const double bound = largest / 127 * (0.5 + 127.0 / 512);
      ASSERT_NEAR(WeightAt(packed.matrix, r, k), values[static_cast<size_t>(r * 128 + k)], bound);
    }
  }
}

TEST(Packing, Int4ChoosesAScaleNoWorseThanTheLargestValue) {
  const std::vector<float> values = Noise(64 * 128, 5);
  const Packed packed(WeightFormat::kInt4, 64, 128, values);
  double error = 0, plain_error = 0;
  for (int32_t r = 0; r < 64; ++r) {
    for (int32_t first = 0; first < 128; first += 64) {
      float largest = 0;
      for (int32_t k = first; k < first + 64; ++k) {
        const float value = values[static_cast<size_t>(r * 128 + k)];
        if (std::fabs(value) > std::fabs(largest)) largest = value;
      }
      const double step = largest / -8.0;
      for (int32_t k = first; k < first + 64; ++k) {
        const double value = values[static_cast<size_t>(r * 128 + k)];
        error += std::pow(WeightAt(packed.matrix, r, k) - value, 2);
        plain_error += std::pow(std::clamp(std::nearbyint(value / step), -8.0, 7.0) * step - value, 2);
      }
    }
  }
  EXPECT_LT(error, plain_error * 1.005);
  EXPECT_LT(std::sqrt(error / static_cast<double>(values.size())),
            0.04);  // uniform in [-1, 1]: a step is 1/8
}

// The largest value, zeros, and what no integer can stand for included.
TEST(Packing, EverySetMakesTheSameBytes) {
  for (const WeightFormat format : {WeightFormat::kInt8, WeightFormat::kInt4}) {
    std::vector<float> values = Noise(50 * 333, 6, 0.02f);
    for (size_t i = 0; i < 333; ++i) values[i] *= 1e-42f;
    values[400] = 3e38f;
    values[500] = -values[333];
    values[700] = kPoison;
    values[1000] = std::numeric_limits<float>::infinity();
    std::fill_n(values.begin() + 1332, 333, 0.0f);
    const Packed plain(format, 50, 333, values);
    for (const KernelTable* table : Tables()) {
      const Packed packed(format, 50, 333, values, *table);
      EXPECT_EQ(std::memcmp(packed.memory.data(), plain.memory.data(), PackedBytes(plain.matrix)), 0)
          << table->name;
    }
  }
}

TEST(Packing, KeepsZerosAndSurvivesStrangeValues) {
  for (const WeightFormat format : {WeightFormat::kInt8, WeightFormat::kInt4}) {
    std::vector<float> values(16 * 64, 0.0f);
    values[64] = std::numeric_limits<float>::infinity();
    values[128] = kPoison;
    values[192] = 1e-45f;  // no scale can be this small
    values[256] = 3e38f;
    const Packed packed(format, 16, 64, values);
    for (int32_t r = 0; r < 16; ++r) {
      for (int32_t k = 0; k < 64; ++k) {
        const double got = WeightAt(packed.matrix, r, k);
        ASSERT_TRUE(std::isfinite(got));
        if (r != 4 || k != 0) {
          ASSERT_EQ(got, 0);
        }
      }
    }
    EXPECT_NEAR(WeightAt(packed.matrix, 4, 0) / 3e38, 1, 0.01);
  }
}

TEST(Elementwise, EqualTheirFormulas) {
  for (const KernelTable* table : Tables()) {
    SCOPED_TRACE(table->name);
    std::vector<float> gate_up(2 * 64);
    for (size_t i = 0; i < 64; ++i) {
      gate_up[i / 16 * 32 + i % 16] = static_cast<float>(i) * 4 - 120;
      gate_up[i / 16 * 32 + 16 + i % 16] = 1.5f;
    }
    std::vector<float> out(64);
    table->swiglu(gate_up.data(), 64, out.data());
    for (size_t i = 0; i < 64; ++i) {
      const double gate = static_cast<double>(i) * 4 - 120;
      ASSERT_NEAR(out[i], 1.5 * gate / (1 + std::exp(-gate)), 2e-6 * std::fabs(gate) + 1e-30) << gate;
    }
    const std::vector<float> x = Noise(83, 6, 5);
    const std::vector<float> weight = Noise(83, 7);
    std::vector<float> normed(83);
    table->rms_norm(x.data(), weight.data(), 83, 1e-6f, normed.data());
    double squares = 0;
    for (const float value : x) squares += double{value} * value;
    for (size_t i = 0; i < x.size(); ++i) {
      const double expected = x[i] / std::sqrt(squares / 83 + 1e-6) * weight[i];
      ASSERT_NEAR(normed[i], expected, 3e-7 * std::fabs(expected));
    }
    std::vector<int8_t> values(128);
    std::vector<ActivationGroup> groups(2);
    table->quantize(x.data(), 83, values.data(), groups.data());
    for (int32_t g = 0; g < 2; ++g) {
      int32_t sum = 0;
      for (int32_t k = g * 64; k < g * 64 + 64; ++k) {
        const double exact = k < 83 ? x[static_cast<size_t>(k)] : 0.0;
        const int8_t got = values[static_cast<size_t>(k)];
        ASSERT_NEAR(got * double{groups[static_cast<size_t>(g)].scale}, exact,
                    0.5001 * groups[static_cast<size_t>(g)].scale);
        sum += got;
      }
      ASSERT_EQ(groups[static_cast<size_t>(g)].minus_sum, -sum);
    }
  }
}

// A sequence of keys and values on scattered pages, everything beyond it poisoned.
template <typename T>
struct Pages {
  Pages(int32_t keys, int32_t dim) : head_dim(dim) {
    const int32_t count = (keys + 63) / 64;
    const size_t head = static_cast<size_t>(64 * dim);
    T poison;
    std::memset(&poison, 0xff, sizeof(poison));  // NaN in either type
    memory.assign(static_cast<size_t>(count) * 2 * head, poison);
    const std::vector<float> noise = Noise(static_cast<size_t>(2 * keys * dim), 11);
    for (int32_t p = 0; p < count; ++p) {
      T* const page = memory.data() + static_cast<size_t>((p * 7 + 3) % count) * 2 * head;
      if (count % 7 != 0)
        pages.push_back(reinterpret_cast<const char*>(page));
      else
        pages.push_back(reinterpret_cast<const char*>(memory.data() + static_cast<size_t>(p) * 2 * head));
      for (int32_t i = 0; i < 64 && p * 64 + i < keys; ++i) {
        for (int32_t d = 0; d < 2 * dim; ++d) {
          const float value = noise[static_cast<size_t>((p * 64 + i) * 2 * dim + d)];
          T* const at = const_cast<T*>(reinterpret_cast<const T*>(pages.back())) + (d < dim ? 0 : head) +
                        i * dim + d % dim;
          if constexpr (sizeof(T) == 2)
            *at = ToBf16(value);
          else
            *at = value;
        }
      }
    }
  }
  double At(bool value, int32_t key, int32_t d) const {
    const T* const page = reinterpret_cast<const T*>(pages[static_cast<size_t>(key / 64)]);
    const T raw = page[(value ? 64 * head_dim : 0) + key % 64 * head_dim + d];
    if constexpr (sizeof(T) == 2)
      return FromBf16(raw);
    else
      return raw;
  }
  int32_t head_dim;
  std::vector<T> memory;
  std::vector<const char*> pages;
};

template <typename T>
std::vector<float> RunAttention(const KernelTable& table, const Pages<T>& kv,
                                const std::vector<float>& queries, std::vector<int32_t> num_keys,
                                int32_t page_begin, int32_t page_end) {
  std::vector<const float*> rows;
  for (size_t q = 0; q < num_keys.size(); ++q)
    rows.push_back(queries.data() + q * static_cast<size_t>(kv.head_dim));
  std::vector<float> partials(num_keys.size() * static_cast<size_t>(kv.head_dim + 2), kPoison);
  std::vector<float> scratch(static_cast<size_t>(kv.head_dim * 64 + kAttentionQueries * 65), kPoison);
  AttentionArgs args{};
  args.queries = rows.data();
  args.num_keys = num_keys.data();
  args.pages = kv.pages.data();
  args.value_offset = static_cast<int64_t>(64 * kv.head_dim) * static_cast<int64_t>(sizeof(T));
  args.head_dim = kv.head_dim;
  args.num_queries = static_cast<int32_t>(num_keys.size());
  args.page_begin = page_begin;
  args.page_end = page_end;
  args.partials = partials.data();
  args.scratch = scratch.data();
  sizeof(T) == 2 ? table.attend_bf16(args) : table.attend_f32(args);
  return partials;
}

template <typename T>
void CheckAttention(int32_t head_dim) {
  SCOPED_TRACE(::testing::Message() << "head_dim " << head_dim << ", " << sizeof(T) << " bytes");
  const int32_t keys = 200;
  const Pages<T> kv(keys, head_dim);
  // Two query heads per token, positions 180 .. 199, and one that sees a single key in front.
  std::vector<int32_t> num_keys = {1, 1, 64, 65};
  for (int32_t n = 181; n <= keys; ++n) num_keys.insert(num_keys.end(), 2, n);
  const std::vector<float> queries = Noise(num_keys.size() * static_cast<size_t>(head_dim), 12, 0.6f);
  const size_t stride = static_cast<size_t>(head_dim + 2);
  for (const KernelTable* table : Tables()) {
    SCOPED_TRACE(table->name);
    const std::vector<float> got = RunAttention(*table, kv, queries, num_keys, 0, 4);
    std::vector<float> merged = RunAttention(*table, kv, queries, num_keys, 0, 2);
    const std::vector<float> rest = RunAttention(*table, kv, queries, num_keys, 2, 4);
    for (size_t q = 0; q < num_keys.size(); ++q) {
      table->merge(merged.data() + q * stride, rest.data() + q * stride, head_dim);
      std::vector<double> weights, sums(static_cast<size_t>(head_dim));
      double max = -1e30, sum = 0;
      for (int32_t key = 0; key < num_keys[q]; ++key) {
        double score = 0;
        for (int32_t d = 0; d < head_dim; ++d) {
          score += queries[q * static_cast<size_t>(head_dim) + static_cast<size_t>(d)] * kv.At(false, key, d);
        }
        weights.push_back(score);
        max = std::max(max, score);
      }
      for (size_t key = 0; key < weights.size(); ++key) {
        weights[key] = std::exp(weights[key] - max);
        sum += weights[key];
        for (int32_t d = 0; d < head_dim; ++d) {
          sums[static_cast<size_t>(d)] += weights[key] * kv.At(true, static_cast<int32_t>(key), d);
        }
      }
      for (size_t d = 0; d < sums.size(); ++d) {
        const double want = sums[d] / sum;
        ASSERT_NEAR(got[q * stride + d] / got[q * stride + stride - 1], want, 4e-6)
            << "query " << q << " " << d;
        ASSERT_NEAR(merged[q * stride + d] / merged[q * stride + stride - 1], want, 4e-6);
      }
      // Alone as in a block, to the bit.
      const std::vector<float> own(queries.begin() + static_cast<int64_t>(q) * head_dim,
                                   queries.begin() + static_cast<int64_t>(q + 1) * head_dim);
      const std::vector<float> alone = RunAttention(*table, kv, own, {num_keys[q]}, 0, 4);
      ASSERT_TRUE(std::equal(alone.begin(), alone.end(), got.begin() + static_cast<int64_t>(q * stride)))
          << q;
    }
  }
}

TEST(Attention, EqualsPlainSoftmaxAloneAndInBlocks) {
  for (const int32_t head_dim : {16, 24, 48, 64, 96, 128}) {
    CheckAttention<uint16_t>(head_dim);
    CheckAttention<float>(head_dim);
  }
}

TEST(ThreadPool, RunsEveryTaskOnceOnAnyThread) {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (int round = 0; round < 300; ++round) {
      const int64_t tasks = round % 37;
      std::vector<std::atomic<int>> counts(static_cast<size_t>(tasks));
      std::atomic<int> bad_threads{0};
      pool.Run(tasks, round % 2 == 0 ? 1'000'000 : 1, [&](int64_t i, int thread) {
        ++counts[static_cast<size_t>(i)];
        if (thread < 0 || thread >= threads) ++bad_threads;
      });
      for (const auto& count : counts) ASSERT_EQ(count, 1);
      ASSERT_EQ(bad_threads, 0);
      // Long enough for the workers to fall asleep, now and then.
      if (round % 100 == 99) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  }
}

}  // namespace
}  // namespace millrace::engine
