#include "transfer/landing.h"

#include <gtest/gtest.h>

#include <vector>

namespace millrace::transfer {
namespace {

struct Copy : Lander {
  void Supersede() override { ++superseded; }
  int superseded = 0;
};

class Landing : public testing::Test {
 protected:
  void SetUp() override { table_.Join(1); }
  LandingTable table_;
  Copy a_, b_;
};

TEST_F(Landing, ALaterCopyTakesOverFromOneThatIsLanding) {
  ASSERT_TRUE(table_.Begin(1, 10, 1, 0, &a_));
  ASSERT_TRUE(table_.Begin(1, 10, 2, 0, &b_));
  EXPECT_EQ(a_.superseded, 1);
  table_.End(1, 10);
  EXPECT_EQ(b_.superseded, 0);
  EXPECT_FALSE(table_.Begin(1, 10, 1, 0, &a_)) << "an earlier copy comes last";
}

// A link that is put to rest for one of its copies ends all of them.
struct Link : Lander {
  void Supersede() override {
    for (const uint64_t slice : others) table->End(1, slice);
    others.clear();
  }
  LandingTable* table = nullptr;
  std::vector<uint64_t> others;
};

TEST_F(Landing, SupersedingOneCopyMayEndOthers) {
  Link link;
  link.table = &table_;
  for (uint64_t slice = 10; slice < 200; ++slice) ASSERT_TRUE(table_.Begin(1, slice, 1, 0, &link));
  for (uint64_t slice = 11; slice < 200; ++slice) link.others.push_back(slice);
  ASSERT_TRUE(table_.Begin(1, 10, 2, 0, &a_)) << "by a later copy";
  EXPECT_EQ(table_.num_entries(), 1);
  for (uint64_t slice = 300; slice < 500; ++slice) ASSERT_TRUE(table_.Begin(1, slice, 1, 0, &link));
  for (uint64_t slice = 301; slice < 500; ++slice) link.others.push_back(slice);
  ASSERT_TRUE(table_.Begin(1, 600, 1, 600, &b_)) << "by what is behind its sender";
  EXPECT_EQ(a_.superseded, 1);
  EXPECT_EQ(table_.num_entries(), 1);
  EXPECT_EQ(b_.superseded, 0);
}

TEST_F(Landing, WhatIsRetiredNeverLands) {
  ASSERT_TRUE(table_.Begin(1, 10, 1, 0, &a_));
  ASSERT_TRUE(table_.Begin(1, 12, 1, 11, &b_)) << "10 is retired by this";
  EXPECT_EQ(a_.superseded, 1);
  EXPECT_FALSE(table_.Begin(1, 10, 5, 0, &a_));
  table_.End(1, 12);
  EXPECT_EQ(table_.num_entries(), 0U);
}

TEST_F(Landing, OrdinarySlicesLeaveNothingBehind) {
  for (uint64_t slice = 1; slice < 1000; ++slice) {
    ASSERT_TRUE(table_.Begin(1, slice, 1, slice, &a_));
    table_.End(1, slice);
  }
  EXPECT_EQ(table_.num_entries(), 0U);
  ASSERT_TRUE(table_.Begin(1, 2000, 3, 2000, &a_));
  table_.End(1, 2000);
  EXPECT_EQ(table_.num_entries(), 1U) << "a third copy's traces stay until it is retired";
  ASSERT_TRUE(table_.Begin(1, 2001, 1, 2001, &a_));
  table_.End(1, 2001);
  EXPECT_EQ(table_.num_entries(), 0U);
}

TEST_F(Landing, PeersAreApartAndForgottenWithTheirLastConnection) {
  table_.Join(2);
  ASSERT_TRUE(table_.Begin(1, 10, 2, 10, &a_));
  EXPECT_TRUE(table_.Begin(2, 10, 1, 0, &b_));
  table_.End(1, 10);
  table_.Leave(1);
  table_.Join(1);
  EXPECT_TRUE(table_.Begin(1, 10, 1, 0, &a_));
  EXPECT_EQ(table_.num_superseded(), 0U);
}

}  // namespace
}  // namespace millrace::transfer
