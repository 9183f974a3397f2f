#include "base/queue.h"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

namespace millrace {
namespace {

TEST(BoundedQueue, FullIsAnAnswerAndLeavesTheValue) {
  BoundedQueue<std::unique_ptr<int>> queue(1);
  auto first = std::make_unique<int>(1);
  auto second = std::make_unique<int>(2);
  EXPECT_TRUE(queue.TryPush(std::move(first)));
  EXPECT_FALSE(queue.TryPush(std::move(second)));
  ASSERT_NE(second, nullptr);
  EXPECT_EQ(**queue.TryPop(), 1);
  EXPECT_FALSE(queue.TryPop().has_value());
}

TEST(BoundedQueue, PopGivesUpAtTheDeadline) {
  BoundedQueue<int> queue(1);
  EXPECT_FALSE(queue.Pop(Clock::System().Now() + std::chrono::milliseconds(5)).has_value());
}

TEST(BoundedQueue, CloseWakesWaitersAndDrains) {
  BoundedQueue<int> queue(4);
  ASSERT_TRUE(queue.TryPush(7));
  std::thread waiter([&] {
    EXPECT_EQ(queue.Pop(), 7);
    EXPECT_FALSE(queue.Pop().has_value());
  });
  queue.Close();
  waiter.join();
  EXPECT_FALSE(queue.TryPush(8));
}

TEST(BoundedQueue, EveryValueIsSeenOnceByManyThreads) {
  BoundedQueue<int> queue(16);
  std::atomic<int64_t> sum{0};
  std::vector<std::jthread> consumers;
  for (int i = 0; i < 3; ++i) {
    consumers.emplace_back([&] {
      while (auto value = queue.Pop()) sum += *value;
    });
  }
  {
    std::vector<std::jthread> producers;
    for (int p = 0; p < 3; ++p) {
      producers.emplace_back([&] {
        for (int i = 1; i <= 1000; ++i) {
          int value = i;
          while (!queue.TryPush(std::move(value))) std::this_thread::yield();
        }
      });
    }
  }
  queue.Close();
  consumers.clear();
  EXPECT_EQ(sum, 3 * 500500);
}

}  // namespace
}  // namespace millrace
