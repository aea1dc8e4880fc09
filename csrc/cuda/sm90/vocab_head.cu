// vocab_head in one pass over the weights, which are the input embedding too: each tile of them is read once, and used
// twice while it lies in shared memory.
//
// A cluster of 4 blocks takes a piece of the vocabulary, tile by tile; each block owns a quarter of the width. Of a tile
// (1) each block multiplies its quarter of the hidden states, and sends the partial logits to the blocks that own the
// rows; (2) these add them up, raise the rows' running sums, and send exp(logit - largest), in bfloat16, and the factor
// that all before must be multiplied with, to all blocks; (3) each block rescales its quarter of the mixture, which stays
// in registers, and adds the tile's. The product (1) of the next tile runs while (2) travels, and (3) while (1) does.
// A second kernel puts the clusters' sums, races and mixtures together.
// Compiled, never run: there was no GPU when it was written.
#include "vocab_head.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "../device.h"
#include "head_block.h"
#include "head_owner.h"
#include "tensor_map.h"

namespace fastlatent {
namespace {

template <int kWidth>
__global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads, 1)
    one_pass(const __grid_constant__ CUtensorMap hidden, const __grid_constant__ CUtensorMap weight, const OnePassHead args) {
  using Tile = HeadTile<kWidth>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int64_t cluster = blockIdx.x / kBlocks;
  Block<Tile> block{shared, shared_address(shared), cluster_rank(), 0, first_tile(cluster, args.clusters, args.vocab)};
  block.tiles = (int)(first_tile(cluster + 1, args.clusters, args.vocab) - block.first) * Tile::kParts;
  if (block.base % 1024) __trap();  // the swizzle counts on it
  Owner<Tile> owner(args, block.rank);
  const bool multiplies = threadIdx.x < 128;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage <= Tile::kStages; stage++) barrier_init(block.barrier(stage));
    barrier_init_done();
    block.load_hidden(hidden);
    for (int tile = 0; tile < Tile::kStages && tile < block.tiles; tile++) block.load_weight(weight, tile);
  }
  __syncthreads();
  cluster_arrive();
  cluster_wait();  // all blocks have begun: their shared memory is there

  float logit[Tile::kSums] = {}, mixture[Tile::kPanels / 2][32] = {};
  if (multiplies) {
    wait_for(block.barrier(Tile::kStages), 0);
    block.start_logits(0, logit);
    block.finish_logits(logit);
    block.send_logits(logit);
  }
  cluster_arrive();
  for (int tile = 0; tile < block.tiles; tile++) {
    const bool has_next = tile + 1 < block.tiles;
    cluster_wait();  // the tile's partial logits have come
    owner.weigh(block, args, tile);
    __syncwarp();
    cluster_arrive();
    if (multiplies && has_next) {
      block.start_logits(tile + 1, logit);
      owner.settle(block, args, tile);
      block.finish_logits(logit);
    } else {
      owner.settle(block, args, tile);
    }
    __syncwarp();
    cluster_wait();  // the tile's p has come; every owner has read its logits, and this block is done with the tile before
    const int next = tile - 1 + Tile::kStages;
    if (threadIdx.x == 0 && tile > 0 && next < block.tiles) block.load_weight(weight, next);
    __syncwarp();
    if (has_next) {
      if (multiplies) block.send_logits(logit);
      cluster_arrive();
    }
    block.add_mixture(tile, mixture);
  }

  if (owner.row < args.rows && owner.lane == 0)
    static_cast<RowPart*>(args.parts)[cluster * args.rows + owner.row] = owner.part;
  const int first_panel = block.rank * Tile::kPanels + threadIdx.x / 128 * (Tile::kPanels / 2);
#pragma unroll
  for (int j = 0; j < Tile::kPanels / 2; j++)
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      const int row = sum_row(threadIdx.x, i), column = (first_panel + j) * kPanel + sum_column(threadIdx.x, i);
      if (row < args.rows && column < kWidth)
        *reinterpret_cast<float2*>(args.mixtures + (cluster * args.rows + row) * kWidth + column) =
            make_float2(mixture[j][i], mixture[j][i + 1]);
    }
}

