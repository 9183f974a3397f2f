// Whole steps of a small random model: a captured graph against the same launches made one by one, chunks,
// batch mates, pages out to the mirror and back. What the numbers themselves should be is tests/parity's
// business.
#include <cstdio>
#include <cstring>

#include "engine/backend/cuda/step_runner.h"
#include "tests/engine/cuda/hot/support.h"
#include "tests/engine/cuda/step/random_model.h"
#include "tests/engine/cuda/step/tests.h"

namespace millrace::test {
namespace {

using engine::Batch;
using engine::PageId;
using engine::Segment;
using engine::StepOutput;
using engine::cuda::Result;
using engine::cuda::StepRunner;
using engine::cuda::StepRunnerOptions;

constexpr int32_t kPages = 40;

struct Sequence {
  std::vector<int32_t> tokens;
  std::vector<PageId> pages;
};

Sequence MakeSequence(int32_t tokens, PageId first_page, int32_t seed) {
  Sequence sequence;
  std::mt19937 engine(seed);
  for (int32_t i = 0; i < tokens; ++i) sequence.tokens.push_back(static_cast<int32_t>(engine() % 512));
  // Not ascending, so that a page table is really followed.
  for (int32_t p = engine::PagesFor(tokens) - 1; p >= 0; --p) sequence.pages.push_back(first_page + p);
  return sequence;
}

Segment Part(const Sequence& sequence, int32_t begin, int32_t end, int32_t num_logits) {
  Segment segment;
  segment.tokens = std::span(sequence.tokens).subspan(begin, end - begin);
  segment.position = begin;
  segment.pages = sequence.pages;
  segment.num_logits = num_logits;
  return segment;
}

class Harness {
 public:
  explicit Harness(bool fp8) {
    engine::cuda::ModelShape shape = SmallShape();
    if (fp8) {
      bound = 0.3;
      shape.fp8_experts = true;
      shape.expert_width = 128;
    }
    Check(MakeRandomModel(shape, 42, &model_));
    StepRunnerOptions options;
    options.kv.num_layers = 4;
    options.kv.num_pages = kPages;
    options.kv.num_kv_heads = 2;
    options.kv.head_dim = 32;
    options.rows_max = 600;
    options.logit_rows_max = 200;
    options.with_mtp = true;
    kv = options.kv;
    Check(StepRunner::Create(model_.model, options, &runner));
  }
  std::vector<float> Run(const std::vector<Segment>& segments, std::vector<float>* mtp = nullptr) {
    StepOutput output;
    Check(runner->Run(Batch{segments}, nullptr, &output));
    if (mtp != nullptr) mtp->assign(output.mtp_logits.begin(), output.mtp_logits.end());
    return {output.logits.begin(), output.logits.end()};
  }
  static void Check(const Result& result) {
    EXPECT(result.ok(), "%s", result.message().c_str());
    if (!result.ok()) std::exit(1);
  }
  std::unique_ptr<StepRunner> runner;
  engine::KvLayout kv;
  // Of a row's largest logit. In FP8 a difference in the last bit of bf16 may round to the next code, 1/16
  // away.
  double bound = 0.02;

