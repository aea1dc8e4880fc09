// Where everything lies in the one-pass vocabulary head: what a block owns, its shared memory, and which numbers a
// thread holds. A CPU compiles it too, so that it is tested where there is no GPU.
#pragma once

#include "../noise.h"

namespace fastlatent {

constexpr int kBlocks = 4;        // of a cluster: each owns a quarter of the width
constexpr int kRows = 64;         // M of wgmma, padded with rows of 0
constexpr int kOwnRows = kRows / kBlocks;  // rows whose softmax a block makes
constexpr int kNoiseTile = 128;   // ids of a tile of two-level sampling (noise.py)
constexpr int kThreads = 256;     // two warpgroups
constexpr int kPanel = 64;        // columns of a panel: 128 bytes, the widest swizzle
constexpr int kRowBytes = 2 * kPanel;
constexpr int kLanes = kThreads / kOwnRows;  // threads that share a row's softmax, neighbours in a warp
constexpr int kSharedLimit = 227 * 1024;     // of a block on sm_90

// Tensors of bfloat16 lie in shared memory as panels: a row of a panel is 128 bytes, and its 16-byte chunks change
// places with the row, as TMA's and wgmma's 128-byte swizzle have it. A panel begins at a multiple of 1024 bytes.
FASTLATENT_BOTH int swizzled(int row, int byte) { return row * kRowBytes + (byte ^ row % 8 * 16); }

// wgmma's descriptor of such a matrix, 128-byte swizzle, from the k of one product on. Where k runs along the rows
// (K-major) 1024 bytes are the step of 8 rows; where it runs across them (MN-major), of 8 k. Neither needs the other
// stride: a product is one panel wide.
FASTLATENT_BOTH uint64_t descriptor(uint32_t address) {
  return (uint64_t)((address & 0x3FFFF) >> 4) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

// What a thread's number i of wgmma's [64, N] sums is, 4 for each 8 columns; and, with 32-bit pairs of columns for
// i, its registers of an A [64, 16].
FASTLATENT_BOTH int sum_row(int thread, int i) { return thread % 128 / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
FASTLATENT_BOTH int sum_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }
FASTLATENT_BOTH int pair_row(int thread, int i) { return thread % 128 / 32 * 16 + thread % 32 / 4 + i % 2 * 8; }
FASTLATENT_BOTH int pair_column(int thread, int i) { return thread % 4 * 2 + i / 2 * 8; }

template <int kWidth_>
struct HeadTile {
  static constexpr int kWidth = kWidth_;
  // panels of a block, half of them for each warpgroup; past the width TMA fills in 0
  static constexpr int kPanels = (kWidth / kPanel + 2 * kBlocks - 1) / (2 * kBlocks) * 2;
  // ids of a tile: of the widest 32, for two stages of 64 ids could hold no tile that is still on its way
  static constexpr int kIds = kPanels > 6 ? 32 : 64;
  static constexpr int kParts = kNoiseTile / kIds;  // tiles of a noise tile
  static constexpr int kEach = kIds / kLanes;       // logits of a thread in a softmax
  static constexpr int kSums = kIds / 2;            // a thread's sums of one product with the hidden states

  static constexpr int kHiddenPanel = kRows * kRowBytes, kWeightPanel = kIds * kRowBytes;
  static constexpr int kStageBytes = kPanels * kWeightPanel, kHiddenBytes = kPanels * kHiddenPanel;
  static constexpr int kStages = (192 * 1024 - kHiddenBytes) / kStageBytes;
  static constexpr int kWeightAt = kHiddenBytes;
  static constexpr int kPartialAt = kWeightAt + kStages * kStageBytes;  // logits of the own rows from each block
  static constexpr int kProbAt = kPartialAt + kBlocks * kOwnRows * kIds * 4;  // two panels, in turns
  static constexpr int kScaleAt = kProbAt + 2 * kHiddenPanel;                 // two times a factor a row, in turns
  static constexpr int kBarrierAt = kScaleAt + 2 * kRows * 4;                 // one a stage, one for the hidden states
  static constexpr int kBytes = kBarrierAt + 8 * (kStages + 1);
  static_assert(kStages >= 3 && kBytes <= kSharedLimit && kWeightPanel % 1024 == 0, "one tile in use, one on its way");

  // Where in [kPartialAt, ...) the logit from block `source` is. Rows change places within 32 bytes, in which the
  // writers of a row are neighbours, so that 8 rows of a warp meet in no bank.
  FASTLATENT_BOTH static int partial(int source, int own_row, int column) {
    constexpr int kTurns = kIds / 8;  // pieces of 8 floats in a row
    return ((source * kOwnRows + own_row) * kIds + (column ^ own_row % kTurns * 8)) * 4;
  }
};

// The noise tiles of a cluster: [first_tile(c), first_tile(c + 1)).
FASTLATENT_BOTH int64_t noise_tiles(int64_t vocab) { return (vocab + kNoiseTile - 1) / kNoiseTile; }
FASTLATENT_BOTH int64_t first_tile(int64_t cluster, int64_t clusters, int64_t vocab) {
  return cluster * noise_tiles(vocab) / clusters;
}

constexpr int most(int a, int b) { return a > b ? a : b; }
constexpr int kMostShared = most(HeadTile<896>::kBytes, most(HeadTile<1536>::kBytes, HeadTile<2048>::kBytes));

}  // namespace fastlatent