// A block takes kNoiseTile columns of a row; the first of a row draws, too.
__global__ void __launch_bounds__(kNoiseTile) finish(OnePassHead args) {
  const int64_t row = blockIdx.y, column = (int64_t)blockIdx.x * kNoiseTile + threadIdx.x;
  const RowPart* parts = static_cast<const RowPart*>(args.parts) + row;
  const Row whole(parts, args.clusters, args.rows);
  float mixture = 0;
  for (int64_t c = 0; c < args.clusters; c++)
    mixture += whole.weight(parts[c * args.rows]) * args.mixtures[(c * args.rows + row) * args.width + column];
  static_cast<__nv_bfloat16*>(args.mixture)[row * args.width + column] = __float2bfloat16_rn(mixture);
  if (blockIdx.x > 0 || threadIdx.x >= 32) return;

  const float* logits = args.logits + (whole.leader * args.rows + row) * kNoiseTile;
  const int64_t first_id = (int64_t)parts[whole.leader * args.rows].tile * kNoiseTile;
  const RowNoise noise(*args.seed, args.counter + 3 * row, kStreamId);
  PlaceRace race;
  for (int at = threadIdx.x; at < kNoiseTile && first_id + at < args.vocab; at += 32)
    race.run(at, logits[at], first_id + at, args.greedy, noise);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const float score = __shfl_xor_sync(0xFFFFFFFFu, race.score, step);
    race.challenge(score, __shfl_xor_sync(0xFFFFFFFFu, race.place, step));
  }
  if (threadIdx.x > 0) return;
  args.token[row] = first_id + race.place;
  args.logprob[row] = whole.logprob(logits[race.place]);
  args.entropy[row] = whole.entropy();
}

struct Launch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};

  Launch(int64_t clusters, int bytes, void* stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {kBlocks, 1, 1};
    config.gridDim = dim3((unsigned)(clusters * kBlocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = bytes;
    config.stream = (cudaStream_t)stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
};

template <int kWidth>
cudaError_t allow_shared() {
  return cudaFuncSetAttribute(one_pass<kWidth>, cudaFuncAttributeMaxDynamicSharedMemorySize, HeadTile<kWidth>::kBytes);
}

template <int kWidth>
const char* start(const OnePassHead& args, void* stream) {
  using Tile = HeadTile<kWidth>;
  CUtensorMap hidden, weight;
  if (const char* wrong = describe(args.hidden, args.rows, kWidth, kRows, &hidden)) return wrong;
  if (const char* wrong = describe(args.weight, args.vocab, kWidth, Tile::kIds, &weight)) return wrong;
  if (const cudaError_t error = allow_shared<kWidth>()) return cudaGetErrorString(error);
  Launch launch(args.clusters, Tile::kBytes, stream);
  if (const cudaError_t error = cudaLaunchKernelEx(&launch.config, one_pass<kWidth>, hidden, weight, args))
    return cudaGetErrorString(error);
  finish<<<dim3(kWidth / kNoiseTile, (unsigned)args.rows), kNoiseTile, 0, (cudaStream_t)stream>>>(args);
  const cudaError_t error = cudaGetLastError();
  return error ? cudaGetErrorString(error) : nullptr;
}

template <int kWidth>
const char* count(int64_t* clusters) {
  if (const cudaError_t error = allow_shared<kWidth>()) return cudaGetErrorString(error);
  int at_once = 0;
  Launch launch(1, HeadTile<kWidth>::kBytes, nullptr);
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&at_once, one_pass<kWidth>, &launch.config);
  *clusters = at_once;
  return error ? cudaGetErrorString(error) : nullptr;
}

constexpr const char* kWidths = "width: expected 896, 1536 or 2048";

}  // namespace

const char* one_pass_head(const OnePassHead& args, void* stream, int device) {
  if (args.rows < 1 || args.rows > kRows) return "rows: expected 1 to 64";
  if (args.vocab < 1 || args.vocab > 1 << 18) return "vocab: expected 1 to 262144";
  if (args.clusters < 1 || args.clusters > noise_tiles(args.vocab)) return "clusters: expected 1 to one a tile of 128 ids";
  if (reinterpret_cast<uintptr_t>(args.hidden) % 16 || reinterpret_cast<uintptr_t>(args.weight) % 16)
    return "hidden, weight: expected addresses that are multiples of 16";
  const OnDevice on_device(device);
  if (const cudaError_t error = on_device.error()) return cudaGetErrorString(error);
  switch (args.width) {
    case 896: return start<896>(args, stream);
    case 1536: return start<1536>(args, stream);
    case 2048: return start<2048>(args, stream);
  }
  return kWidths;
}

const char* one_pass_clusters(int64_t width, int device, int64_t* clusters) {
  const OnDevice on_device(device);
  if (const cudaError_t error = on_device.error()) return cudaGetErrorString(error);
  switch (width) {
    case 896: return count<896>(clusters);
    case 1536: return count<1536>(clusters);
    case 2048: return count<2048>(clusters);
  }
  return kWidths;
}

}  // namespace fastlatent
