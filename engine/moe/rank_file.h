#pragma once
// Ranks on one host: one file per rank, written by that rank alone and mapped read-only by the others, so
// that no rank, however broken, can spoil what another one computes; and one control file with the
// membership. Files lie in a directory on tmpfs, which containers of one pod can share.

#include <memory>
#include <string>

#include "base/file.h"
#include "base/status.h"
#include "engine/moe/rank_memory.h"

namespace millrace::engine {

// A process holds the file of that rank.
bool RankLives(const std::string& directory, int32_t rank);

// One mapped rank file. Its write lock is held by the process that owns it, and by nobody once that is gone.
class RankFile final : public RankMemory {
 public:
  // Makes the file of this process: memory reserved (ResourceExhausted names bytes and directory), locked,
  // zeroed, put in its place by a rename, over what a former process has left.
  static StatusOr<std::unique_ptr<RankFile>> Make(const std::string& directory, int32_t rank,
                                                  const GroupShape& shape, uint64_t incarnation);
  // Maps another rank's. FailedPrecondition if its layout differs.
  static StatusOr<std::unique_ptr<RankFile>> Open(const std::string& directory, int32_t rank,
                                                  const GroupShape& shape);
  ~RankFile() override;

  bool OwnerLives() const override;  // of another rank's file

 private:
  explicit RankFile(const GroupShape& shape) : RankMemory(shape, shape.num_ranks) {}
  Status Map(const std::string& path, bool writable);

  UniqueFd fd_;
};

// The control file, mapped for writing; made if it is not there. One process at a time joins: Lock waits.
class ControlFile {
 public:
  static StatusOr<std::unique_ptr<ControlFile>> Open(const std::string& directory);
  ~ControlFile();
  ControlFile(const ControlFile&) = delete;
  ControlFile& operator=(const ControlFile&) = delete;
  ControlHeader& header() const { return *header_; }
  Status Lock();
  void Unlock();

 private:
  ControlFile() = default;
  UniqueFd fd_;
  ControlHeader* header_ = nullptr;
};

}  // namespace millrace::engine
