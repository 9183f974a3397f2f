#pragma once
// A bounded file of equal slots, read and written without waiting.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"

namespace millrace::engine {

// One thread. Buffers stay valid until their operation shows up in Poll.
class PageFile {
 public:
  struct Done {
    uint64_t tag = 0;
    bool ok = false;  // every byte; what a failed operation left behind is unknown
  };
  virtual ~PageFile() = default;  // waits for what is in flight
  virtual int32_t num_slots() const = 0;
  // False when as many operations are in flight as there may be: try again after Poll.
  virtual bool Read(int32_t slot, std::span<std::byte> into, uint64_t tag) = 0;
  virtual bool Write(int32_t slot, std::span<const std::byte> from, uint64_t tag) = 0;
  // Appends what has completed; never waits.
  virtual void Poll(std::vector<Done>* done) = 0;
};

// On io_uring. The file has no name: it is unlinked as soon as it is open, so that a crash leaves nothing
// behind and no start finds old pages. Its blocks are allocated here. Errors name the directory and what
// failed.
StatusOr<std::unique_ptr<PageFile>> CreatePageFile(const std::string& directory, size_t slot_bytes,
                                                   int32_t num_slots);

}  // namespace millrace::engine
