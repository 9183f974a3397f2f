#include "server/gateway/plain_answers.h"

#include <prometheus/text_serializer.h>

#include <bit>

#include "server/gateway/assets.h"
#include "server/gateway/fields.h"
#include "server/gateway/vllm_names.h"

namespace millrace::server {
namespace {

constexpr const char* kVersion = MILLRACE_VERSION;
constexpr size_t kDetokenizeMax = 1 << 20;

Json ModelJson(const ModelInfo& model) {
  return {{"id", model.name},       {"object", "model"},  {"created", model.created},
          {"owned_by", "millrace"}, {"root", model.name}, {"max_model_len", model.context_max}};
}

// What a worker's transfer engine said of its paths.
Json PathsJson(const WorkerSnapshot& worker) {
  Json paths = Json::array();
  if (worker.paths == nullptr) return paths;
  for (const WorkerPath& path : *worker.paths) {
    paths.push_back({{"kind", path.kind},
                     {"local", path.local_rail},
                     {"remote", path.remote_rail},
                     {"state", path.state},
                     {"reason", path.reason},
                     {"bytes_done", path.bytes_done},
                     {"bytes_in_flight", path.bytes_in_flight},
                     {"trips", path.trips},
                     {"bytes_per_second", path.bytes_per_second},
                     {"delay_seconds", path.delay_seconds}});
  }
  return paths;
}

// What a rank of an expert group said of it; null for a worker by itself.
Json GroupJson(const WorkerSnapshot& worker) {
  if (worker.group == nullptr) return nullptr;
  const WorkerGroup& group = *worker.group;
  return {{"rank", group.rank},
          {"ranks", group.ranks},
          {"ranks_alive", std::popcount(group.alive)},
          {"epoch", group.epoch},
          {"experts_held", group.experts_held},
          {"imbalance", group.imbalance},
          {"expert_load", group.expert_load},
          {"rank_load", group.rank_load}};
}

PlainAnswer Answered(const Json& body) { return PlainAnswer{DumpJson(body)}; }

}  // namespace

ApiResult<PlainAnswer> ListModels(GatewayContext& context) {
  return Answered({{"object", "list"}, {"data", Json::array({ModelJson(context.model)})}});
}

ApiResult<PlainAnswer> DescribeOneModel(GatewayContext& context, const std::string& id) {
  if (id == context.model.name) return Answered(ModelJson(context.model));
  ApiError error;
  error.http_status = 404;
  error.type = "invalid_request_error";
  error.code = "model_not_found";
  error.message = "this server has no such model; GET /v1/models lists what it has";
  return error;
}

ApiResult<PlainAnswer> Live(GatewayContext& context) {
  if (context.options.hosts_workers) {
    for (const WorkerSnapshot& worker : context.membership.Snapshot()) {
      if (worker.stalled) return FromStatus(Unavailable("the worker's step does not end"));
    }
  }
  return Answered({{"status", "ok"}});
}

ApiResult<PlainAnswer> Ready(GatewayContext& context) {
  if (context.draining) return FromStatus(Unavailable("this gateway is shutting down"));
  if (!context.membership.CanServe()) return FromStatus(Unavailable("no decode worker is ready"));
  return Answered({{"status", "ok"}});
}

ApiResult<PlainAnswer> Health(GatewayContext& context) {
  if (const ApiResult<PlainAnswer> live = Live(context); !live.ok()) return live.error();
  const ApiResult<PlainAnswer> ready = Ready(context);
  if (!ready.ok()) return ready.error();
  int32_t workers[3] = {};
  for (const WorkerSnapshot& worker : context.membership.Snapshot())
    workers[static_cast<size_t>(worker.role)] += worker.connected && worker.ready && !worker.stalled ? 1 : 0;
  const auto of = [&](WorkerRole role) { return workers[static_cast<size_t>(role)]; };
  return Answered({{"status", "ok"},
                   {"live", true},
                   {"ready", true},
                   {"workers_ready",
                    {{"prefill", of(WorkerRole::kPrefill)},
                     {"decode", of(WorkerRole::kDecode)},
                     {"both", of(WorkerRole::kBoth)}}}});
}

ApiResult<PlainAnswer> MetricsText(GatewayContext& context) {
  const Admission::Counts counts = context.admission.counts();
  context.request_metrics.SetNow(counts.waiting, counts.running, context.connections);
  std::string page = context.metrics.Text();
  if (context.options.vllm_metrics) {
    const VllmNames names(context.metrics.collectable(), context.model.name);
    page += prometheus::TextSerializer().Serialize(names.Collect());
  }
  return PlainAnswer{std::move(page), "text/plain; version=0.0.4; charset=utf-8"};
}

ApiResult<PlainAnswer> Version(GatewayContext& /*context*/) { return Answered({{"version", kVersion}}); }

ApiResult<PlainAnswer> Load(GatewayContext& context) {
  int32_t waiting = 0;
  int32_t running = 0;
  for (const WorkerSnapshot& worker : context.membership.Snapshot()) {
    if (!worker.connected || worker.role == WorkerRole::kPrefill) continue;
    waiting += worker.waiting;
    running += worker.running;
  }
  const Admission::Counts counts = context.admission.counts();
  return Answered({{"server_load", context.requests_running.load()},
                   {"waiting", counts.waiting},
                   {"running", counts.running},
                   {"workers_waiting", waiting},
                   {"workers_running", running}});
}

ApiResult<PlainAnswer> Info(GatewayContext& context) {
  const GatewayOptions& options = context.options;
  const engine::SamplingParams sampling;
  return Answered(
      {{"version", kVersion},
       {"model", ModelJson(context.model)},
       {"configuration", options.effective},
       {"api_keys", context.keys == nullptr ? Json(nullptr) : Json(context.keys->size())},
       {"tls", context.tls != nullptr},
       {"limits",
        {{"body_bytes_max", options.body_bytes_max},
         {"header_bytes_max", options.header_bytes_max},
         {"connections_max", options.connections_max},
         {"running_max", options.admission.running_max},
         {"queue_max", options.admission.queue_max},
         {"request_timeout_seconds", Seconds(options.request_timeout)}}},
       {"defaults",
        {{"temperature", sampling.temperature},
         {"top_p", sampling.top_p},
         {"top_k", sampling.top_k},
         {"min_p", sampling.min_p},
         {"repetition_penalty", sampling.repetition_penalty},
         {"max_tokens", {{"chat", "what the context leaves"}, {"completions", sampling.max_tokens}}}}}});
}

ApiResult<PlainAnswer> WebPage(GatewayContext& /*context*/) {
  return PlainAnswer{std::string(kIndexHtml), "text/html; charset=utf-8"};
}

ApiResult<PlainAnswer> OpenApi(GatewayContext& /*context*/) { return PlainAnswer{std::string(kOpenapiJson)}; }

ApiResult<PlainAnswer> State(GatewayContext& context) {
  static constexpr const char* kRoles[] = {"prefill", "decode", "both"};
  Json workers = Json::array();
  for (const WorkerSnapshot& worker : context.membership.Snapshot()) {
    workers.push_back({{"address", worker.address},
                       {"role", kRoles[static_cast<int>(worker.role)]},
                       {"connected", worker.connected},
                       {"ready", worker.ready},
                       {"waiting", worker.waiting},
                       {"running", worker.running},
                       {"pages_total", worker.pages_total},
                       {"pages_free", worker.pages_free},
                       {"prefill_tokens_per_second", worker.prefill_rate.value},
                       {"open_tickets", worker.open_tickets},
                       {"draining_tickets", worker.draining_tickets},
                       {"transfers", worker.transfers},
                       {"group", GroupJson(worker)},
                       {"paths", PathsJson(worker)}});
  }
  const Admission::Counts counts = context.admission.counts();
  return Answered({{"model", context.model.name},
                   {"draining", context.draining.load()},
                   {"connections", context.connections.load()},
                   {"waiting", counts.waiting},
                   {"running", counts.running},
                   {"requests_max", context.options.admission.running_max},
                   {"queue_max", context.options.admission.queue_max},
                   {"workers", std::move(workers)},
                   {"requests", context.request_log.ToJson(Clock::System().Now())}});
}

ApiResult<PlainAnswer> Abort(GatewayContext& context, const std::string& text) {
  const auto body = ParseJson(text);
  if (!body.ok()) return BadRequest("", std::string(Message(body.status())));
  if (!body->is_object() || !body->contains("id") || !(*body)["id"].is_string())
    return BadRequest("id", "'id' must be the id of an answer");
  if (context.answer_stops.Stop((*body)["id"].get<std::string>())) return Answered({{"aborted", true}});
  ApiError error = BadRequest("id", "no such answer is running");
  error.http_status = 404;
  error.code = "not_found";
  return error;
}

ApiResult<PlainAnswer> Tokenize(GatewayContext& context, const std::string& text) {
  auto body = ParseBody(text, context.model);
  if (!body.ok()) return body.error();
  std::vector<int32_t> ids;
  if (body->contains("messages")) {
    auto prompt = RenderPrompt(text, context.model, context.tokenizer);
    if (!prompt.ok()) return prompt.error();
    ids = std::move(prompt->ids);
  } else {
    if (!body->contains("prompt") || !(*body)["prompt"].is_string())
      return BadRequest("prompt", "'prompt' must be a string, or give 'messages'");
    auto encoded = context.tokenizer.Encode((*body)["prompt"].get_ref<const std::string&>());
    if (!encoded.ok()) return BadRequest("prompt", std::string(Message(encoded.status())));
    ids = *std::move(encoded);
  }
  const size_t count = ids.size();
  return Answered(
      {{"tokens", std::move(ids)}, {"count", count}, {"max_model_len", context.model.context_max}});
}

ApiResult<PlainAnswer> Detokenize(GatewayContext& context, const std::string& text) {
  auto body = ParseBody(text, context.model);
  if (!body.ok()) return body.error();
  Fields fields(*body);
  std::vector<int32_t> ids;
  if (!fields.Has("tokens")) return BadRequest("tokens", "'tokens' is required");
  fields.TokenIds("tokens", kDetokenizeMax, context.tokenizer.size(), &ids);
  if (fields.error()) return *fields.error();
  return Answered({{"prompt", context.tokenizer.Decode(ids, false)}});
}

ApiResult<PlainAnswer> ApplyTemplate(GatewayContext& context, const std::string& text) {
  auto body = ParseBody(text, context.model);
  if (!body.ok()) return body.error();
  auto prompt = RenderPrompt(text, context.model, context.tokenizer);
  if (!prompt.ok()) return prompt.error();
  return Answered({{"prompt", prompt->text}});
}

}  // namespace millrace::server
