// The softmax of a row in the one-pass vocabulary head, and its race between tiles: step (2) of vocab_head.cu.
#pragma once

#include <cuda_bf16.h>

#include "head_block.h"
#include "head_sums.h"
#include "vocab_head.h"

namespace fastlatent {

__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  return x;
}

__device__ __forceinline__ float most_of_lanes(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, step));
  return x;
}

// (2) of one row, which kLanes threads share: all keep the same sums, each its own few logits of the noise tile.
template <class Tile>
struct Owner {
  int row, lane;
  bool greedy;
  RowNoise noise;
  RowPart part;
  TileSums tile_sums;
  ExpSums sums;  // of this thread's logits of the last tile, which `settle` adds
  float most, factor;
  float kept[Tile::kParts * Tile::kEach];

  __device__ Owner(const OnePassHead& args, int rank)
      : row(rank * kOwnRows + threadIdx.x / kLanes), lane(threadIdx.x % kLanes), greedy(args.greedy) {
    if (row < args.rows) noise = RowNoise(*args.seed, args.counter + 3 * row, kStreamTile);
  }

  // What the blocks wait for.
  __device__ void weigh(const Block<Tile>& block, const OnePassHead& args, int tile) {
    float logit[Tile::kEach] = {}, p[Tile::kEach];
    const int own_row = row % kOwnRows, column = lane * Tile::kEach, place = tile % Tile::kParts;
#pragma unroll
    for (int from = 0; from < kBlocks; from++) {
      const int at = Tile::kPartialAt + Tile::partial(from, own_row, column);
      const float* sent = reinterpret_cast<const float*>(block.shared + at);
#pragma unroll
      for (int i = 0; i < Tile::kEach; i++) logit[i] += sent[i];
    }
    most = -kInfinity;
#pragma unroll
    for (int i = 0; i < Tile::kEach; i++) {
      logit[i] = block.first_id(tile) + column + i < args.vocab ? logit[i] * args.inv_temperature : -kInfinity;
      most = fmaxf(most, logit[i]);
#pragma unroll
      for (int at = 0; at < Tile::kParts; at++)  // the index must be known when compiled, to stay in registers
        if (at == place) kept[at * Tile::kEach + i] = logit[i];
    }
    most = most_of_lanes(most);
    factor = part.raise(most);
    sums = ExpSums();
#pragma unroll
    for (int i = 0; i < Tile::kEach; i++) p[i] = sums.add(logit[i], part.largest);
    send(block, tile, p);
  }

  // What nobody waits for.
  __device__ void settle(const Block<Tile>& block, const OnePassHead& args, int tile) {
    const int place = tile % Tile::kParts;
    sums.mass = sum_of_lanes(sums.mass);
    sums.squares = sum_of_lanes(sums.squares);
    sums.slope = sum_of_lanes(sums.slope);
    part.add(sums);

    if (place == 0) tile_sums = TileSums();
    tile_sums.add(factor, most, sums.mass);
    if (place < Tile::kParts - 1) return;
    const int64_t noise_tile = block.first + tile / Tile::kParts;
    if (part.leads((int32_t)noise_tile, tile_sums.score(part.largest, greedy, noise, noise_tile)) && row < args.rows) {
      float* to = args.logits + (blockIdx.x / kBlocks * args.rows + row) * kNoiseTile + lane * Tile::kEach;
#pragma unroll
      for (int i = 0; i < Tile::kParts * Tile::kEach; i++) to[i / Tile::kEach * Tile::kIds + i % Tile::kEach] = kept[i];
    }
  }

  __device__ void send(const Block<Tile>& block, int tile, const float (&p)[Tile::kEach]) const {
    uint32_t pair[Tile::kEach / 2];
#pragma unroll
    for (int i = 0; i < Tile::kEach; i += 2) {
      const __nv_bfloat162 both = __floats2bfloat162_rn(p[i], p[i + 1]);
      pair[i / 2] = *reinterpret_cast<const uint32_t*>(&both);
    }
    const int at = tile % 2 * Tile::kHiddenPanel + swizzled(row, lane * Tile::kEach * 2);
#pragma unroll
    for (int to = 0; to < kBlocks; to++) {
      const uint32_t there = address_in(to, block.base);
#pragma unroll
      for (int i = 0; i < Tile::kEach / 2; i++) store_there(there + Tile::kProbAt + at + 4 * i, pair[i]);
      if (lane == 0) store_there(there + Tile::kScaleAt + (tile % 2 * kRows + row) * 4, factor);
    }
  }
};

}  // namespace fastlatent
