#include "engine/moe/rank_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/check.h"

namespace millrace::engine {
namespace {

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

RankFile::~RankFile() {
  if (data_ != nullptr) munmap(data_, bytes());
}

Status RankFile::Map(const std::string& path, bool writable) {
  void* const data =
      mmap(nullptr, bytes(), writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd_.get(), 0);
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
    if (const int error = posix_fallocate(file->fd_.get(), 0, static_cast<off_t>(file->bytes()));
        error != 0) {
      return ResourceExhausted("{}: no room for {} bytes that rank {} exchanges with the others: {}",
                               directory, file->bytes(), rank, std::strerror(error));
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
  if (static_cast<size_t>(info.st_size) != file->bytes()) {
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

}  // namespace millrace::engine
