#pragma once
// One worker over a fake engine and a fake transfer engine.

#include <memory>
#include <string>

#include "base/metrics.h"
#include "server/worker/worker.h"
#include "tests/server/fake_engine.h"
#include "tests/server/fake_transfer.h"

namespace millrace::server {

inline constexpr int32_t kPages = 64;

struct Node {
  explicit Node(WorkerRole role, int32_t head_dim = 4) : engine(kPages, head_dim) {
    options.role = role;
    options.model_name = "fake";
    options.model_digest = "digest";
    options.grant_pages = 2;
    options.metrics = &metrics;
    worker = *Worker::Start(options, &engine, &transfer);
  }
  std::string address() const { return worker->address(); }
  bool AllFree() {
    const engine::EngineStats stats = engine.Stats();
    return stats.pages_free == kPages && stats.tickets == 0 && transfer.TakeSnapshot().open_tickets == 0;
  }

  Metrics metrics;
  WorkerOptions options;
  FakeEngine engine;
  FakeTransfer transfer;
  std::unique_ptr<Worker> worker;
};

}  // namespace millrace::server
