#include "engine/backend/cpu/weight_cache.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <vector>

#include "base/digest.h"
#include "base/file.h"
#include "base/log.h"
#include "base/random.h"
#include "engine/backend/cpu/load_jobs.h"

namespace millrace::engine {
namespace {

constexpr uint64_t kPackingVersion = 2;  // of the layouts in kernels.h and the order in cpu_weights.cc
constexpr size_t kBlock = size_t{16} << 20;
constexpr size_t kAlignment = 4096;

struct Header {
  char magic[8] = {'M', 'R', 'W', 'C', 'A', 'C', 'H', '1'};
  uint64_t version = kPackingVersion;
  uint64_t bytes = 0;
  char key[32] = {};
  uint64_t digest = 0;  // of the fields above, then of the block digests
};
static_assert(sizeof(Header) == 64);

size_t BlocksOf(size_t bytes) { return (bytes + kBlock - 1) / kBlock; }

size_t DataOffset(size_t bytes) {
  const size_t head = sizeof(Header) + BlocksOf(bytes) * sizeof(uint64_t);
  return (head + kAlignment - 1) / kAlignment * kAlignment;
}

uint64_t DigestOf(const Header& header, std::span<const uint64_t> blocks) {
  return Xxh3(std::as_bytes(blocks),
              Xxh3(std::as_bytes(std::span(&header, 1)).first(offsetof(Header, digest))));
}

template <typename Byte>
std::span<Byte> Block(std::span<Byte> memory, size_t i) {
  return memory.subspan(i * kBlock, std::min(kBlock, memory.size() - i * kBlock));
}

Status ReadAt(int fd, const std::string& path, size_t offset, std::span<std::byte> out) {
  while (!out.empty()) {
    const ssize_t count = pread(fd, out.data(), out.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return Internal("{}: {}", path, std::strerror(errno));
    if (count == 0) return DataLoss("{}: ends too early", path);
    out = out.subspan(static_cast<size_t>(count));
    offset += static_cast<size_t>(count);
  }
  return OkStatus();
}

Status WriteAt(int fd, const std::string& path, size_t offset, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t count = pwrite(fd, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return Internal("{}: {}", path, std::strerror(errno));
    bytes = bytes.subspan(static_cast<size_t>(count));
    offset += static_cast<size_t>(count);
  }
  return OkStatus();
}

}  // namespace

WeightCache::WeightCache(const CpuWeightsOptions& options, Precision precision, WeightFormat format)
    : options_(options) {
  if (options.cache_directory.empty()) return;
  key_ = Xxh3Hex(AsBytes(fmt::format("{}|{}|{}|{}", kPackingVersion, static_cast<int>(precision),
                                     static_cast<int>(format), options.source_digest)));
  path_ = options.cache_directory + "/" + key_ + ".millrace";
}

bool WeightCache::Read(std::span<std::byte> memory) const {
  if (path_.empty() || access(path_.c_str(), F_OK) != 0) return false;
  const Status status = ReadFrom(path_, memory);
  if (status.ok()) {
    LogInfo("packed weights read from {}", path_);
  } else {
    LogWarning("packed weights are made again: {}", Message(status));
  }
  return status.ok();
}

void WeightCache::Write(std::span<const std::byte> memory) const {
  if (path_.empty()) return;
  const Status status = WriteTo(path_, memory);
  if (!status.ok()) LogWarning("packed weights are not kept: {}", Message(status));
}

Status WeightCache::ReadFrom(const std::string& path, std::span<std::byte> memory) const {
  const UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd.valid()) return Internal("{}: {}", path, std::strerror(errno));
  struct stat status;
  if (fstat(fd.get(), &status) != 0) return Internal("{}: {}", path, std::strerror(errno));
  if (static_cast<size_t>(status.st_size) != DataOffset(memory.size()) + memory.size()) {
    return DataLoss("{}: has {} bytes, not {}", path, status.st_size,
                    DataOffset(memory.size()) + memory.size());
  }
  Header header;
  std::vector<uint64_t> digests(BlocksOf(memory.size()));
  MR_RETURN_IF_ERROR(ReadAt(fd.get(), path, 0, std::as_writable_bytes(std::span(&header, 1))));
  MR_RETURN_IF_ERROR(ReadAt(fd.get(), path, sizeof(header), std::as_writable_bytes(std::span(digests))));
  Header expected;
  expected.bytes = memory.size();
  std::copy_n(key_.data(), sizeof(expected.key), expected.key);
  expected.digest = DigestOf(expected, digests);
  if (std::memcmp(&header, &expected, sizeof(header)) != 0)
    return DataLoss("{}: its header is damaged", path);
  return RunParallel(digests.size(), memory.size(), options_,
                     [&](size_t i, std::vector<float>*) -> StatusOr<size_t> {
                       const std::span<std::byte> block = Block(memory, i);
                       const size_t offset = DataOffset(memory.size()) + i * kBlock;
                       MR_RETURN_IF_ERROR(ReadAt(fd.get(), path, offset, block));
                       if (Xxh3(block) != digests[i]) return DataLoss("{}: block {} is damaged", path, i);
                       // Read once: the page cache has better uses.
                       posix_fadvise(fd.get(), static_cast<off_t>(offset), static_cast<off_t>(block.size()),
                                     POSIX_FADV_DONTNEED);
                       return block.size();
                     });
}

Status WeightCache::WriteTo(const std::string& path, std::span<const std::byte> memory) const {
  std::error_code error;
  std::filesystem::create_directories(options_.cache_directory, error);
  const std::string temporary = path + "." + RandomName("");
  UniqueFd fd(open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
  if (!fd.valid()) return Internal("{}: {}", temporary, std::strerror(errno));
  const auto write = [&]() -> Status {
    CpuWeightsOptions silent = options_;
    silent.progress = nullptr;
    std::vector<uint64_t> digests(BlocksOf(memory.size()));
    const auto write_block = [&](size_t i, std::vector<float>*) -> StatusOr<size_t> {
      const std::span<const std::byte> block = Block(memory, i);
      digests[i] = Xxh3(block);
      MR_RETURN_IF_ERROR(WriteAt(fd.get(), temporary, DataOffset(memory.size()) + i * kBlock, block));
      return size_t{0};
    };
    MR_RETURN_IF_ERROR(RunParallel(digests.size(), 0, silent, write_block));
    Header header;
    header.bytes = memory.size();
    std::copy_n(key_.data(), sizeof(header.key), header.key);
    header.digest = DigestOf(header, digests);
    MR_RETURN_IF_ERROR(WriteAt(fd.get(), temporary, 0, std::as_bytes(std::span(&header, 1))));
    MR_RETURN_IF_ERROR(WriteAt(fd.get(), temporary, sizeof(header), std::as_bytes(std::span(digests))));
    if (fsync(fd.get()) != 0) return Internal("{}: {}", temporary, std::strerror(errno));
    if (rename(temporary.c_str(), path.c_str()) != 0) return Internal("{}: {}", path, std::strerror(errno));
    return OkStatus();
  };
  const Status status = write();
  if (!status.ok()) unlink(temporary.c_str());
  return status;
}

}  // namespace millrace::engine
