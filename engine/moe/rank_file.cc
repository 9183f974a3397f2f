#include "engine/moe/rank_file.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstring>

#include "base/check.h"
#include "base/digest.h"

namespace millrace::engine {
namespace {

constexpr uint64_t kLayoutVersion = 1;

std::string PathOf(const std::string& directory, int32_t rank) {
  return fmt::format("{}/rank-{}", directory, rank);
}

Status SystemError(const std::string& path, const char* what) {
  return Internal("{}: {}: {}", path, what, std::strerror(errno));
}

struct flock WholeFile(short type) {
  struct flock lock = {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  return lock;
}

bool IsLocked(const UniqueFd& fd) {
  struct flock lock = WholeFile(F_RDLCK);
  return fcntl(fd.get(), F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

}  // namespace

uint64_t LayoutOf(const GroupShape& shape) {
  const std::string text = fmt::format("{}|{}|{}|{}|{}|{}|{}|{}|{}", kLayoutVersion, shape.num_ranks,
                                       shape.num_layers, shape.num_experts, shape.experts_per_token,
                                       shape.hidden_size, shape.rows_max, shape.row_bytes, shape.digest);
  return Xxh3(AsBytes(text));
}

RankFile::RankFile(const GroupShape& shape) {
  const auto place = [this](size_t bytes) {
    const size_t at = bytes_;
    bytes_ += (bytes + 4095) / 4096 * 4096;
    return at;
  };
  const auto cells = static_cast<size_t>(shape.num_layers) * static_cast<size_t>(shape.num_experts);
  const auto rows = static_cast<size_t>(shape.rows_max);
  const size_t slots = rows * static_cast<size_t>(shape.experts_per_token);
  place(sizeof(RankHeader));
  held_ = place(cells);
  loads_ = place(cells * sizeof(uint64_t));
  target_ = place(cells * sizeof(RankMask));
  experts_ = place(slots * sizeof(int32_t));
  owners_ = place(slots);
  rows_ = place(rows * shape.row_bytes);
  products_bytes_ = (slots * static_cast<size_t>(shape.hidden_size) * sizeof(float) + 4095) / 4096 * 4096;
  products_ = place(products_bytes_ * static_cast<size_t>(shape.num_ranks));
}

RankFile::~RankFile() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

Status RankFile::Map(const std::string& path, bool writable) {
  void* const data =
      mmap(nullptr, bytes_, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd_.get(), 0);
  if (data == MAP_FAILED) return SystemError(path, "mmap");
  data_ = static_cast<std::byte*>(data);
  return OkStatus();
}

StatusOr<std::unique_ptr<RankFile>> RankFile::Make(const std::string& directory, int32_t rank,
                                                   const GroupShape& shape, uint64_t incarnation) {
  std::unique_ptr<RankFile> file(new RankFile(shape));
  const std::string path = PathOf(directory, rank);
  const std::string temporary = fmt::format("{}.{:x}", path, incarnation);
  file->fd_ = UniqueFd(open(temporary.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600));
  if (!file->fd_.valid()) return SystemError(temporary, "open");
  const auto fill = [&]() -> Status {
    // Reserved now: a file that cannot grow later would end the process by a signal.
    if (const int error = posix_fallocate(file->fd_.get(), 0, static_cast<off_t>(file->bytes_)); error != 0) {
      return ResourceExhausted("{}: no room for {} bytes that rank {} exchanges with the others: {}",
                               directory, file->bytes_, rank, std::strerror(error));
    }
    struct flock lock = WholeFile(F_WRLCK);
    if (fcntl(file->fd_.get(), F_OFD_SETLK, &lock) != 0) return SystemError(temporary, "lock");
    MR_RETURN_IF_ERROR(file->Map(temporary, /*writable=*/true));
    RankHeader& header = *new (file->data_) RankHeader();
    header.layout = LayoutOf(shape);
    header.incarnation = incarnation;
    if (rename(temporary.c_str(), path.c_str()) != 0) return SystemError(path, "rename");
    return OkStatus();
  };
  if (const Status status = fill(); !status.ok()) {
    unlink(temporary.c_str());
    return status;
  }
  return file;
}

StatusOr<std::unique_ptr<RankFile>> RankFile::Open(const std::string& directory, int32_t rank,
                                                   const GroupShape& shape) {
  std::unique_ptr<RankFile> file(new RankFile(shape));
  const std::string path = PathOf(directory, rank);
  file->fd_ = UniqueFd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file->fd_.valid()) return SystemError(path, "open");
  struct stat info = {};
  if (fstat(file->fd_.get(), &info) != 0) return SystemError(path, "stat");
  if (static_cast<size_t>(info.st_size) != file->bytes_) {
    return FailedPrecondition("{}: rank {} was started with another model, weight format or batch size", path,
                              rank);
  }
  MR_RETURN_IF_ERROR(file->Map(path, /*writable=*/false));
  if (file->header().layout != LayoutOf(shape)) {
    return FailedPrecondition("{}: rank {} was started with another model, weight format or batch size", path,
                              rank);
  }
  return file;
}

bool RankFile::OwnerLives() const { return IsLocked(fd_); }

bool RankLives(const std::string& directory, int32_t rank) {
  const UniqueFd fd(open(PathOf(directory, rank).c_str(), O_RDONLY | O_CLOEXEC));
  return fd.valid() && IsLocked(fd);
}

StatusOr<std::unique_ptr<ControlFile>> ControlFile::Open(const std::string& directory) {
  std::unique_ptr<ControlFile> file(new ControlFile());
  const std::string path = directory + "/control";
  file->fd_ = UniqueFd(open(path.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600));
  if (!file->fd_.valid()) return SystemError(path, "open");
  if (const int error = posix_fallocate(file->fd_.get(), 0, 4096); error != 0) {
    return ResourceExhausted("{}: {}", path, std::strerror(error));
  }
  static_assert(sizeof(ControlHeader) <= 4096);
  void* const data = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file->fd_.get(), 0);
  if (data == MAP_FAILED) return SystemError(path, "mmap");
  file->header_ = static_cast<ControlHeader*>(data);  // zeroes are a valid header
  return file;
}

ControlFile::~ControlFile() {
  if (header_ != nullptr) munmap(static_cast<void*>(header_), 4096);
}

Status ControlFile::Lock() {
  while (flock(fd_.get(), LOCK_EX) != 0) {
    if (errno != EINTR) return SystemError("control", "lock");
  }
  return OkStatus();
}

void ControlFile::Unlock() { flock(fd_.get(), LOCK_UN); }

void WaitOnWord(const void* word, uint32_t seen, int64_t timeout_us) {
  const struct timespec timeout = {timeout_us / 1'000'000, timeout_us % 1'000'000 * 1000};
  syscall(SYS_futex, word, FUTEX_WAIT, seen, &timeout, nullptr, 0);
}

void WakeAllOnWord(const void* word) { syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

}  // namespace millrace::engine
