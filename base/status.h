#pragma once
// Operating errors are absl::Status. This file is the one bridge between std strings and the distribution's
// abseil, which is built with its own string_view: messages go in through fmt and come out as
// std::string_view.

#include <fmt/core.h>

#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace millrace {

using Status = absl::Status;
template <typename T>
using StatusOr = absl::StatusOr<T>;

inline Status OkStatus() { return absl::OkStatus(); }

inline Status MakeStatus(absl::StatusCode code, std::string_view message) {
  return Status(code, absl::string_view(message.data(), message.size()));
}

// The message of a status, without its code.
inline std::string_view Message(const Status& status) {
  return std::string_view(status.message().data(), status.message().size());
}

// InvalidArgument("field '{}': ...", name) and its siblings: a status of that code with a formatted message.
#define MILLRACE_STATUS_FACTORY(name, code)                                                      \
  template <typename... Args>                                                                    \
  Status name(fmt::format_string<Args...> format, Args&&... args) {                              \
    return MakeStatus(absl::StatusCode::code, fmt::format(format, std::forward<Args>(args)...)); \
  }
MILLRACE_STATUS_FACTORY(InvalidArgument, kInvalidArgument)
MILLRACE_STATUS_FACTORY(NotFound, kNotFound)
MILLRACE_STATUS_FACTORY(FailedPrecondition, kFailedPrecondition)
MILLRACE_STATUS_FACTORY(Unavailable, kUnavailable)
MILLRACE_STATUS_FACTORY(ResourceExhausted, kResourceExhausted)
MILLRACE_STATUS_FACTORY(DeadlineExceeded, kDeadlineExceeded)
MILLRACE_STATUS_FACTORY(Cancelled, kCancelled)
MILLRACE_STATUS_FACTORY(DataLoss, kDataLoss)
MILLRACE_STATUS_FACTORY(Internal, kInternal)
MILLRACE_STATUS_FACTORY(Unimplemented, kUnimplemented)
MILLRACE_STATUS_FACTORY(Aborted, kAborted)
MILLRACE_STATUS_FACTORY(PermissionDenied, kPermissionDenied)
#undef MILLRACE_STATUS_FACTORY

// The same code, with "context: " before the message. An OK status stays OK.
inline Status Annotate(const Status& status, std::string_view context) {
  if (status.ok()) return status;
  return MakeStatus(status.code(), fmt::format("{}: {}", context, Message(status)));
}

}  // namespace millrace

// Returns from the enclosing function when `expression` (a Status) is an error.
#define MR_RETURN_IF_ERROR(expression)            \
  do {                                            \
    ::millrace::Status mr_status_ = (expression); \
    if (!mr_status_.ok()) return mr_status_;      \
  } while (false)

#define MR_CONCAT_INNER(a, b) a##b
#define MR_CONCAT(a, b) MR_CONCAT_INNER(a, b)

// MR_ASSIGN_OR_RETURN(auto x, F()): x gets F()'s value, or the enclosing function returns F()'s error.
#define MR_ASSIGN_OR_RETURN(declaration, expression)                                          \
  auto MR_CONCAT(mr_result_, __LINE__) = (expression);                                        \
  if (!MR_CONCAT(mr_result_, __LINE__).ok()) return MR_CONCAT(mr_result_, __LINE__).status(); \
  declaration = std::move(MR_CONCAT(mr_result_, __LINE__)).value()
