#include "server/worker/pieces.h"

#include "base/check.h"

namespace millrace::server {

std::vector<transfer::Range> GrantRanges(const engine::KvLayout& layout, transfer::RegionId region,
                                         std::span<const engine::PageId> pages) {
  std::vector<transfer::Range> ranges;
  for (int32_t layer = 0; layer < layout.num_layers; ++layer) {
    for (size_t i = 0; i < pages.size(); ++i) {
      if (i > 0 && pages[i] == pages[i - 1] + 1) {
        ranges.back().bytes += layout.piece_bytes();
      } else {
        ranges.push_back({region, layout.piece_offset(layer, pages[i]), layout.piece_bytes()});
      }
    }
  }
  return ranges;
}

std::vector<transfer::Intent> LayerIntents(const engine::KvLayout& source_layout,
                                           transfer::RegionId source_region,
                                           std::span<const engine::PageId> source,
                                           const engine::KvLayout& destination_layout,
                                           uint32_t destination_region,
                                           std::span<const engine::PageId> destination, int32_t layer) {
  MR_CHECK(!source.empty() && source.size() == destination.size());
  const size_t piece_bytes = source_layout.piece_bytes();
  std::vector<transfer::Intent> intents;
  for (size_t i = 0; i < source.size(); ++i) {
    if (i > 0 && source[i] == source[i - 1] + 1 && destination[i] == destination[i - 1] + 1) {
      intents.back().local.bytes += piece_bytes;
      continue;
    }
    transfer::Intent intent;
    intent.local = {source_region, source_layout.piece_offset(layer, source[i]), piece_bytes};
    intent.remote_region = destination_region;
    intent.remote_offset = destination_layout.piece_offset(layer, destination[i]);
    intents.push_back(intent);
  }
  return intents;
}

uint64_t LayerDigest(const engine::KvLayout& layout, std::span<const std::byte> memory,
                     std::span<const engine::PageId> pages, int32_t layer, int32_t first_page,
                     int32_t num_pages) {
  uint64_t sum = 0;
  for (size_t i = 0; i < pages.size(); ++i) {
    const uint64_t piece = static_cast<uint64_t>(layer) * static_cast<uint64_t>(num_pages) +
                           static_cast<uint64_t>(first_page) + i;
    sum += transfer::PieceDigest(memory.subspan(layout.piece_offset(layer, pages[i]), layout.piece_bytes()),
                                 piece);
  }
  return sum;
}

uint64_t SequenceDigest(const engine::KvLayout& layout, std::span<const std::byte> memory,
                        std::span<const engine::PageId> pages, int32_t first_page) {
  const int32_t num_pages = first_page + static_cast<int32_t>(pages.size());
  uint64_t sum = 0;
  for (int32_t layer = 0; layer < layout.num_layers; ++layer) {
    sum += LayerDigest(layout, memory, pages, layer, first_page, num_pages);
  }
  return sum;
}

}  // namespace millrace::server
