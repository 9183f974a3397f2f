#include "server/bench/workload.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <sstream>
#include <string_view>

#include "base/file.h"
#include "base/json.h"
#include "base/random.h"

namespace millrace::server {
namespace {

constexpr int32_t kMooncakeBlockTokens = 512;

// Common words, so that most tokenizers make one token of most of them.
constexpr std::array<std::string_view, 64> kWords = {
    "the",   "of",    "and",  "to",   "in",    "is",    "that",  "for",   "it",   "as",    "was",
    "with",  "be",    "by",   "on",   "not",   "he",    "this",  "are",   "or",   "his",   "from",
    "at",    "which", "but",  "have", "an",    "had",   "they",  "you",   "were", "their", "one",
    "all",   "we",    "can",  "her",  "has",   "there", "been",  "if",    "more", "when",  "will",
    "would", "who",   "so",   "no",   "water", "house", "small", "large", "word", "line",  "time",
    "made",  "long",  "part", "over", "after", "place", "made",  "year",  "work"};

uint64_t PartSeed(uint64_t seed, uint64_t kind, uint64_t index) {
  return Mix64(Mix64(seed * 4 + kind) + index);
}

StatusOr<double> NeedNumber(const Json& object, const std::string& key, double min) {
  MR_ASSIGN_OR_RETURN(const std::optional<double> value, GetNumber(object, key));
  if (!value.has_value()) return InvalidArgument("'{}' is missing", key);
  if (*value < min) return InvalidArgument("'{}' is {}, but must be at least {}", key, *value, min);
  return *value;
}

StatusOr<int32_t> NeedTokens(const Json& object, const std::string& key) {
  MR_ASSIGN_OR_RETURN(const double value, NeedNumber(object, key, 1));
  if (value != std::floor(value) || value > 1 << 24)
    return InvalidArgument("'{}' must be a whole number", key);
  return static_cast<int32_t>(value);
}

StatusOr<PlannedSession> ReadMooncake(const Json& line, uint64_t seed) {
  PlannedSession session;
  MR_ASSIGN_OR_RETURN(const double milliseconds, NeedNumber(line, "timestamp", 0));
  session.at = milliseconds / 1000;
  PlannedTurn turn;
  MR_ASSIGN_OR_RETURN(int32_t left, NeedTokens(line, "input_length"));
  MR_ASSIGN_OR_RETURN(turn.output_tokens, NeedTokens(line, "output_length"));
  const auto ids = line.find("hash_ids");
  if (ids == line.end() || !ids->is_array()) return InvalidArgument("'hash_ids' must be a list");
  for (const Json& id : *ids) {
    if (!id.is_number_integer()) return InvalidArgument("'hash_ids' must be a list of whole numbers");
    const int32_t tokens = std::min(left, kMooncakeBlockTokens);
    if (tokens == 0) break;
    turn.parts.push_back({PartSeed(seed, 2, static_cast<uint64_t>(id.get<int64_t>())), tokens});
    left -= tokens;
  }
  if (left > 0) return InvalidArgument("'hash_ids' cover {} tokens less than 'input_length'", left);
  session.turns.push_back(std::move(turn));
  return session;
}

StatusOr<PlannedSession> ReadPlain(const Json& line, uint64_t seed, uint64_t index) {
  PlannedSession session;
  MR_ASSIGN_OR_RETURN(session.at, NeedNumber(line, "at", 0));
  PlannedTurn turn;
  MR_ASSIGN_OR_RETURN(const int32_t input, NeedTokens(line, "input_tokens"));
  MR_ASSIGN_OR_RETURN(turn.output_tokens, NeedTokens(line, "output_tokens"));
  turn.parts.push_back({PartSeed(seed, 0, index), input});
  session.turns.push_back(std::move(turn));
  return session;
}

StatusOr<PlannedSession> ReadLine(const std::string& text, uint64_t seed, uint64_t index) {
  MR_ASSIGN_OR_RETURN(const Json line, ParseJson(text));
  if (!line.is_object()) return InvalidArgument("a JSON object is expected");
  return line.contains("timestamp") ? ReadMooncake(line, seed) : ReadPlain(line, seed, index);
}

}  // namespace

StatusOr<IntRange> ParseIntRange(const std::string& flag, const std::string& text, int32_t min) {
  IntRange range;
  const size_t colon = text.find(':');
  const auto read = [](std::string_view part, int32_t* value) {
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), *value);
    return error == std::errc() && end == part.data() + part.size();
  };
  const std::string_view all(text);
  bool good = read(all.substr(0, colon), &range.low);
  range.high = range.low;
  if (colon != std::string::npos) good = good && read(all.substr(colon + 1), &range.high);
  if (!good || range.low < min || range.high < range.low) {
    return InvalidArgument("{} '{}': write N or LOW:HIGH, at least {}", flag, text, min);
  }
  return range;
}

