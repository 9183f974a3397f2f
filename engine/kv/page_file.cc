#include "engine/kv/page_file.h"

#include <fcntl.h>
#include <liburing.h>
#include <unistd.h>

#include <cstring>

#include "base/check.h"

namespace millrace::engine {
namespace {

constexpr unsigned kInFlightMax = 64;

class UringFile final : public PageFile {
 public:
  UringFile(int fd, size_t slot_bytes, int32_t num_slots)
      : fd_(fd), slot_bytes_(slot_bytes), num_slots_(num_slots) {}
  ~UringFile() override {
    if (ring_ready_) {
      while (in_flight_ > 0) {
        io_uring_cqe* entry = nullptr;
        if (io_uring_wait_cqe(&ring_, &entry) != 0) continue;
        io_uring_cqe_seen(&ring_, entry);
        --in_flight_;
      }
      io_uring_queue_exit(&ring_);
    }
    close(fd_);
  }

  Status Start() {
    const int error = io_uring_queue_init(kInFlightMax, &ring_, 0);
    if (error != 0) return Unavailable("io_uring: {}", std::strerror(-error));
    ring_ready_ = true;
    return OkStatus();
  }

  int32_t num_slots() const override { return num_slots_; }

  bool Read(int32_t slot, std::span<std::byte> into, uint64_t tag) override {
    MR_CHECK(into.size() == slot_bytes_);
    io_uring_sqe* const entry = NextEntry();
    if (entry == nullptr) return false;
    io_uring_prep_read(entry, fd_, into.data(), static_cast<unsigned>(into.size()), Offset(slot));
    return Submit(entry, tag);
  }
  bool Write(int32_t slot, std::span<const std::byte> from, uint64_t tag) override {
    MR_CHECK(from.size() == slot_bytes_);
    io_uring_sqe* const entry = NextEntry();
    if (entry == nullptr) return false;
    io_uring_prep_write(entry, fd_, from.data(), static_cast<unsigned>(from.size()), Offset(slot));
    return Submit(entry, tag);
  }
  void Poll(std::vector<Done>* done) override {
    io_uring_cqe* entry = nullptr;
    while (in_flight_ > 0 && io_uring_peek_cqe(&ring_, &entry) == 0) {
      done->push_back({entry->user_data, entry->res == static_cast<int32_t>(slot_bytes_)});
      io_uring_cqe_seen(&ring_, entry);
      --in_flight_;
    }
  }

 private:
  uint64_t Offset(int32_t slot) const {
    MR_CHECK(slot >= 0 && slot < num_slots_, "slot {}", slot);
    return static_cast<uint64_t>(slot) * slot_bytes_;
  }
  io_uring_sqe* NextEntry() { return in_flight_ < kInFlightMax ? io_uring_get_sqe(&ring_) : nullptr; }
  bool Submit(io_uring_sqe* entry, uint64_t tag) {
    entry->user_data = tag;
    // The submission queue is as long as what may be in flight, so an entry that the kernel does not take now
    // goes with the next submission.
    io_uring_submit(&ring_);
    ++in_flight_;
    return true;
  }

  const int fd_;
  const size_t slot_bytes_;
  const int32_t num_slots_;
  io_uring ring_;
  bool ring_ready_ = false;
  unsigned in_flight_ = 0;
};

}  // namespace

StatusOr<std::unique_ptr<PageFile>> CreatePageFile(const std::string& directory, size_t slot_bytes,
                                                   int32_t num_slots) {
  MR_CHECK(slot_bytes > 0 && slot_bytes <= INT32_MAX && num_slots > 0);
  std::string name = directory + "/millrace-kv-XXXXXX";
  const int fd = mkostemp(name.data(), O_CLOEXEC);
  if (fd < 0) return Unavailable("a file for KV pages in {}: {}", directory, std::strerror(errno));
  unlink(name.c_str());
  auto file = std::make_unique<UringFile>(fd, slot_bytes, num_slots);
  const auto bytes = static_cast<int64_t>(slot_bytes) * num_slots;
  if (const int error = posix_fallocate(fd, 0, bytes); error != 0) {
    return ResourceExhausted("{} bytes for KV pages in {}: {}", bytes, directory, std::strerror(error));
  }
  MR_RETURN_IF_ERROR(Annotate(file->Start(), "KV pages in " + directory));
  return std::unique_ptr<PageFile>(std::move(file));
}

}  // namespace millrace::engine
