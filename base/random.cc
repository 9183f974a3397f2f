#include "base/random.h"

#include <sys/random.h>

#include "base/check.h"

namespace millrace {

uint64_t RandomId() {
  uint64_t id = 0;
  while (id == 0) {
    const ssize_t got = getrandom(&id, sizeof(id), 0);
    MR_CHECK(got == sizeof(id), "getrandom returned {}", got);
  }
  return id;
}

std::string RandomName(const char* prefix) {
  static constexpr char kAlphabet[] = "0123456789abcdefghijklmnopqrstuvwxyz";
  std::string name = prefix;
  Random random(RandomId());
  for (int i = 0; i < 24; ++i) name.push_back(kAlphabet[random.Below(36)]);
  return name;
}

}  // namespace millrace
