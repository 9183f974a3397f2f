#include "engine/moe/rank_memory.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>

#include "base/digest.h"

namespace millrace::engine {
namespace {

constexpr uint64_t kLayoutVersion = 1;

}  // namespace

uint64_t LayoutOf(const GroupShape& shape) {
  const std::string text = fmt::format("{}|{}|{}|{}|{}|{}|{}|{}|{}", kLayoutVersion, shape.num_ranks,
                                       shape.num_layers, shape.num_experts, shape.experts_per_token,
                                       shape.hidden_size, shape.rows_max, shape.row_bytes, shape.digest);
  return Xxh3(AsBytes(text));
}

RankMemory::RankMemory(const GroupShape& shape, int32_t homes) : homes_(homes) {
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
  products_ = place(products_bytes_ * static_cast<size_t>(homes));
}

void WaitOnWord(const void* word, uint32_t seen, int64_t timeout_us) {
  const struct timespec timeout = {timeout_us / 1'000'000, timeout_us % 1'000'000 * 1000};
  syscall(SYS_futex, word, FUTEX_WAIT, seen, &timeout, nullptr, 0);
}

void WakeAllOnWord(const void* word) { syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

}  // namespace millrace::engine
