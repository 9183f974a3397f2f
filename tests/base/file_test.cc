#include "base/file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdlib>
#include <filesystem>

namespace millrace {
namespace {

class FileTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = testing::TempDir() + "millrace_file_XXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    directory_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }
  std::string directory_;
};

TEST_F(FileTest, ReadsBackWhatWasWritten) {
  const std::string path = directory_ + "/a";
  const std::string data("bytes\0and more", 14);
  ASSERT_TRUE(WriteFileAtomically(path, data).ok());
  EXPECT_EQ(*ReadFile(path), data);
  auto mapped = MappedFile::Open(path);
  ASSERT_TRUE(mapped.ok());
  EXPECT_EQ(mapped->bytes().size(), data.size());
  const MappedFile moved = std::move(*mapped);
  EXPECT_EQ(static_cast<char>(moved.bytes()[0]), 'b');
  EXPECT_TRUE(mapped->bytes().empty());
}

TEST_F(FileTest, ErrorsNameThePath) {
  const auto missing = ReadFile(directory_ + "/none");
  EXPECT_EQ(missing.status().code(), absl::StatusCode::kNotFound);
  EXPECT_NE(Message(missing.status()).find("/none"), std::string_view::npos);
  EXPECT_EQ(MappedFile::Open(directory_).status().code(), absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(WriteFileAtomically(directory_ + "/big", std::string(100, 'x')).ok());
  EXPECT_EQ(ReadFile(directory_ + "/big", 99).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_FALSE(WriteFileAtomically(directory_ + "/no/such/dir", "x").ok());
}

TEST_F(FileTest, MapsAnEmptyFileAsNoBytes) {
  ASSERT_TRUE(WriteFileAtomically(directory_ + "/empty", "").ok());
  EXPECT_TRUE(MappedFile::Open(directory_ + "/empty")->bytes().empty());
}

}  // namespace
}  // namespace millrace
