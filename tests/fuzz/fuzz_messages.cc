// Messages that are parsed whole: descriptors handed to Open, frame headers.
#include <fuzzer/FuzzedDataProvider.h>

#include <cstring>

#include "base/log.h"
#include "proto/transfer.pb.h"
#include "transfer/transfer.h"
#include "transfer/wire.h"

using namespace millrace;
using namespace millrace::transfer;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  static const bool quiet = ConfigureLog({.level = "off", .format = "text"}).ok();
  (void)quiet;
  if (size >= kHeaderBytes) {
    HeaderBytes header;
    std::memcpy(header.data(), bytes, kHeaderBytes);
    const auto frame = DecodeFrame(header);
    if (frame.ok() && EncodeFrame(*frame) != header)
      __builtin_trap();  // what is accepted reads back the same
  }
  // An engine for many descriptors: peers that cannot be reached are given up by themselves.
  static std::unique_ptr<Transfer> engine;
  static int opened = 0;
  if (engine == nullptr || opened > 200) {
    Options options;
    options.listen = {"127.0.0.1:0"};
    engine = *Transfer::Create(options);
    opened = 0;
  }
  FuzzedDataProvider data(bytes, size);
  if (data.ConsumeBool()) {
    opened += engine->Open(data.ConsumeRemainingBytesAsString()).ok();
    return 0;
  }
  v1::PeerDescriptor descriptor;
  descriptor.set_protocol_version(kProtocolVersion);
  descriptor.set_epoch(data.ConsumeIntegral<uint64_t>());
  descriptor.set_name(data.ConsumeRandomLengthString(40));
  while (data.remaining_bytes() > 0 && descriptor.rails_size() < 80) {
    v1::Rail& rail = *descriptor.add_rails();
    static const char* const kKinds[] = {"tcp", "shm", "rdma", "local"};
    rail.set_kind(data.ConsumeBool() ? data.PickValueInArray(kKinds) : data.ConsumeRandomLengthString(8));
    // Port 1 of this host: refuses at once.
    rail.set_address(data.ConsumeBool() ? "127.0.0.1:1" : data.ConsumeRandomLengthString(60));
    if (rail.address().find_first_of("0123456789") != std::string::npos && rail.address() != "127.0.0.1:1")
      rail.set_address("x" + rail.address());  // no strange hosts are called
  }
  opened += engine->Open(descriptor.SerializeAsString()).ok();
  return 0;
}
