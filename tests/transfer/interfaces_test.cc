#include "transfer/tcp/interfaces.h"

#include <gmock/gmock.h>

namespace millrace::transfer {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using testing::Pair;
using Strings = std::vector<std::string>;

TEST(JoinRails, SubnetsFindEachOtherWhateverTheirOrder) {
  EXPECT_THAT(JoinRails({"10.0.0.1", "10.1.0.1"}, {"10.1.0.2", "10.0.0.2"}),
              ElementsAre(Pair(1, 0), Pair(0, 1)));
}

TEST(JoinRails, UnequalNumbersUseEveryRail) {
  EXPECT_THAT(JoinRails({"10.0.0.1"}, {"10.0.0.2", "10.0.0.3", "10.1.0.2"}),
              ElementsAre(Pair(0, 0), Pair(0, 1), Pair(0, 2)));
  EXPECT_THAT(JoinRails({"10.0.0.1", "10.0.0.3"}, {"10.0.0.2"}), testing::SizeIs(2));
}

TEST(JoinRails, FamiliesAndLoopbackStayAmongThemselves) {
  EXPECT_THAT(JoinRails({"10.0.0.1", "fd00::1"}, {"fd00::2", "10.0.0.2"}),
              ElementsAre(Pair(1, 0), Pair(0, 1)));
  EXPECT_THAT(JoinRails({"127.0.0.1"}, {"10.0.0.2"}), IsEmpty());
  EXPECT_THAT(JoinRails({"0.0.0.0"}, {"10.0.0.2", "127.0.0.1"}), testing::SizeIs(2));
  EXPECT_THAT(JoinRails({"10.0.0.1"}, {"nonsense"}), IsEmpty());
}

TEST(UsableHosts, IncludeAndExcludeByNameOrAddress) {
  const std::vector<InterfaceAddress> all = {{"lo", "127.0.0.1", true},
                                             {"eth0", "10.0.0.1", false},
                                             {"eth1", "10.1.0.1", false},
                                             {"docker0", "172.17.0.1", false}};
  const auto usable = [&](Strings include, Strings exclude) {
    Options options;
    options.include = std::move(include);
    options.exclude = std::move(exclude);
    return UsableHosts(all, options);
  };
  EXPECT_THAT(usable({}, {}), ElementsAre("10.0.0.1", "10.1.0.1"));
  EXPECT_THAT(usable({}, {"eth1"}), ElementsAre("10.0.0.1"));
  EXPECT_THAT(usable({}, {"10.0.*"}), ElementsAre("10.1.0.1"));
  EXPECT_THAT(usable({"docker*", "lo"}, {}), ElementsAre("127.0.0.1", "172.17.0.1"));
  EXPECT_THAT(usable({"*"}, {"*"}), IsEmpty());
}

}  // namespace
}  // namespace millrace::transfer
