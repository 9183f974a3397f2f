#pragma once
// Where the pieces of a sequence lie on both sides. Pure functions over two layouts that differ only in page
// count.

#include <cstdint>
#include <span>
#include <vector>

#include "engine/kv/layout.h"
#include "transfer/transfer.h"

namespace millrace::server {

// What a writer may touch who was granted `pages`: all layers' pieces of each, neighbours joined.
std::vector<transfer::Range> GrantRanges(const engine::KvLayout& layout, transfer::RegionId region,
                                         std::span<const engine::PageId> pages);

// One layer of a run of pages: source[i] here goes to destination[i] there. Runs that are contiguous on both
// sides become one intent. The spans have equal length, at least 1.
std::vector<transfer::Intent> LayerIntents(const engine::KvLayout& source_layout,
                                           transfer::RegionId source_region,
                                           std::span<const engine::PageId> source,
                                           const engine::KvLayout& destination_layout,
                                           uint32_t destination_region,
                                           std::span<const engine::PageId> destination, int32_t layer);

// Sum of PieceDigest over one layer of `pages`, which are the pages first_page... of a sequence of
// `num_pages` pages.
uint64_t LayerDigest(const engine::KvLayout& layout, std::span<const std::byte> memory,
                     std::span<const engine::PageId> pages, int32_t layer, int32_t first_page,
                     int32_t num_pages);

// The same over all layers of the pages of a sequence from first_page on: what a seal states.
uint64_t SequenceDigest(const engine::KvLayout& layout, std::span<const std::byte> memory,
                        std::span<const engine::PageId> pages, int32_t first_page);

}  // namespace millrace::server
