#pragma once
// Cuts the queries of each segment into tiles and numbers them through all segments.

#include <stdint.h>

namespace millrace::engine::cuda {

struct QueryTile {
  int segment;         // -1: no tile of that number
  int first_query;     // row in q
  int num_queries;     // 1..kTile
  int first_position;  // of the first query in its context
  int kv_length;       // of the segment
};

// Tile number `tile`; one warp calls, all lanes get the answer.
template <int kTile>
__device__ __forceinline__ QueryTile FindQueryTile(const int32_t* q_begin, const int32_t* kv_lengths,
                                                   int num_segments, int tile, int lane) {
  QueryTile found = {-1, 0, 0, 0, 0};
  int base = 0;  // tiles of the segments before this round of 32
  for (int first = 0; first < num_segments; first += 32) {
    const int segment = first + lane;
    const int begin = segment < num_segments ? __ldg(q_begin + segment) : 0;
    const int queries = segment < num_segments ? __ldg(q_begin + segment + 1) - begin : 0;
    const int tiles = (queries + kTile - 1) / kTile;
    int sum = tiles;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int below = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += below;
    }
    const int mine = base + sum - tiles;  // number of this lane's first tile
    const unsigned owner = __ballot_sync(0xffffffffu, tile >= mine && tile < mine + tiles);
    if (owner != 0) {
      const int source = __ffs(owner) - 1;
      const int skipped = (tile - __shfl_sync(0xffffffffu, mine, source)) * kTile;
      const int all = __shfl_sync(0xffffffffu, queries, source);
      found.segment = first + source;
      found.first_query = __shfl_sync(0xffffffffu, begin, source) + skipped;
      found.num_queries = min(all - skipped, kTile);
      found.kv_length = __ldg(kv_lengths + found.segment);
      found.first_position = found.kv_length - all + skipped;
      return found;
    }
    base += __shfl_sync(0xffffffffu, sum, 31);
  }
  return found;
}

}  // namespace millrace::engine::cuda