StatusOr<std::vector<PlannedSession>> ReadTrace(const std::string& path, double speed, uint64_t seed) {
  MR_ASSIGN_OR_RETURN(const std::string content, ReadFile(path));
  std::vector<PlannedSession> sessions;
  std::istringstream lines(content);
  std::string text;
  for (uint64_t number = 1; std::getline(lines, text); ++number) {
    if (text.find_first_not_of(" \t\r") == std::string::npos) continue;
    auto session = ReadLine(text, seed, number);
    if (!session.ok()) return Annotate(session.status(), fmt::format("{}:{}", path, number));
    session->at /= speed;
    if (!sessions.empty() && session->at < sessions.back().at) {
      return InvalidArgument("{}:{}: goes back in time", path, number);
    }
    sessions.push_back(*std::move(session));
  }
  if (sessions.empty()) return InvalidArgument("{}: holds no requests", path);
  return sessions;
}

double TimeOfArrival(double count, double rate, double ramp_to, double ramp_seconds) {
  if (ramp_seconds <= 0) return count / rate;
  const double in_ramp = (rate + ramp_to) / 2 * ramp_seconds;
  if (count >= in_ramp) return ramp_seconds + (count - in_ramp) / ramp_to;
  const double slope = (ramp_to - rate) / ramp_seconds;
  if (slope == 0) return count / rate;
  // rate t + slope t^2 / 2 = count
  return (std::sqrt(rate * rate + 2 * slope * count) - rate) / slope;
}

std::string PromptText(uint64_t seed, int32_t words) {
  std::string text;
  text.reserve(static_cast<size_t>(words) * 6);
  Random random(seed);
  for (int32_t i = 0; i < words; ++i) {
    if (i > 0) text += ' ';
    text += kWords[random.Below(kWords.size())];
  }
  return text;
}

StatusOr<Workload> Workload::Create(const WorkloadOptions& options) {
  Workload workload(options);
  if (options.arrival == WorkloadOptions::Arrival::kTrace) {
    MR_ASSIGN_OR_RETURN(workload.trace_, ReadTrace(options.trace, options.trace_speed, options.seed));
  }
  return workload;
}

int32_t Workload::Draw(const IntRange& range) {
  return std::uniform_int_distribution<int32_t>(range.low, range.high)(random_);
}

double Workload::NextArrival() {
  double interval = 1;  // in units of the mean
  if (std::isfinite(options_.burstiness)) {
    interval = std::gamma_distribution<double>(options_.burstiness, 1 / options_.burstiness)(random_);
  }
  // The first request is due at once.
  if (num_sessions_ > 0) arrivals_due_ += interval;
  return TimeOfArrival(arrivals_due_, options_.rate, options_.ramp_to, options_.ramp_seconds);
}

std::optional<PlannedSession> Workload::Next() {
  if (options_.arrival == WorkloadOptions::Arrival::kTrace) {
    if (num_sessions_ == trace_.size()) return std::nullopt;
    return trace_[num_sessions_++];
  }
  PlannedSession session;
  if (options_.arrival == WorkloadOptions::Arrival::kRate) session.at = NextArrival();
  const int32_t turns = Draw(options_.turns);
  for (int32_t t = 0; t < turns; ++t) {
    PlannedTurn turn;
    if (t == 0 && options_.prefix_pools > 0) {
      const auto pool = static_cast<uint64_t>(Draw({0, options_.prefix_pools - 1}));
      turn.parts.push_back({PartSeed(options_.seed, 1, pool), options_.prefix_tokens});
    }
    turn.parts.push_back({PartSeed(options_.seed, 0, (num_sessions_ << 16) + static_cast<uint64_t>(t)),
                          Draw(options_.input_tokens)});
    turn.output_tokens = Draw(options_.output_tokens);
    session.turns.push_back(std::move(turn));
  }
  ++num_sessions_;
  return session;
}

}  // namespace millrace::server
