#pragma once
// How an answer is written: one implementation per API.

#include <string>

#include "server/gateway/answer.h"
#include "server/gateway/api_error.h"

namespace millrace::server {

// Of one answer; one thread at a time. Either the frames or Collect and Whole are used.
class AnswerFormat {
 public:
  virtual ~AnswerFormat() = default;

  // Frames of a stream of server-sent events.
  virtual std::string Begin(const Usage& usage) = 0;
  virtual std::string Delta(const ChoiceDelta& delta, const Usage& usage) = 0;
  virtual std::string End(const Usage& usage) = 0;
  virtual std::string Failure(const ApiError& error) = 0;

  // The whole answer.
  virtual void Collect(const ChoiceDelta& delta) = 0;
  virtual std::string Whole(const Usage& usage) = 0;
};

}  // namespace millrace::server
