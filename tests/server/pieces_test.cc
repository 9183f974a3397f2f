#include "server/worker/pieces.h"

#include <gtest/gtest.h>

#include <vector>

namespace millrace::server {
namespace {

engine::KvLayout Layout(int32_t num_pages) {
  return {.num_layers = 2,
          .num_pages = num_pages,
          .num_kv_heads = 1,
          .head_dim = 4,
          .dtype = engine::KvDType::kBf16};
}
const size_t kPiece = Layout(1).piece_bytes();

TEST(GrantRanges, CoverAllLayersAndJoinNeighbours) {
  const std::vector<engine::PageId> pages = {3, 4, 6};
  const auto ranges = GrantRanges(Layout(10), 5, pages);
  ASSERT_EQ(ranges.size(), 4u);
  const size_t offsets[] = {3, 6, 13, 16}, counts[] = {2, 1, 2, 1};
  for (size_t i = 0; i < ranges.size(); ++i) {
    EXPECT_EQ(ranges[i].region, 5u);
    EXPECT_EQ(ranges[i].offset, offsets[i] * kPiece);
    EXPECT_EQ(ranges[i].bytes, counts[i] * kPiece);
  }
}

TEST(LayerIntents, JoinOnlyWhatIsContiguousOnBothSides) {
  const std::vector<engine::PageId> source = {1, 2, 3, 4}, destination = {7, 8, 10, 11};
  const auto intents = LayerIntents(Layout(10), 1, source, Layout(20), 9, destination, 1);
  ASSERT_EQ(intents.size(), 2u);
  EXPECT_EQ(intents[0].local.offset, (10 + 1) * kPiece);
  EXPECT_EQ(intents[0].local.bytes, 2 * kPiece);
  EXPECT_EQ(intents[0].remote_region, 9u);
  EXPECT_EQ(intents[0].remote_offset, (20 + 7) * kPiece);
  EXPECT_EQ(intents[1].local.offset, (10 + 3) * kPiece);
  EXPECT_EQ(intents[1].remote_offset, (20 + 10) * kPiece);
}

TEST(SequenceDigest, IsThatOfTheContentWhereverItLies) {
  const engine::KvLayout a = Layout(4), b = Layout(9);
  std::vector<std::byte> memory_a(a.total_bytes()), memory_b(b.total_bytes());
  const std::vector<engine::PageId> pages_a = {2, 0}, pages_b = {5, 8};
  uint64_t sum = 0;
  for (int32_t layer = 0; layer < 2; ++layer) {
    for (size_t page = 0; page < 2; ++page) {
      for (size_t i = 0; i < kPiece; ++i) {
        const auto value = static_cast<std::byte>(i * 31 + page * 7 + static_cast<size_t>(layer));
        memory_a[a.piece_offset(layer, pages_a[page]) + i] = value;
        memory_b[b.piece_offset(layer, pages_b[page]) + i] = value;
      }
      // Piece by piece, as it is summed up while it is sent.
      sum +=
          LayerDigest(a, memory_a, std::span(pages_a).subspan(page, 1), layer, static_cast<int32_t>(page), 2);
    }
  }
  EXPECT_EQ(SequenceDigest(b, memory_b, pages_b, 0), sum);
  const std::vector<engine::PageId> swapped = {8, 5};
  EXPECT_NE(SequenceDigest(b, memory_b, swapped, 0), sum);
  memory_b[b.piece_offset(1, 8) + kPiece - 1] ^= std::byte{0x80};
  EXPECT_NE(SequenceDigest(b, memory_b, pages_b, 0), sum);
}

}  // namespace
}  // namespace millrace::server
