#pragma once
// Prometheus metrics of one process. Families are made once and kept by their owner; updates are lock-free.

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace millrace {

using MetricLabels = std::map<std::string, std::string>;

// Thread-safe. References returned live as long as the registry, or until the gauge is removed. Asking again
// for the same name and labels gives the same metric.
class Metrics {
 public:
  Metrics();
  // The same registry, with `labels` added to every metric that is made through the one returned and does not
  // have a label of that name: for several of a kind in one process.
  Metrics With(MetricLabels labels) const;
  prometheus::Counter& Counter(const std::string& name, const std::string& help,
                               const MetricLabels& labels = {});
  prometheus::Gauge& Gauge(const std::string& name, const std::string& help, const MetricLabels& labels = {});
  // Of something that is no more: nobody may hold a reference to it. Harmless when there is none.
  void RemoveGauge(const std::string& name, const MetricLabels& labels);
  prometheus::Histogram& Histogram(const std::string& name, const std::string& help,
                                   std::vector<double> buckets, const MetricLabels& labels = {});
  std::string Text() const;  // the exposition format
  // For an exposer that serves these metrics by itself; shared, because it may outlive this object.
  std::shared_ptr<prometheus::Collectable> collectable() const { return registry_; }

 private:
  MetricLabels Labels(const MetricLabels& own) const;

  std::shared_ptr<prometheus::Registry> registry_;
  MetricLabels labels_;
};

}  // namespace millrace
