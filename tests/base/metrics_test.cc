#include "base/metrics.h"

#include <gtest/gtest.h>

namespace millrace {
namespace {

TEST(Metrics, SameNameAndLabelsGiveTheSameMetric) {
  Metrics metrics;
  metrics.Counter("millrace_things_total", "Things.", {{"kind", "a"}}).Increment();
  metrics.Counter("millrace_things_total", "Things.", {{"kind", "a"}}).Increment();
  metrics.Gauge("millrace_level", "Level.").Set(2.5);
  metrics.Histogram("millrace_wait_seconds", "Wait.", {0.1, 1}).Observe(0.5);
  const std::string text = metrics.Text();
  EXPECT_NE(text.find("millrace_things_total{kind=\"a\"} 2"), std::string::npos) << text;
  EXPECT_NE(text.find("millrace_level 2.5"), std::string::npos) << text;
  EXPECT_NE(text.find("millrace_wait_seconds_bucket{le=\"1\"} 1"), std::string::npos) << text;
}

TEST(Metrics, LabelsOfAPartOfTheProcess) {
  Metrics metrics;
  Metrics left = metrics.With({{"side", "left"}});
  Metrics right = metrics.With({{"side", "right"}});
  left.Counter("millrace_things_total", "Things.", {{"kind", "a"}}).Increment();
  right.Counter("millrace_things_total", "Things.", {{"kind", "a"}}).Increment(2);
  right.Gauge("millrace_level", "Level.", {{"side", "own"}}).Set(3);
  left.Gauge("millrace_depth", "Depth.").Set(4);
  left.RemoveGauge("millrace_depth", {});
  const std::string text = metrics.Text();
  EXPECT_NE(text.find("millrace_things_total{kind=\"a\",side=\"left\"} 1"), std::string::npos) << text;
  EXPECT_NE(text.find("millrace_things_total{kind=\"a\",side=\"right\"} 2"), std::string::npos) << text;
  EXPECT_NE(text.find("millrace_level{side=\"own\"} 3"), std::string::npos) << text;
  EXPECT_EQ(text.find("millrace_depth{"), std::string::npos) << text;
}

}  // namespace
}  // namespace millrace
