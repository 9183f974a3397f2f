#include "tests/load/stream_reader.h"

#include <algorithm>
#include <charconv>

namespace millrace {
namespace {

constexpr std::string_view kHeaderEnd = "\r\n\r\n";
constexpr std::string_view kLineEnd = "\r\n";
constexpr std::string_view kData = "data: ";
constexpr std::string_view kText = "\"text\":\"";

}  // namespace

void StreamReader::Push(std::string_view bytes, const OnText& on_text) {
  while (!bytes.empty() && error_.empty()) {
    if (state_ == State::kData) {
      const std::string_view data = bytes.substr(0, chunk_left_);
      bytes.remove_prefix(data.size());
      chunk_left_ -= data.size();
      OnBody(data, on_text);
      if (chunk_left_ == 0) state_ = State::kDataEnd;
      continue;
    }
    pending_.push_back(bytes.front());
    bytes.remove_prefix(1);
    if (state_ == State::kHeader && pending_.ends_with(kHeaderEnd)) OnHeader();
    if (state_ == State::kSize && pending_.ends_with(kLineEnd)) OnSize();
    if (state_ == State::kDataEnd && pending_ == kLineEnd) {
      pending_.clear();
      state_ = State::kSize;
    }
  }
}

void StreamReader::OnHeader() {
  const size_t space = pending_.find(' ');
  std::from_chars(pending_.data() + std::min(space + 1, pending_.size()), pending_.data() + pending_.size(),
                  status_);
  if (status_ != 200) error_ = pending_;
  pending_.clear();
  state_ = State::kSize;
}

void StreamReader::OnSize() {
  const auto [end, error] =
      std::from_chars(pending_.data(), pending_.data() + pending_.size(), chunk_left_, 16);
  if (error != std::errc() || end != pending_.data() + pending_.size() - kLineEnd.size())
    error_ = "no chunk size: " + pending_;
  pending_.clear();
  if (chunk_left_ == 0) {
    ended_ = true;
    state_ = State::kDataEnd;  // no trailers are sent
  } else {
    state_ = State::kData;
  }
}

void StreamReader::OnBody(std::string_view bytes, const OnText& on_text) {
  while (!bytes.empty()) {
    const size_t end = bytes.find('\n');
    if (end == std::string_view::npos) {
      line_ += bytes;
      return;
    }
    if (line_.empty()) {
      OnLine(bytes.substr(0, end), on_text);
    } else {
      line_ += bytes.substr(0, end);
      OnLine(line_, on_text);
      line_.clear();
    }
    bytes.remove_prefix(end + 1);
  }
}

void StreamReader::OnLine(std::string_view line, const OnText& on_text) {
  if (!line.starts_with(kData)) return;
  if (line.substr(kData.size()) == "[DONE]") {
    saw_done_ = true;
    return;
  }
  if (line.find("\"error\":") != std::string_view::npos) {
    error_ = line;
    return;
  }
  const size_t found = line.find(kText);
  if (found == std::string_view::npos) return;
  const std::string_view rest = line.substr(found + kText.size());
  const std::string_view text = rest.substr(0, rest.find('"'));
  if (!text.empty()) on_text(text);
}

}  // namespace millrace
