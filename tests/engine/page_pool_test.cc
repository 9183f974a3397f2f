#include "engine/kv/page_pool.h"

#include <gtest/gtest.h>

#include <set>

namespace millrace::engine {
namespace {

TEST(PagePool, GivesEveryPageOnceAndNothingBeyond) {
  PagePool pool(4);
  std::vector<PageId> pages;
  EXPECT_TRUE(pool.Allocate(3, PageHolder::kRequest, &pages));
  EXPECT_FALSE(pool.Allocate(2, PageHolder::kRequest, &pages));
  EXPECT_EQ(pages.size(), 3u) << "a refusal takes nothing";
  EXPECT_EQ(pool.num_free(), 1);
  EXPECT_TRUE(pool.Allocate(1, PageHolder::kTicket, &pages));
  EXPECT_EQ(std::set<PageId>(pages.begin(), pages.end()), (std::set<PageId>{0, 1, 2, 3}));
  EXPECT_EQ(pool.num_ticket_only(), 1);
}

TEST(PagePool, FreesAPageOnlyWhenBothKindsOfHolderLetGo) {
  for (const bool request_first : {true, false}) {
    PagePool pool(1);
    std::vector<PageId> pages;
    ASSERT_TRUE(pool.Allocate(1, PageHolder::kRequest, &pages));
    pool.Hold(pages[0], PageHolder::kTicket);
    EXPECT_EQ(pool.num_ticket_only(), 0);
    pool.Release(pages[0], request_first ? PageHolder::kRequest : PageHolder::kTicket);
    EXPECT_EQ(pool.num_free(), 0);
    EXPECT_EQ(pool.num_ticket_only(), request_first ? 1 : 0);
    pool.Release(pages[0], request_first ? PageHolder::kTicket : PageHolder::kRequest);
    EXPECT_EQ(pool.num_free(), 1);
    EXPECT_EQ(pool.num_ticket_only(), 0);
  }
}

TEST(PagePool, CountsSeveralHoldsOfOneKind) {
  PagePool pool(2);
  std::vector<PageId> pages;
  ASSERT_TRUE(pool.Allocate(1, PageHolder::kTicket, &pages));
  pool.Hold(pages[0], PageHolder::kTicket);
  pool.Release(pages[0], PageHolder::kTicket);
  EXPECT_EQ(pool.num_free(), 1);
  EXPECT_EQ(pool.num_ticket_only(), 1);
  pool.Hold(pages[0], PageHolder::kRequest);
  EXPECT_EQ(pool.num_ticket_only(), 0);
  pool.Release(pages[0], PageHolder::kTicket);
  pool.Release(pages[0], PageHolder::kRequest);
  EXPECT_EQ(pool.num_free(), 2);
}

TEST(PagePoolDeathTest, RefusesReleasesAndHoldsWithoutAHold) {
  PagePool pool(2);
  std::vector<PageId> pages;
  ASSERT_TRUE(pool.Allocate(1, PageHolder::kRequest, &pages));
  EXPECT_DEATH(pool.Release(pages[0], PageHolder::kTicket), "not held by a ticket");
  EXPECT_DEATH(pool.Hold(pages[0] == 0 ? 1 : 0, PageHolder::kTicket), "is free");
  EXPECT_DEATH(pool.Release(2, PageHolder::kRequest), "no page 2");
}

TEST(KvLayout, KeepsPiecesApartAndContiguous) {
  KvLayout layout;
  layout.num_layers = 3;
  layout.num_pages = 5;
  layout.num_kv_heads = 4;
  layout.head_dim = 128;
  EXPECT_EQ(layout.piece_bytes(), 128u * 1024);
  EXPECT_EQ(layout.piece_offset(2, 4) + layout.piece_bytes(), layout.total_bytes());
  EXPECT_EQ(layout.row_offset(1, 3, 63) + 256, layout.piece_bytes());
  EXPECT_EQ(layout.row_offset(1, 0, 0), layout.piece_bytes() / 2);
}

TEST(KvLayout, CompatibilityDependsOnEverythingButThePageCount) {
  KvLayout layout;
  layout.num_layers = 3;
  layout.num_pages = 5;
  layout.num_kv_heads = 4;
  layout.head_dim = 128;
  std::set<uint64_t> hashes{layout.CompatibilityHash()};
  KvLayout other = layout;
  other.num_pages = 6;
  EXPECT_EQ(other.CompatibilityHash(), layout.CompatibilityHash());
  other.num_layers = 4;
  EXPECT_TRUE(hashes.insert(other.CompatibilityHash()).second);
  other.num_layers = 3;
  std::swap(other.num_kv_heads, other.head_dim);
  EXPECT_TRUE(hashes.insert(other.CompatibilityHash()).second);
  other = layout;
  other.dtype = KvDType::kF32;
  EXPECT_TRUE(hashes.insert(other.CompatibilityHash()).second);
}

TEST(PagesFor, RoundsUp) {
  EXPECT_EQ(PagesFor(0), 0);
  EXPECT_EQ(PagesFor(1), 1);
  EXPECT_EQ(PagesFor(64), 1);
  EXPECT_EQ(PagesFor(65), 2);
}

}  // namespace
}  // namespace millrace::engine
