#pragma once
// Files: descriptors that close themselves, whole-file reads, read-only mappings. Errors name the path.

#include <cstddef>
#include <span>
#include <string>
#include <utility>

#include "base/status.h"

namespace millrace {

// Owns a file descriptor (or socket); -1 is "none".
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept;
  ~UniqueFd() { Reset(); }
  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  int Release() { return std::exchange(fd_, -1); }
  void Reset();

 private:
  int fd_ = -1;
};

// The whole file. NotFound / PermissionDenied / ResourceExhausted (over `bytes_max`) / Internal.
StatusOr<std::string> ReadFile(const std::string& path, size_t bytes_max = size_t{1} << 30);

// Writes `data` to `path` through a temporary file and a rename, so that readers see the old or the new
// content.
Status WriteFileAtomically(const std::string& path, const std::string& data);

// A read-only memory mapping of a whole file. Movable; unmaps when destroyed.
class MappedFile {
 public:
  static StatusOr<MappedFile> Open(const std::string& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();
  std::span<const std::byte> bytes() const { return bytes_; }
  const std::string& path() const { return path_; }

 private:
  MappedFile(std::string path, std::span<const std::byte> bytes) : path_(std::move(path)), bytes_(bytes) {}
  std::string path_;
  std::span<const std::byte> bytes_;
};

}  // namespace millrace
