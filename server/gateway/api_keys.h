#pragma once
// Who may use the public listener: keys from a file, kept as hashes, replaced while running.

#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace millrace::server {

// Thread-safe.
class ApiKeys {
 public:
  // Each line of the file: a key, or a name and a key ("alice sk-..."); blank lines and lines that begin with
  // '#' are skipped. A key has 8 to 256 visible characters, a name is what logs, metrics and fairness use
  // ("key-3" for the third line without one). An empty file, a bad line or a key given twice is an error that
  // names file and line, never the key.
  static StatusOr<std::unique_ptr<ApiKeys>> Load(const std::string& path);

  // The name of a key, or nothing. Takes the same time for every key of a given length: hashes are compared,
  // all of them, to the end.
  std::optional<std::string> Find(std::string_view key) const;

  // Reads the file again if it has changed. On an error the old keys stay.
  Status ReloadIfChanged();
  size_t size() const;

 private:
  struct Key {
    std::array<unsigned char, 32> hash{};  // SHA-256
    std::string name;
  };
  explicit ApiKeys(std::string path) : path_(std::move(path)) {}
  Status Read();

  const std::string path_;
  mutable std::mutex mutex_;
  std::vector<Key> keys_;
  std::string version_;  // of the file that was read last
};

// Something that changes when the file's content may have: time, size and inode. Empty if there is no file.
std::string FileVersion(const std::string& path);

}  // namespace millrace::server
