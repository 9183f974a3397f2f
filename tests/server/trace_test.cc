#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include "server/trace/otlp_exporter.h"
#include "server/trace/span.h"
#include "server/trace/trace_context.h"

namespace millrace::server {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr const char* kParent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

TEST(TraceContext, ComesBackAsItWas) {
  const TraceContext context = ParseTraceContext(kParent, "a=b");
  EXPECT_TRUE(context.valid());
  EXPECT_TRUE(context.sampled);
  EXPECT_EQ(context.trace_high, 0x0af7651916cd43ddu);
  EXPECT_EQ(context.trace_low, 0x8448eb211c80319cu);
  EXPECT_EQ(context.span, 0xb7ad6b7169203331u);
  EXPECT_EQ(context.state, "a=b");
  EXPECT_EQ(context.traceparent(), kParent);
  EXPECT_EQ(TraceContext().traceparent(), "");
}

TEST(TraceContext, TakesWhatTheFormatAllows) {
  const std::string ids = "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331";
  struct Case {
    std::string text;
    bool valid;
    bool sampled;
  };
  const Case cases[] = {
      {"00-" + ids + "-00", true, false},
      {"00-" + ids + "-03", true, true},  // only one flag has a meaning
      {"00-" + ids + "-fe", true, false},
      {"01-" + ids + "-01", true, true},
      {"cc-" + ids + "-01-what-comes-later", true, true},
      {"cc-" + ids + "-01.what-comes-later", false, false},
      {"00-" + ids + "-01-x", false, false},
      {"00-" + ids + "-1", false, false},
      {"00-" + ids, false, false},
      {"ff-" + ids + "-01", false, false},
      {"0-" + ids + "-01", false, false},
      {"00_" + ids + "-01", false, false},
      {"00-" + ids + "-0g", false, false},
      {"00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01", false, false},
      {"00-00000000000000000000000000000000-b7ad6b7169203331-01", false, false},
      {"00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01", false, false},
      {"", false, false},
      {std::string(55, '-'), false, false},
  };
  for (const Case& each : cases) {
    SCOPED_TRACE(each.text);
    const TraceContext context = ParseTraceContext(each.text, "");
    EXPECT_EQ(context.valid(), each.valid);
    EXPECT_EQ(context.sampled, each.sampled);
  }
}

TEST(TraceContext, DropsAStateThatCannotBePassedOn) {
  EXPECT_EQ(ParseTraceContext(kParent, std::string(512, 'x')).state.size(), 512u);
  EXPECT_EQ(ParseTraceContext(kParent, std::string(513, 'x')).state, "");
  EXPECT_EQ(ParseTraceContext(kParent, "a=b\r\nx: y").state, "");
  EXPECT_TRUE(ParseTraceContext(kParent, "a=\x80").valid());
  EXPECT_EQ(ParseTraceContext("nothing", "a=b").state, "");
}

class Kept final : public SpanSink {
 public:
  void Take(SpanRecord span) override { spans.push_back(std::move(span)); }
  std::vector<SpanRecord> spans;
};

const TimePoint kBegin(seconds(100));

TEST(Span, ChildrenNameTheirParents) {
  Kept kept;
  {
    Span outer = BeginSpan(&kept, ParseTraceContext(kParent, "a=b"), "outer", SpanKind::kServer, kBegin);
    Span inner = outer.Child("inner", SpanKind::kClient, kBegin + seconds(1));
    inner.Set("key", "value");
    inner.End(kBegin + seconds(2), Unavailable("gone"));
    inner.End(kBegin + seconds(3), OkStatus());  // has ended
    inner.Set("late", "value");
    EXPECT_EQ(kept.spans.size(), 1u);
  }  // and the outer one ends with its scope
  ASSERT_EQ(kept.spans.size(), 2u);
  const auto& [inner, outer] = std::tie(kept.spans[0], kept.spans[1]);
  EXPECT_EQ(outer.parent, 0xb7ad6b7169203331u);
  EXPECT_NE(outer.context.span, outer.parent);
  EXPECT_EQ(inner.parent, outer.context.span);
  EXPECT_EQ(inner.context.trace_low, 0x8448eb211c80319cu);
  EXPECT_EQ(inner.context.state, "a=b");
  EXPECT_EQ(inner.end, kBegin + seconds(2));
  EXPECT_EQ(inner.status, Unavailable("gone"));
  ASSERT_EQ(inner.attributes.size(), 1u);
}

TEST(Span, WithoutRecordingCarriesItsParentOn) {
  Kept kept;
  const std::string unsampled = std::string(kParent, 53) + "00";
  EXPECT_EQ(BeginSpan(&kept, ParseTraceContext(unsampled, ""), "a", SpanKind::kServer, kBegin)
                .context()
                .traceparent(),
            unsampled);
  EXPECT_EQ(BeginSpan(nullptr, ParseTraceContext(kParent, ""), "a", SpanKind::kServer, kBegin)
                .context()
                .traceparent(),
            kParent);
  EXPECT_FALSE(BeginSpan(&kept, {}, "a", SpanKind::kServer, kBegin).context().valid());
  EXPECT_TRUE(kept.spans.empty());
}

TEST(Span, ATraceBeginsAsOftenAsItShould) {
  Kept kept;
  for (int i = 0; i < 2000; ++i) {
    BeginTrace({&kept, 0.25}, {}, "a", SpanKind::kServer, kBegin);
    BeginTrace({nullptr, 1}, {}, "a", SpanKind::kServer, kBegin);
    BeginTrace({&kept, 0}, {}, "a", SpanKind::kServer, kBegin);
  }
  EXPECT_GT(kept.spans.size(), 350u);  // 500, and 19 is its standard deviation
  EXPECT_LT(kept.spans.size(), 650u);
  for (const SpanRecord& span : kept.spans) EXPECT_EQ(span.parent, 0u);
  // A trace from outside is its beginner's matter.
  kept.spans.clear();
  BeginTrace({&kept, 0}, ParseTraceContext(kParent, ""), "a", SpanKind::kServer, kBegin).End();
  EXPECT_EQ(kept.spans.size(), 1u);
}

double Counted(Metrics& metrics, const char* outcome) {
  return metrics.Counter("millrace_trace_spans_total", "", {{"outcome", outcome}}).Value();
}

TEST(OtlpExporter, HoldsSoManySpansAndDropsTheRest) {
  Metrics metrics;
  OtlpOptions options;
  options.endpoint = "http://127.0.0.1:1";  // nobody
  options.queue_max = 10;
  options.send_every = seconds(3600);
  options.last_word = milliseconds(1);
  auto exporter = OtlpExporter::Start(options, metrics);
  ASSERT_TRUE(exporter.ok()) << exporter.status();
  const TraceContext parent = ParseTraceContext(kParent, "");
  for (int i = 0; i < 100; ++i) BeginSpan(exporter->get(), parent, "a", SpanKind::kServer, kBegin).End();
  EXPECT_EQ(Counted(metrics, "dropped"), 90);
  exporter->reset();  // ends although nobody takes what waits
  EXPECT_EQ(Counted(metrics, "sent"), 0);
}

TEST(OtlpExporter, SaysWhatIsNoEndpoint) {
  Metrics metrics;
  for (const char* endpoint : {"", "localhost:4317", "http://", "http://host", "grpc://host:1"}) {
    OtlpOptions options;
    options.endpoint = endpoint;
    EXPECT_EQ(OtlpExporter::Start(options, metrics).status().code(), absl::StatusCode::kInvalidArgument)
        << endpoint;
  }
}

}  // namespace
}  // namespace millrace::server
