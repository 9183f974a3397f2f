#include "server/router/router.h"

#include <algorithm>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "engine/kv/layout.h"

namespace millrace::server {
namespace {

bool Excluded(const RouteRequest& request, const std::string& address) {
  return std::find(request.exclude.begin(), request.exclude.end(), address) != request.exclude.end();
}

// The request could ever be served there. Zeroes mean that the worker has not said yet.
bool Fits(const WorkerSnapshot& worker, const RouteRequest& request) {
  if (!request.model_digest.empty() && worker.model_digest != request.model_digest) return false;
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

// A worker speaks every half second. One that has missed two turns may be frozen or cut off; nobody knows
// yet.
constexpr Duration kStaleAfter = std::chrono::milliseconds(1500);

// The gap between tokens varies with what runs beside them. Below twice the peers' it is no reason.
constexpr double kSlownessMin = 2;
constexpr double kSlownessMax = 16;

bool Doubtful(const WorkerSnapshot& worker) { return worker.avoid || worker.silent >= kStaleAfter; }

double Slowness(const WorkerSnapshot& worker, const Medians& gaps) {
  const double median = gaps.Without(worker.token_gap.value);
  if (median <= 0) return 1;
  const double slowness = Believed(worker.token_gap, median) / median;
  return slowness < kSlownessMin ? 1 : std::min(slowness, kSlownessMax);
}

// Smaller is better. First who is in good standing; then who has the pages at all (the others make the
// request wait or preempt), then by how many sequences share the steps and how much is cached, then by how
// full the memory will be.
auto DecodeLoad(const WorkerSnapshot& worker, const RouteRequest& request, const Medians& gaps) {
  const int32_t needed = engine::PagesFor(Uncached(worker, request)) + 1;
  const double uncached = static_cast<double>(Uncached(worker, request)) / std::max(request.prompt_tokens, 1);
  const double used =
      static_cast<double>(worker.pages_total - worker.pages_free + needed) / std::max(worker.pages_total, 1);
  const double sequences = worker.waiting + worker.running + 1 + kCacheWorth * uncached;
  return std::make_tuple(Doubtful(worker), worker.pages_free < needed, sequences * Slowness(worker, gaps),
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
  return Unavailable("no decode worker can hold a prompt of {} tokens{}: {} ready", request.prompt_tokens,
                     request.model_digest.empty() ? "" : " for model " + request.model_digest, ready);
}

// Of a prefill worker that writes to `decode`: the share of its paths that is up, 1 when it has none yet.
double PathsUp(const WorkerSnapshot& worker, const WorkerSnapshot& decode) {
  for (const WorkerLink& link : worker.links) {
    if (link.epoch == decode.epoch && link.paths > 0) return static_cast<double>(link.paths_up) / link.paths;
  }
  return 1;
}

std::vector<std::string> PickPrefill(std::span<const WorkerSnapshot> workers, const WorkerSnapshot& decode,
                                     const RouteRequest& request) {
  std::vector<const WorkerSnapshot*> candidates;
  std::vector<double> rates;
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
    rates.push_back(worker.prefill_rate.value);
  }
  const Medians medians(std::move(rates));
  const auto predicted_seconds = [&](const WorkerSnapshot& worker) {
    // Prompts ahead are taken to be as long as this one. On a worker that does both, running ones mostly
    // decode.
    const int32_t ahead = worker.waiting + (worker.role == WorkerRole::kPrefill ? worker.running : 0);
    // Who has not been measured yet counts as the others' median, so that it gets work and is measured.
    const double rate =
        std::max(Believed(worker.prefill_rate, medians.Without(worker.prefill_rate.value)), 1e-3);
    const double paths_up = std::max(PathsUp(worker, decode), 1e-3);
    return (static_cast<double>(ahead) * request.prompt_tokens + Uncached(worker, request)) / rate / paths_up;
  };
  const auto doubtful = [&](const WorkerSnapshot& worker) {
    return Doubtful(worker) || PathsUp(worker, decode) == 0 ||
           std::find(decode.avoids.begin(), decode.avoids.end(), worker.address) != decode.avoids.end();
  };
  using Cost = std::tuple<bool, double, std::string_view>;
  std::vector<Cost> costs;
  for (const WorkerSnapshot* worker : candidates)
    costs.emplace_back(doubtful(*worker), predicted_seconds(*worker), worker->address);
  std::sort(costs.begin(), costs.end());
  std::vector<std::string> addresses;
  for (const Cost& cost : costs) addresses.emplace_back(std::get<2>(cost));
  return addresses;
}

}  // namespace

StatusOr<Route> PickRoute(std::span<const WorkerSnapshot> workers, const RouteRequest& request) {
  const auto fits = [&](const WorkerSnapshot& worker) {
    return worker.role != WorkerRole::kPrefill && worker.connected && worker.ready &&
           !Excluded(request, worker.address) && Fits(worker, request);
  };
  std::vector<double> token_gaps;
  for (const WorkerSnapshot& worker : workers) {
    if (fits(worker)) token_gaps.push_back(worker.token_gap.value);
  }
  const Medians gaps(std::move(token_gaps));
  const WorkerSnapshot* decode = nullptr;
  for (const WorkerSnapshot& worker : workers) {
    if (!fits(worker)) continue;
    if (decode == nullptr || DecodeLoad(worker, request, gaps) < DecodeLoad(*decode, request, gaps))
      decode = &worker;
  }
  if (decode == nullptr) return NobodyDecodes(workers, request);
  Route route;
  route.decode = decode->address;
  if (Uncached(*decode, request) > request.local_prefill_tokens_max)
    route.prefill = PickPrefill(workers, *decode, request);
  return route;
}

}  // namespace millrace::server
