#include "transfer/telemetry.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace millrace::transfer {
namespace {

using testing::HasSubstr;
using testing::Not;

constexpr const char* kLabels = "{kind=\"tcp\",local=\"10.0.0.1\",remote=\"10.0.0.2:7\"}";

PathSnapshot PathOf(PeerId peer, uint64_t bytes, double rate) {
  PathSnapshot path;
  path.peer = peer;
  path.kind = "tcp";
  path.local_rail = "10.0.0.1";
  path.remote_rail = "10.0.0.2:7";
  path.state = "up";
  path.bytes_done = bytes;
  path.bytes_per_second = rate;
  return path;
}

class TelemetryTest : public testing::Test {
 protected:
  std::string After(std::vector<PathSnapshot> paths) {
    now_ += std::chrono::seconds(1);
    telemetry_.Update(now_, [&paths] {
      Snapshot snapshot;
      snapshot.paths = std::move(paths);
      return snapshot;
    });
    return metrics_.Text();
  }
  static std::string Line(const std::string& name, const std::string& value) {
    return "millrace_transfer_path_" + name + kLabels + " " + value + "\n";
  }

  Metrics metrics_;
  Telemetry telemetry_{&metrics_};
  TimePoint now_{std::chrono::seconds(1)};
};

TEST_F(TelemetryTest, APathThatComesBackGoesOnCounting) {
  EXPECT_THAT(After({PathOf(1, 100, 5)}), HasSubstr(Line("bytes_total", "100")));
  EXPECT_THAT(After({PathOf(1, 150, 5)}), HasSubstr(Line("bytes_total", "150")));
  // The process restarts; what its successor moves over the same rails comes on top, from its first byte.
  EXPECT_THAT(After({PathOf(2, 30, 5)}), HasSubstr(Line("bytes_total", "180")));
  EXPECT_THAT(After({PathOf(2, 40, 5)}), HasSubstr(Line("bytes_total", "190")));
}

TEST_F(TelemetryTest, GaugesGoWithThePath) {
  EXPECT_THAT(After({PathOf(1, 100, 5)}), HasSubstr(Line("bytes_per_second", "5")));
  const std::string gone = After({});
  EXPECT_THAT(gone, Not(HasSubstr("millrace_transfer_path_up{")));
  EXPECT_THAT(gone, Not(HasSubstr("millrace_transfer_path_bytes_per_second{")));
  EXPECT_THAT(gone, HasSubstr(Line("bytes_total", "100")));
  EXPECT_THAT(After({PathOf(2, 0, 7)}), HasSubstr(Line("bytes_per_second", "7")));
}

TEST_F(TelemetryTest, PathsOverTheSameRailsAddUp) {
  PathSnapshot dying = PathOf(1, 100, 5);
  dying.state = "down";
  const std::string text = After({dying, PathOf(2, 10, 6), PathOf(2, 1, 1)});
  EXPECT_THAT(text, HasSubstr(Line("bytes_total", "111")));
  EXPECT_THAT(text, HasSubstr(Line("bytes_per_second", "12")));
  EXPECT_THAT(text, HasSubstr(Line("up", "1")));
  EXPECT_THAT(After({dying, PathOf(2, 12, 6), PathOf(2, 1, 1)}), HasSubstr(Line("bytes_total", "113")));
}

}  // namespace
}  // namespace millrace::transfer
