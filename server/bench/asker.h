#pragma once
// Asks one server, over whatever wire: what a load needs of it. io_context's thread.

#include <boost/asio/awaitable.hpp>
#include <boost/asio/io_context.hpp>
#include <memory>
#include <string>

#include "base/clock.h"
#include "base/status.h"
#include "server/bench/answer_meter.h"

namespace millrace::server {

struct LoadTarget;

class Asker {
 public:
  // The kind that the target's URL names. `target` is borrowed for the asker's life. Resolution happens here,
  // once: NotFound when the name has no address, InvalidArgument when --cacert is no file of certificates.
  static StatusOr<std::unique_ptr<Asker>> Create(boost::asio::io_context& io, const LoadTarget& target);
  virtual ~Asker() = default;

  struct Answer {
    int status = 0;     // of HTTP; 200 over gRPC, whose errors are RequestResult's
    std::string body;   // when not a 200 of a POST
    std::string text;   // the answer's content
    std::string model;  // that answered, where the answer is no body
  };
  // GET, or POST when `body` is not empty. Fills `result` (sent .. message); the answer of a POST that began
  // well goes through an AnswerMeter.
  virtual boost::asio::awaitable<Answer> Ask(std::string path, std::string body, Duration timeout,
                                             RequestResult* result) = 0;
  // Ends what is running: it fails with kUnfinished. Nothing new may be asked.
  virtual void Stop() = 0;
  virtual int64_t connections() const = 0;  // opened
};

}  // namespace millrace::server
