#include "base/metrics.h"

#include <prometheus/text_serializer.h>

#include <utility>

namespace millrace {

Metrics::Metrics()
    : registry_(std::make_shared<prometheus::Registry>(prometheus::Registry::InsertBehavior::Merge)) {}

Metrics Metrics::With(MetricLabels labels) const {
  Metrics with = *this;
  with.labels_ = std::move(labels);
  return with;
}

MetricLabels Metrics::Labels(const MetricLabels& own) const {
  MetricLabels all = own;
  all.insert(labels_.begin(), labels_.end());
  return all;
}

prometheus::Counter& Metrics::Counter(const std::string& name, const std::string& help,
                                      const MetricLabels& labels) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(*registry_).Add(Labels(labels));
}

prometheus::Gauge& Metrics::Gauge(const std::string& name, const std::string& help,
                                  const MetricLabels& labels) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(*registry_).Add(Labels(labels));
}

void Metrics::RemoveGauge(const std::string& name, const MetricLabels& labels) {
  auto& family = prometheus::BuildGauge().Name(name).Register(*registry_);
  family.Remove(&family.Add(Labels(labels)));
}

// Add forwards what it is given to the histogram, which keeps it; clang-tidy sees no move in that.
// NOLINTBEGIN(performance-unnecessary-value-param)
prometheus::Histogram& Metrics::Histogram(const std::string& name, const std::string& help,
                                          std::vector<double> buckets, const MetricLabels& labels) {
  // NOLINTEND(performance-unnecessary-value-param)
  return prometheus::BuildHistogram()
      .Name(name)
      .Help(help)
      .Register(*registry_)
      .Add(Labels(labels), std::move(buckets));
}

std::string Metrics::Text() const { return prometheus::TextSerializer().Serialize(registry_->Collect()); }

}  // namespace millrace
