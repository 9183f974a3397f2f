#include "base/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <system_error>

namespace millrace {
namespace {

Status FileError(const std::string& path, const char* action, int error) {
  const std::string reason = std::generic_category().message(error);
  if (error == ENOENT) return NotFound("{}: no such file", path);
  if (error == EACCES) return PermissionDenied("{}: permission denied", path);
  return Internal("{}: {} failed: {}", path, action, reason);
}

// Opens a regular file and says its size.
StatusOr<UniqueFd> OpenRegular(const std::string& path, size_t* bytes) {
  UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd.valid()) return FileError(path, "open", errno);
  struct stat info {};
  if (fstat(fd.get(), &info) != 0) return FileError(path, "stat", errno);
  if (!S_ISREG(info.st_mode)) return FailedPrecondition("{}: not a regular file", path);
  *bytes = static_cast<size_t>(info.st_size);
  return fd;
}

}  // namespace

UniqueFd& UniqueFd::operator=(UniqueFd&& other) noexcept {
  if (this != &other) {
    Reset();
    fd_ = std::exchange(other.fd_, -1);
  }
  return *this;
}

void UniqueFd::Reset() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

StatusOr<std::string> ReadFile(const std::string& path, size_t bytes_max) {
  size_t bytes = 0;
  MR_ASSIGN_OR_RETURN(const UniqueFd fd, OpenRegular(path, &bytes));
  if (bytes > bytes_max)
    return ResourceExhausted("{}: {} bytes, more than the limit of {}", path, bytes, bytes_max);
  std::string data(bytes, '\0');
  size_t done = 0;
  while (done < bytes) {
    const ssize_t got = read(fd.get(), data.data() + done, bytes - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return FileError(path, "read", errno);
    if (got == 0) break;
    done += static_cast<size_t>(got);
  }
  data.resize(done);
  return data;
}

Status WriteFileAtomically(const std::string& path, const std::string& data) {
  const std::string temporary = path + ".tmp." + std::to_string(getpid());
  UniqueFd fd(open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  if (!fd.valid()) return FileError(temporary, "create", errno);
  size_t done = 0;
  while (done < data.size()) {
    const ssize_t put = write(fd.get(), data.data() + done, data.size() - done);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) {
      const int error = errno;
      unlink(temporary.c_str());
      return FileError(temporary, "write", error);
    }
    done += static_cast<size_t>(put);
  }
  if (rename(temporary.c_str(), path.c_str()) != 0) {
    const int error = errno;
    unlink(temporary.c_str());
    return FileError(path, "rename", error);
  }
  return OkStatus();
}

StatusOr<MappedFile> MappedFile::Open(const std::string& path) {
  size_t bytes = 0;
  MR_ASSIGN_OR_RETURN(const UniqueFd fd, OpenRegular(path, &bytes));
  if (bytes == 0) return MappedFile(path, {});
  void* address = mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, fd.get(), 0);
  if (address == MAP_FAILED) return FileError(path, "mmap", errno);
  return MappedFile(path, {static_cast<const std::byte*>(address), bytes});
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)), bytes_(std::exchange(other.bytes_, {})) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

}  // namespace millrace
