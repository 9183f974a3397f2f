#pragma once
// Metrics once more under the names that vLLM (and, for what it has not, SGLang) gives to the same things,
// for dashboards, autoscalers and routers that know those.

#include <prometheus/collectable.h>

#include <memory>
#include <string>
#include <vector>

namespace millrace::server {

// Thread-safe. Families are copied when they are collected: updates cost nothing.
class VllmNames final : public prometheus::Collectable {
 public:
  // `source` is shared because an exposer may collect from this after its owner has gone.
  VllmNames(std::shared_ptr<prometheus::Collectable> source, std::string model_name)
      : source_(std::move(source)), model_name_(std::move(model_name)) {}
  // The renamed families only.
  std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  const std::shared_ptr<prometheus::Collectable> source_;
  const std::string model_name_;
};

}  // namespace millrace::server
