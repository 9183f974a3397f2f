#pragma once
// Keeps the list of workers: static addresses and DNS names, each watched by one stream.

#include <grpcpp/grpcpp.h>

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "server/router/router.h"
#include "server/rpc/generate_client.h"

namespace millrace::server {

struct MembershipOptions {
  // "host:port". One rank of an expert group stands for all; a DNS name stands for all its addresses and is
  // resolved again every `resolve_every`; losing DNS stops changes, never traffic: the last good answer
  // stays.
  std::vector<std::string> workers;
  Duration resolve_every = std::chrono::seconds(5);
  // A worker that says nothing for so long counts as lost: it says something every half second, however busy
  // it is.
  Duration watch_timeout = std::chrono::seconds(3);
  std::shared_ptr<grpc::ChannelCredentials> credentials = grpc::InsecureChannelCredentials();
};

// A prompt, to be looked for in the workers' prefix caches.
struct CacheQuery {
  std::span<const int32_t> tokens;
  std::string salt;
};

// Thread-safe. Resolution runs on its own thread, streams on gRPC's.
class Membership {
 public:
  static StatusOr<std::unique_ptr<Membership>> Create(const MembershipOptions& options);
  virtual ~Membership() = default;  // ends every stream
  // Sorted by address; cached_tokens is for `query`. `avoid` is not set.
  virtual std::vector<WorkerSnapshot> Snapshot(const CacheQuery& query = {}) const = 0;
  // Starts the call at a worker, known or not, over the channel that all share; see StartGenerate.
  virtual std::shared_ptr<GenerateCall> Generate(const std::string& address,
                                                 const rpc::GenerateRequest& request, TimePoint deadline,
                                                 std::shared_ptr<GenerateObserver> observer) = 0;
  // The process of that epoch at that address speaks, and says that it computes.
  virtual bool Alive(const std::string& address, uint64_t epoch) const = 0;
  // True once a worker of each needed kind was seen ready, now: (decode or both).
  virtual bool CanServe() const = 0;
};

}  // namespace millrace::server
