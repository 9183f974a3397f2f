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

}  // namespace
}  // namespace millrace
