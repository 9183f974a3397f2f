#pragma once
// Where the answers of a call go: the sending half of its stream, whoever carries it.

#include "base/status.h"

namespace millrace::server {

// The thread that owns the call.
template <typename Message>
class CallStream {
 public:
  virtual ~CallStream() = default;
  virtual void Write(Message message) = 0;  // in order
  // Ends the stream once what was written has gone out. Once; nothing is written after it.
  virtual void Finish(const Status& status) = 0;
};

}  // namespace millrace::server
