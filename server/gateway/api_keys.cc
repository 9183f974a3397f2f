#include "server/gateway/api_keys.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>
#include <sys/stat.h>

#include <algorithm>
#include <set>
#include <sstream>

#include "base/file.h"

namespace millrace::server {
namespace {

constexpr size_t kKeyBytesMin = 8;
constexpr size_t kKeyBytesMax = 256;
constexpr size_t kKeysMax = 10'000;

std::array<unsigned char, 32> Hash(std::string_view text) {
  std::array<unsigned char, 32> hash{};
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), hash.data());
  return hash;
}

}  // namespace

std::string FileVersion(const std::string& path) {
  struct stat info {};
  if (stat(path.c_str(), &info) != 0) return "";
  return fmt::format("{}.{}.{}.{}", info.st_mtim.tv_sec, info.st_mtim.tv_nsec, info.st_size, info.st_ino);
}

StatusOr<std::unique_ptr<ApiKeys>> ApiKeys::Load(const std::string& path) {
  std::unique_ptr<ApiKeys> keys(new ApiKeys(path));
  MR_RETURN_IF_ERROR(keys->Read());
  return keys;
}

Status ApiKeys::Read() {
  const std::string version = FileVersion(path_);
  MR_ASSIGN_OR_RETURN(const std::string text, ReadFile(path_, size_t{4} << 20));
  std::vector<Key> keys;
  std::set<std::array<unsigned char, 32>> seen;
  std::istringstream lines(text);
  std::string line;
  for (int number = 1; std::getline(lines, line); ++number) {
    std::istringstream words(line);
    std::string first;
    std::string second;
    std::string third;
    words >> first >> second >> third;
    if (first.empty() || first.front() == '#') continue;
    if (!third.empty())
      return InvalidArgument("{}:{}: a key, or a name and a key, are expected", path_, number);
    const std::string& key = second.empty() ? first : second;
    const bool visible = std::all_of(key.begin(), key.end(), [](char c) { return c > ' ' && c <= '~'; });
    if (!visible || key.size() < kKeyBytesMin || key.size() > kKeyBytesMax) {
      return InvalidArgument("{}:{}: a key has {} to {} visible ASCII characters", path_, number,
                             kKeyBytesMin, kKeyBytesMax);
    }
    Key entry{Hash(key), second.empty() ? fmt::format("key-{}", keys.size() + 1) : first};
    if (!seen.insert(entry.hash).second)
      return InvalidArgument("{}:{}: the key is there twice", path_, number);
    keys.push_back(std::move(entry));
    if (keys.size() > kKeysMax) return InvalidArgument("{}: more than {} keys", path_, kKeysMax);
  }
  if (keys.empty()) return InvalidArgument("{}: holds no key", path_);
  std::lock_guard lock(mutex_);
  keys_ = std::move(keys);
  version_ = version;
  return OkStatus();
}

std::optional<std::string> ApiKeys::Find(std::string_view key) const {
  const auto hash = Hash(key.substr(0, kKeyBytesMax + 1));
  std::lock_guard lock(mutex_);
  const Key* found = nullptr;
  for (const Key& entry : keys_) {
    if (CRYPTO_memcmp(entry.hash.data(), hash.data(), hash.size()) == 0) found = &entry;
  }
  if (found == nullptr) return std::nullopt;
  return found->name;
}

Status ApiKeys::ReloadIfChanged() {
  const std::string version = FileVersion(path_);
  {
    std::lock_guard lock(mutex_);
    if (version == version_) return OkStatus();
    version_ = version;  // an error is said once per change, not once per look
  }
  return Read();
}

size_t ApiKeys::size() const {
  std::lock_guard lock(mutex_);
  return keys_.size();
}

}  // namespace millrace::server
