#include "tests/server/net_place.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>

#include "server/group/net_group.h"

namespace millrace::server {
namespace {

class Addresses final : public engine::GroupPlace {
 public:
  Addresses(std::vector<HostPort> addresses, std::vector<std::string> rails, std::vector<HostPort> dialled)
      : addresses_(std::move(addresses)), rails_(std::move(rails)), dialled_(std::move(dialled)) {}
  StatusOr<std::unique_ptr<engine::ExpertGroup>> Join(
      const engine::RankGroupOptions& options) const override {
    NetGroupOptions net;
    net.listen = addresses_[static_cast<size_t>(options.rank)];
    net.peers.assign(dialled_.begin(), dialled_.begin() + options.shape.num_ranks);
    net.rails = rails_;
    return JoinNetGroup(options, net);
  }

 private:
  const std::vector<HostPort> addresses_;
  const std::vector<std::string> rails_;
  const std::vector<HostPort> dialled_;
};

}  // namespace

std::vector<HostPort> FreeAddresses(int count) {
  using boost::asio::ip::tcp;
  boost::asio::io_context io;
  std::vector<tcp::acceptor> taken;
  std::vector<HostPort> addresses;
  for (int i = 0; i < count; ++i) {
    taken.emplace_back(io, tcp::endpoint(boost::asio::ip::make_address("127.0.0.1"), 0));
    addresses.push_back({"127.0.0.1", taken.back().local_endpoint().port()});
  }
  return addresses;
}

std::unique_ptr<engine::GroupPlace> PlaceAt(std::vector<HostPort> addresses, std::vector<std::string> rails,
                                            std::vector<HostPort> dialled) {
  if (dialled.empty()) dialled = addresses;
  return std::make_unique<Addresses>(std::move(addresses), std::move(rails), std::move(dialled));
}

}  // namespace millrace::server

namespace millrace::engine {

std::unique_ptr<GroupPlace> MakeGroupPlace(int ranks) {
  return server::PlaceAt(server::FreeAddresses(ranks));
}

}  // namespace millrace::engine
