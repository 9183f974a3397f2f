#pragma once
// Turns a fuzzer's bytes into what a hostile peer might send: as they are, or as frames whose checksums are
// right, so that what comes behind the checks is reached.

#include <fuzzer/FuzzedDataProvider.h>

#include <string>

#include "base/digest.h"
#include "proto/transfer.pb.h"
#include "transfer/wire.h"

namespace millrace::transfer {

inline std::string HelloOf(uint64_t epoch, uint64_t expected, v1::Hello::Purpose purpose) {
  v1::Hello hello;
  hello.set_protocol_version(kProtocolVersion);
  hello.set_epoch(epoch);
  hello.set_expected_epoch(expected);
  hello.set_purpose(purpose);
  return WithLength(hello.SerializeAsString());
}

inline std::string FramesOf(FuzzedDataProvider& data) {
  std::string out;
  while (data.remaining_bytes() > 0 && out.size() < 60'000) {
    if (data.ConsumeIntegralInRange(0, 15) == 0) {
      out += data.ConsumeRandomLengthString(100);
      continue;
    }
    Frame frame;
    frame.kind = static_cast<FrameKind>(data.ConsumeIntegralInRange<int>(0, 8));
    frame.code = static_cast<SliceCode>(data.ConsumeIntegralInRange<int>(0, 4));
    // Small numbers meet what exists; large ones are for the arithmetic.
    const auto number = [&]() -> uint64_t {
      return data.ConsumeBool() ? data.ConsumeIntegralInRange<uint64_t>(0, 5)
                                : data.ConsumeIntegral<uint64_t>();
    };
    frame.slice = number();
    frame.ticket = number();
    frame.region = static_cast<uint32_t>(number());
    frame.offset = number();
    frame.attempt = static_cast<uint32_t>(number());
    frame.retired_below = number();
    const std::string payload = data.ConsumeRandomLengthString(300);
    frame.length =
        data.ConsumeBool() ? static_cast<uint32_t>(payload.size()) : static_cast<uint32_t>(number());
    frame.payload_crc = Crc32c(AsBytes(payload));
    const HeaderBytes header = EncodeFrame(frame);
    out.append(reinterpret_cast<const char*>(header.data()), header.size());
    out += payload;
  }
  return out;
}

}  // namespace millrace::transfer
