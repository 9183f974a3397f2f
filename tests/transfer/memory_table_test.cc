#include "transfer/memory_table.h"

#include "harness.h"

namespace millrace::transfer {
namespace {

TEST(MemoryTable, ATicketDrainsWithItsLastPinAndOnlyOnce) {
  std::vector<std::byte> memory(1000);
  MemoryTable table;
  const RegionId region = table.Register(memory, true);
  const TicketId ticket = *table.Open(1, {{region, 0, 1000}});
  ASSERT_TRUE(table.Admit(1, ticket, Operation::kWrite, region, 0, 10).ok());
  ASSERT_TRUE(table.Admit(1, ticket, Operation::kWrite, region, 5, 10).ok());
  int drained = 0;
  table.Close(ticket, [&] { ++drained; });
  table.Close(ticket, [&] { ++drained; });
  EXPECT_FALSE(table.Admit(1, ticket, Operation::kWrite, region, 0, 10).ok());
  table.Unpin(ticket);
  EXPECT_EQ(drained, 0);
  EXPECT_EQ(table.Deregister(region).code(), absl::StatusCode::kFailedPrecondition);
  table.Unpin(ticket);
  EXPECT_EQ(drained, 2);
  EXPECT_TRUE(table.Deregister(region).ok());
  table.Close(ticket, [&] { ++drained; });
  EXPECT_EQ(drained, 3) << "an unknown ticket is drained";
}

// Against a plain model: a byte may be written exactly if it was granted.
TEST(MemoryTable, AdmitsExactlyWhatWasGranted) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    Random random(seed);
    std::vector<std::byte> memory(256);
    MemoryTable table;
    const RegionId region = table.Register(memory, true);
    std::vector<bool> granted(256);
    TicketId ticket = 0;
    for (int i = 0; i < 8; ++i) {
      const uint64_t offset = random.Below(256);
      const uint64_t bytes = 1 + random.Below(256 - offset);
      const uint64_t small = std::min<uint64_t>(bytes, 40);
      if (ticket == 0) {
        ticket = *table.Open(1, {{region, offset, small}});
      } else {
        ASSERT_TRUE(table.Extend(ticket, {{region, offset, small}}).ok());
      }
      for (uint64_t b = offset; b < offset + small; ++b) granted[b] = true;
    }
    for (int i = 0; i < 200; ++i) {
      const uint64_t offset = random.Below(256);
      const auto length = static_cast<uint32_t>(1 + random.Below(60));
      bool all = offset + length <= 256;
      for (uint64_t b = offset; all && b < offset + length; ++b) all = granted[b];
      const auto admitted = table.Admit(1, ticket, Operation::kWrite, region, offset, length);
      ASSERT_EQ(admitted.ok(), all) << "seed " << seed << " " << offset << "+" << length;
      if (all) {
        EXPECT_EQ(*admitted, memory.data() + offset);
        table.Unpin(ticket);
      }
    }
  }
}

}  // namespace
}  // namespace millrace::transfer
