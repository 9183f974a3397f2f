#include "server/router/router.h"

#include <algorithm>
#include <tuple>

#include "engine/kv/layout.h"

namespace millrace::server {
namespace {

bool Excluded(const RouteRequest& request, const std::string& address) {
  return std::find(request.exclude.begin(), request.exclude.end(), address) != request.exclude.end();
}

// The prompt could ever be held there. Zeroes mean that the worker has not said yet.
bool Fits(const WorkerSnapshot& worker, const RouteRequest& request) {
  if (worker.context_max > 0 && request.prompt_tokens >= worker.context_max) return false;
  return worker.pages_total == 0 || engine::PagesFor(request.prompt_tokens) <= worker.pages_total;
}

bool Compatible(const WorkerSnapshot& a, const WorkerSnapshot& b) {
  return a.protocol_version == b.protocol_version && a.model_digest == b.model_digest &&
         a.layout_hash == b.layout_hash;
}

// Tokens of the prompt whose KV the worker would have to compute or get; at least one, as it keeps no logits.
int32_t Uncached(const WorkerSnapshot& worker, const RouteRequest& request) {
  return std::max(request.prompt_tokens - worker.cached_tokens, std::min(request.prompt_tokens, 1));
}

// A prompt that is there in full is worth this many sequences that share the steps: the transfer or the
// computing of its KV against the time that they take. A worker with a warm cache gets the conversation back
// until it has so much more to do than another.
constexpr double kCacheWorth = 2;

// Smaller is better. First who has the pages at all (the others make the request wait or preempt), then by
// how many sequences share the steps and how much is cached, then by how full the memory will be.
auto DecodeLoad(const WorkerSnapshot& worker, const RouteRequest& request) {
  const int32_t needed = engine::PagesFor(Uncached(worker, request)) + 1;
  const double uncached = static_cast<double>(Uncached(worker, request)) / std::max(request.prompt_tokens, 1);
  const double used =
      static_cast<double>(worker.pages_total - worker.pages_free + needed) / std::max(worker.pages_total, 1);
  return std::make_tuple(worker.pages_free < needed, worker.waiting + worker.running + kCacheWorth * uncached,
                         used, std::cref(worker.address));
}

Status NobodyDecodes(std::span<const WorkerSnapshot> workers, const RouteRequest& request) {
  int known = 0, connected = 0, ready = 0, excluded = 0;
  for (const WorkerSnapshot& worker : workers) {
    if (worker.role == WorkerRole::kPrefill && worker.connected) continue;
    ++known;
    connected += worker.connected;
    if (!worker.connected || !worker.ready) continue;
    ++ready;
    excluded += Excluded(request, worker.address);
  }
  if (ready == 0) return Unavailable("no decode worker is ready: {} known, {} connected", known, connected);
  if (excluded == ready) {
    return Unavailable("no decode worker is left: {} known, {} ready, {} failed this request already", known,
                       ready, excluded);
  }
  return Unavailable("no decode worker can hold a prompt of {} tokens: {} ready", request.prompt_tokens,
                     ready);
}

std::vector<std::string> PickPrefill(std::span<const WorkerSnapshot> workers, const WorkerSnapshot& decode,
                                     const RouteRequest& request) {
  std::vector<const WorkerSnapshot*> candidates;
  double rate_sum = 0;
  int rate_count = 0;
  for (const WorkerSnapshot& worker : workers) {
    // A worker that does both prefills for pure decode workers only; one that does both itself needs no other
    // such.
    const bool prefills = worker.role == WorkerRole::kPrefill ||
                          (worker.role == WorkerRole::kBoth && decode.role == WorkerRole::kDecode);
    if (!prefills || !worker.connected || !worker.ready || worker.address == decode.address ||
        Excluded(request, worker.address) || !Compatible(worker, decode) || !Fits(worker, request)) {
      continue;
    }
    candidates.push_back(&worker);
    if (worker.prefill_tokens_per_second > 0) {
      rate_sum += worker.prefill_tokens_per_second;
      ++rate_count;
    }
  }
  // Who has not been measured yet counts as average, so that it gets work and is measured.
  const double rate_default = rate_count > 0 ? rate_sum / rate_count : 1;
  const auto predicted_seconds = [&](const WorkerSnapshot& worker) {
    // Prompts ahead are taken to be as long as this one. On a worker that does both, running ones mostly
    // decode.
    const int32_t ahead = worker.waiting + (worker.role == WorkerRole::kPrefill ? worker.running : 0);
    const double rate =
        worker.prefill_tokens_per_second > 0 ? worker.prefill_tokens_per_second : rate_default;
    return (static_cast<double>(ahead) * request.prompt_tokens + Uncached(worker, request)) / rate;
  };
  std::sort(candidates.begin(), candidates.end(), [&](const auto* a, const auto* b) {
    return std::make_tuple(predicted_seconds(*a), std::cref(a->address)) <
           std::make_tuple(predicted_seconds(*b), std::cref(b->address));
  });
  std::vector<std::string> addresses;
  for (const WorkerSnapshot* worker : candidates) addresses.push_back(worker->address);
  return addresses;
}

}  // namespace

StatusOr<Route> PickRoute(std::span<const WorkerSnapshot> workers, const RouteRequest& request) {
  const WorkerSnapshot* decode = nullptr;
  for (const WorkerSnapshot& worker : workers) {
    if (worker.role == WorkerRole::kPrefill || !worker.connected || !worker.ready ||
        Excluded(request, worker.address) || !Fits(worker, request)) {
      continue;
    }
    if (decode == nullptr || DecodeLoad(worker, request) < DecodeLoad(*decode, request)) decode = &worker;
  }
  if (decode == nullptr) return NobodyDecodes(workers, request);
  Route route;
  route.decode = decode->address;
  if (Uncached(*decode, request) > request.local_prefill_tokens_max)
    route.prefill = PickPrefill(workers, *decode, request);
  return route;
}

}  // namespace millrace::server
