// A block's products in the one-pass vocabulary head, and how its share of the weights comes into its shared memory: the
// steps (1) and (3) of vocab_head.cu.
#pragma once

#include "head_tile.h"
#include "hopper.h"

namespace fastlatent {

// A block of a cluster; its shared memory is laid out as HeadTile says.
template <class Tile>
struct Block {
  unsigned char* shared;
  uint32_t base;
  int rank, tiles;
  int64_t first;  // noise tile

  __device__ uint32_t barrier(int stage) const { return base + Tile::kBarrierAt + 8 * stage; }
  __device__ uint32_t stage(int tile) const { return base + Tile::kWeightAt + tile % Tile::kStages * Tile::kStageBytes; }
  __device__ int64_t first_id(int tile) const { return first * kNoiseTile + (int64_t)tile * Tile::kIds; }

  __device__ void load_hidden(const CUtensorMap& hidden) const {
    announce(barrier(Tile::kStages), Tile::kHiddenBytes);
    for (int panel = 0; panel < Tile::kPanels; panel++)
      load_box(base + panel * Tile::kHiddenPanel, hidden, (rank * Tile::kPanels + panel) * kPanel, 0, barrier(Tile::kStages));
  }
  __device__ void load_weight(const CUtensorMap& weight, int tile) const {
    announce(barrier(tile % Tile::kStages), Tile::kStageBytes);
    for (int panel = 0; panel < Tile::kPanels; panel++)
      load_box(stage(tile) + panel * Tile::kWeightPanel, weight, (rank * Tile::kPanels + panel) * kPanel,
               (int)first_id(tile), barrier(tile % Tile::kStages));
  }
  __device__ void wait_for_weight(int tile) const { wait_for(barrier(tile % Tile::kStages), tile / Tile::kStages % 2); }

  // (1) of the first warpgroup, which alone keeps the tensor cores busy
  __device__ void start_logits(int tile, float (&logit)[Tile::kSums]) const {
    wait_for_weight(tile);
    hold(logit);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Tile::kPanels * 4; step++) {
      const int panel = step / 4, at = step % 4 * 32;
      multiply(logit, descriptor(base + panel * Tile::kHiddenPanel + at),
               descriptor(stage(tile) + panel * Tile::kWeightPanel + at), step > 0);
    }
    wgmma_commit();
  }
  __device__ void finish_logits(float (&logit)[Tile::kSums]) const {
    wgmma_finish();
    hold(logit);
  }
  // a warp's 16 rows are those of one owner
  __device__ void send_logits(const float (&logit)[Tile::kSums]) const {
    const uint32_t to = address_in(sum_row(threadIdx.x, 0) / kOwnRows, base + Tile::kPartialAt);
#pragma unroll
    for (int i = 0; i < Tile::kSums; i += 2)
      store_there(to + Tile::partial(rank, sum_row(threadIdx.x, i) % kOwnRows, sum_column(threadIdx.x, i)), logit[i],
                  logit[i + 1]);
  }

  // (3): the second half of the panels is the second warpgroup's
  __device__ void add_mixture(int tile, float (&mixture)[Tile::kPanels / 2][32]) const {
    const float* scale = reinterpret_cast<const float*>(shared + Tile::kScaleAt) + tile % 2 * kRows;
    const float low = scale[sum_row(threadIdx.x, 0)], high = scale[sum_row(threadIdx.x, 2)];
    if (__any_sync(0xFFFFFFFFu, low != 1.0f || high != 1.0f)) {
#pragma unroll
      for (int j = 0; j < Tile::kPanels / 2; j++)
#pragma unroll
        for (int i = 0; i < 32; i++) mixture[j][i] *= i / 2 % 2 ? high : low;
    }
    const unsigned char* prob = shared + Tile::kProbAt + tile % 2 * Tile::kHiddenPanel;
    uint32_t p[Tile::kIds / 16][4];
#pragma unroll
    for (int step = 0; step < Tile::kIds / 16; step++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        p[step][i] = *reinterpret_cast<const uint32_t*>(
            prob + swizzled(pair_row(threadIdx.x, i), 2 * (step * 16 + pair_column(threadIdx.x, i))));
    wait_for_weight(tile);
    const uint32_t weight = stage(tile) + threadIdx.x / 128 * (Tile::kPanels / 2) * Tile::kWeightPanel;
#pragma unroll
    for (int j = 0; j < Tile::kPanels / 2; j++) hold(mixture[j]);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Tile::kIds / 16; step++)
#pragma unroll
      for (int j = 0; j < Tile::kPanels / 2; j++)
        multiply_transposed(mixture[j], p[step], descriptor(weight + j * Tile::kWeightPanel + step * 16 * kRowBytes));
    wgmma_commit();
    wgmma_finish();
#pragma unroll
    for (int j = 0; j < Tile::kPanels / 2; j++) hold(mixture[j]);
  }
};

}  // namespace fastlatent