 private:
  RandomModel model_;
};

bool Same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && !a.empty() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Rounding differs between kernels for few and for many rows, and may flip a choice of experts: most rows
// agree closely, not all need to.
void ExpectClose(const std::vector<float>& a, const std::vector<float>& b, double bound, const char* what) {
  EXPECT(a.size() == b.size() && !a.empty(), "%s: %zu and %zu numbers", what, a.size(), b.size());
  if (a.size() != b.size()) return;
  constexpr size_t kVocab = 512;
  int close = 0;
  const int rows = static_cast<int>(a.size() / kVocab);
  double worst = 0;
  for (int r = 0; r < rows; ++r) {
    double difference = 0, largest = 0;
    for (size_t i = 0; i < kVocab; ++i) {
      difference = std::max<double>(difference, std::fabs(a[r * kVocab + i] - b[r * kVocab + i]));
      largest = std::max<double>(largest, std::fabs(a[r * kVocab + i]));
    }
    close += difference <= bound * largest;
    worst = std::max(worst, difference / largest);
  }
  std::printf("%s: %d of %d rows within %.0f %%, worst %.4f, %s\n", what, close, rows, 100 * bound, worst,
              Same(a, b) ? "bit-equal" : "not bit-equal");
  EXPECT(close * 10 >= rows * 8, "%s: %d of %d rows close", what, close, rows);
}

void TestGraphEqualsEager(Harness& h) {
  const Sequence a = MakeSequence(131, 0, 1), b = MakeSequence(65, 5, 2), c = MakeSequence(3, 9, 3);
  h.Run({Part(a, 0, 130, 1), Part(b, 0, 64, 1), Part(c, 0, 2, 1)});
  const std::vector<Segment> step = {Part(a, 130, 131, 1), Part(b, 64, 65, 1), Part(c, 2, 3, 1)};
  const std::vector<float> graph = h.Run(step);
  EXPECT(Same(graph, h.Run(step)), "two replays differ");
  std::vector<Segment> eager = step;
  for (Segment& segment : eager) segment.exported = true;  // exports are never part of a graph
  EXPECT(Same(graph, h.Run(eager)), "graph and single launches differ");
  // Mixed with a prompt in the same batch, in another order.
  const Sequence d = MakeSequence(90, 12, 4);
  const std::vector<float> mixed =
      h.Run({Part(c, 2, 3, 1), Part(d, 0, 90, 1), Part(a, 130, 131, 1), Part(b, 64, 65, 1)});
  std::vector<float> picked(mixed.begin() + 2 * 512, mixed.end());
  picked.insert(picked.end(), mixed.begin(), mixed.begin() + 512);
  ExpectClose(graph, picked, h.bound, "decode beside a prompt");
  ExpectClose(std::vector<float>(graph.begin(), graph.begin() + 512), h.Run({step[0]}), h.bound,
              "decode alone");
}

void TestChunks(Harness& h) {
  const Sequence s = MakeSequence(200, 20, 5);
  std::vector<int32_t> next(s.tokens.begin() + 1, s.tokens.end());
  const auto part = [&](int32_t begin, int32_t end) {
    Segment segment = Part(s, begin, end, end - begin);
    segment.next_tokens = std::span(next).subspan(begin, end - begin);
    return segment;
  };
  std::vector<float> whole_mtp, mtp;
  const std::vector<float> whole = h.Run({part(0, 199)}, &whole_mtp);
  std::vector<float> chunks, chunks_mtp;
  int32_t begin = 0;
  for (const int32_t end : {64, 65, 130, 199}) {
    const std::vector<float> rows = h.Run({part(begin, end)}, &mtp);
    chunks.insert(chunks.end(), rows.begin(), rows.end());
    chunks_mtp.insert(chunks_mtp.end(), mtp.begin(), mtp.end());
    begin = end;
  }
  ExpectClose(whole, chunks, h.bound, "chunks");
  ExpectClose(whole_mtp, chunks_mtp, h.bound, "chunks, MTP layer");
}

void TestPagesCross(Harness& h) {
  const Sequence s = MakeSequence(131, 0, 6);
  Segment prompt = Part(s, 0, 130, 1);
  std::memset(h.runner->mirror().data(), 0xee, h.runner->mirror().size());
  prompt.exported = true;
  int32_t told = 0;
  StepOutput output;
  Harness::Check(h.runner->Run(
      Batch{{prompt}}, [&told](int32_t layer) { told += layer == told; }, &output));
  EXPECT(told == 3, "%d layers told in order", told);
  const auto piece = [&](int32_t layer, PageId page) {
    const std::byte* begin = h.runner->mirror().data() + h.kv.piece_offset(layer, page);
    return std::vector<std::byte>(begin, begin + h.kv.piece_bytes());
  };
  std::vector<std::vector<std::byte>> exported;
  for (int32_t layer = 0; layer < 3; ++layer) {
    for (const PageId page : s.pages) exported.push_back(piece(layer, page));
  }
  const std::vector<std::byte> untouched = piece(0, 30);
  EXPECT(untouched.front() == std::byte{0xee} && untouched.back() == std::byte{0xee},
         "a page of others was written");
  Harness::Check(h.runner->ToHost(s.pages));
  size_t at = 0;
  for (int32_t layer = 0; layer < 3; ++layer) {
    for (const PageId page : s.pages) {
      EXPECT(exported[at++] == piece(layer, page), "layer %d page %d: export and ToHost differ", layer, page);
    }
  }
  // To other pages by way of the host, as a hand-off does.
  const std::vector<float> here = h.Run({Part(s, 130, 131, 1)});
  Sequence moved = s;
  moved.pages = {33, 31, 32};
  for (int32_t layer = 0; layer < 4; ++layer) {
    for (size_t p = 0; p < s.pages.size(); ++p) {
      const std::vector<std::byte> bytes = piece(layer, s.pages[p]);
      std::memcpy(h.runner->mirror().data() + h.kv.piece_offset(layer, moved.pages[p]), bytes.data(),
                  bytes.size());
    }
  }
  Harness::Check(h.runner->FromHost(moved.pages));
  EXPECT(Same(here, h.Run({Part(moved, 130, 131, 1)})), "the imported sequence goes on differently");
}

void TestRefusals(Harness& h) {
  const Sequence s = MakeSequence(601, 0, 7);
  StepOutput output;
  EXPECT(!h.runner->Run(Batch{{Part(s, 0, 601, 1)}}, nullptr, &output).ok(), "a step beyond the plan ran");
  RandomModel model;
  engine::cuda::ModelShape huge = LingMiniShape(2000);
  const Result refused = MakeRandomModel(huge, 1, &model);
  EXPECT(!refused.ok() && refused.message().find("not enough GPU memory") == 0, "said: %s",
         refused.message().c_str());
}

}  // namespace

// Last of all: nothing works on the device after it.
void TestDeviceError() {
  Harness h(false);
  Sequence s = MakeSequence(3, 0, 8);
  s.pages = {1 << 24};  // far beyond the pool: the layer's KV write faults
  StepOutput output;
  const Result broken = h.runner->Run(Batch{{Part(s, 0, 3, 1)}}, nullptr, &output);
  std::printf("a kernel that faults: %s\n", broken.message().c_str());
  EXPECT(broken.message().find("cuda: ") == 0 &&
             broken.message().find("cudaErrorIllegalAddress") != std::string::npos &&
             broken.message().find('\n') == std::string::npos,
         "said: %s", broken.message().c_str());
  const Sequence healthy = MakeSequence(3, 0, 8);
  EXPECT(!h.runner->Run(Batch{{Part(healthy, 0, 3, 1)}}, nullptr, &output).ok(),
         "a step ran on a broken device");
}

void TestStepRunner() {
  for (const bool fp8 : {false, true}) {
    Harness h(fp8);
    TestGraphEqualsEager(h);
    TestChunks(h);
    TestPagesCross(h);
    TestRefusals(h);
  }
}

}  // namespace millrace::test
