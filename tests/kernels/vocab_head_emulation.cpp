// The one-pass vocabulary head (csrc/cuda/sm90/vocab_head.cu) on a CPU: its layout (head_tile.h) and arithmetic
// (head_sums.h), phase by phase, around a TMA and a wgmma written from the PTX ISA's tables and canonical layouts.
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cuda/sm90/head_sums.h"

using namespace fastlatent;

namespace {

constexpr uint32_t kBase = 1024;  // where shared memory begins: a swizzle is of addresses

float from_bf16(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

uint16_t to_bf16(float x) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return x == x ? (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) : 0x7FFF;
}

struct Memory {
  std::vector<unsigned char> bytes;
  explicit Memory(int size) : bytes(size, 0xFF) {}  // NaN

  template <class T>
  T get(uint32_t address) const {
    T value;
    if (address < kBase || address + sizeof(T) > kBase + bytes.size()) abort();
    memcpy(&value, &bytes[address - kBase], sizeof(T));
    return value;
  }
  template <class T>
  void put(uint32_t address, T value) {
    if (address < kBase || address + sizeof(T) > kBase + bytes.size()) abort();
    memcpy(&bytes[address - kBase], &value, sizeof(T));
  }
};

uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// A box of 64 columns, rows of 128 bytes; 0 outside the matrix.
void load_box(Memory& memory, uint32_t to, const uint16_t* matrix, int64_t rows, int64_t width, int64_t column, int64_t row,
              int box_rows) {
  if (to % 1024) abort();
  for (int r = 0; r < box_rows; r++)
    for (int c = 0; c < 64; c++)
      memory.put(swizzle_128(to + r * 128 + c * 2),
                 row + r < rows && column + c < width ? matrix[(row + r) * width + column + c] : (uint16_t)0);
}

// Element of the operand a descriptor stands for; `mn` is its row (of A) or column (of B).
float element(const Memory& memory, uint64_t descriptor, bool is_mn_major, int mn, int k) {
  if (descriptor >> 62 != 1) abort();  // 128-byte swizzle
  const uint32_t start = (uint32_t)(descriptor & 0x3FFF) << 4, stride = (uint32_t)(descriptor >> 32 & 0x3FFF) << 4;
  if (is_mn_major && mn >= 64) abort();  // would need the leading stride
  const uint32_t at = is_mn_major ? mn * 2 + k / 8 * stride + k % 8 * 128 : mn / 8 * stride + mn % 8 * 128 + k * 2;
  return from_bf16(memory.get<uint16_t>(swizzle_128(start + at)));
}

template <int N>
using Sums = std::vector<std::array<float, N / 2>>;  // of the 128 threads of a warpgroup

// sums (+)= A B for A [64][16] and B [16][N]
template <int N>
void multiply(Sums<N>& sums, const float (&a)[64][16], const float (&b)[16][N], bool adds) {
  static float product[64][N];
  memset(product, 0, sizeof product);
  for (int row = 0; row < 64; row++)
    for (int k = 0; k < 16; k++)
      for (int column = 0; column < N; column++) product[row][column] += a[row][k] * b[k][column];
  for (int thread = 0; thread < 128; thread++)
    for (int i = 0; i < N / 2; i++) {
      const int row = (thread >> 5) * 16 + (thread % 32 >> 2) + ((i & 2) ? 8 : 0);
      const int column = (i >> 2) * 8 + (thread & 3) * 2 + (i & 1);
      sums[thread][i] = (adds ? sums[thread][i] : 0.0f) + product[row][column];
    }
}

template <int N>
void read_b(const Memory& memory, uint64_t descriptor, bool is_mn_major, float (&b)[16][N]) {
  for (int k = 0; k < 16; k++)
    for (int n = 0; n < N; n++) b[k][n] = element(memory, descriptor, is_mn_major, n, k);
}

template <class F>
float over_lanes(const float (&values)[kLanes], int lane, F combine) {  // as __shfl_xor_sync does it
  float now[kLanes], next[kLanes];
  memcpy(now, values, sizeof now);
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < kLanes; i++) next[i] = combine(now[i], now[i ^ step]);
    memcpy(now, next, sizeof now);
  }
  return now[lane];
}

struct Problem {
  const uint16_t *hidden, *weight;
  int64_t rows, vocab;
  float inv_temperature;
  int64_t seed;
  const int64_t* counter;
  bool greedy;
  int64_t clusters;
  std::vector<RowPart> parts;
  std::vector<float> logits, mixtures;
};

template <class Tile>
struct Cluster {
  Problem& problem;
  int64_t cluster, first;
  int tiles;
  std::vector<Memory> memory;
  std::vector<std::vector<Sums<64>>> mixture;  // by block and panel, then thread
  RowPart part[kRows];
  TileSums tile_sums[kRows];
  float kept[kRows][kNoiseTile];

  Cluster(Problem& problem, int64_t cluster)
      : problem(problem), cluster(cluster), first(first_tile(cluster, problem.clusters, problem.vocab)),
        tiles((int)(first_tile(cluster + 1, problem.clusters, problem.vocab) - first) * Tile::kParts),
        memory(kBlocks, Memory(Tile::kBytes)),
        mixture(kBlocks, std::vector<Sums<64>>(Tile::kPanels, Sums<64>(128))) {}

  int64_t first_id(int tile) const { return first * kNoiseTile + (int64_t)tile * Tile::kIds; }
  uint32_t stage(int tile) const { return kBase + Tile::kWeightAt + tile % Tile::kStages * Tile::kStageBytes; }

  void load(int block, int tile) {
    for (int panel = 0; panel < Tile::kPanels; panel++)
      load_box(memory[block], stage(tile) + panel * Tile::kWeightPanel, problem.weight, problem.vocab, Tile::kWidth,
               (block * Tile::kPanels + panel) * kPanel, first_id(tile), Tile::kIds);
  }

  void send_logits(int block, int tile) {
    Sums<Tile::kIds> sums(128);
    static float a[64][16], b[16][Tile::kIds];
    for (int step = 0; step < Tile::kPanels * 4; step++) {
      const uint64_t hidden = descriptor(kBase + step / 4 * Tile::kHiddenPanel + step % 4 * 32);
      for (int row = 0; row < 64; row++)
        for (int k = 0; k < 16; k++) a[row][k] = element(memory[block], hidden, false, row, k);
      read_b(memory[block], descriptor(stage(tile) + step / 4 * Tile::kWeightPanel + step % 4 * 32), false, b);
      multiply<Tile::kIds>(sums, a, b, step > 0);
    }
    for (int thread = 0; thread < 128; thread++)
      for (int i = 0; i < Tile::kSums; i += 2)
        for (int j = 0; j < 2; j++)  // a pair is written at once
          memory[sum_row(thread, 0) / kOwnRows].put(
              kBase + Tile::kPartialAt + Tile::partial(block, sum_row(thread, i) % kOwnRows, sum_column(thread, i)) + 4 * j,
              sums[thread][i + j]);
  }

  void weigh(int row, int tile) {
    const int owner = row / kOwnRows, place = tile % Tile::kParts;
    float logit[kLanes][Tile::kEach] = {}, most[kLanes], mass[kLanes], squares[kLanes], slope[kLanes];
    for (int lane = 0; lane < kLanes; lane++) {
      most[lane] = -kInfinity;
      const int column = lane * Tile::kEach;
      for (int from = 0; from < kBlocks; from++)
        for (int i = 0; i < Tile::kEach; i++)
          logit[lane][i] += memory[owner].template get<float>(
              kBase + Tile::kPartialAt + Tile::partial(from, row % kOwnRows, column) + 4 * i);
      for (int i = 0; i < Tile::kEach; i++) {
        float& x = logit[lane][i];
        x = first_id(tile) + column + i < problem.vocab ? x * problem.inv_temperature : -kInfinity;
        most[lane] = fmaxf(most[lane], x);
        kept[row][place * Tile::kIds + column + i] = x;
      }
    }
    const float largest = over_lanes(most, 0, [](float x, float y) { return fmaxf(x, y); });
    const float factor = part[row].raise(largest);
    for (int lane = 0; lane < kLanes; lane++) {
      ExpSums sums;
      for (int i = 0; i < Tile::kEach; i++) {
        const uint16_t p = to_bf16(sums.add(logit[lane][i], part[row].largest));
        for (Memory& block : memory)
          block.put(kBase + Tile::kProbAt + tile % 2 * Tile::kHiddenPanel + swizzled(row, lane * Tile::kEach * 2) + 2 * i, p);
      }
      mass[lane] = sums.mass, squares[lane] = sums.squares, slope[lane] = sums.slope;
    }
    for (Memory& block : memory) block.put(kBase + Tile::kScaleAt + (tile % 2 * kRows + row) * 4, factor);
    const auto add = [](float x, float y) { return x + y; };
    part[row].add({over_lanes(mass, 0, add), over_lanes(squares, 0, add), over_lanes(slope, 0, add)});

    if (place == 0) tile_sums[row] = TileSums();
    tile_sums[row].add(factor, largest, over_lanes(mass, 0, add));
    if (place < Tile::kParts - 1 || row >= problem.rows) return;
    const int64_t noise_tile = first + tile / Tile::kParts;
    const RowNoise noise(problem.seed, problem.counter + 3 * row, kStreamTile);
    if (part[row].leads((int32_t)noise_tile, tile_sums[row].score(part[row].largest, problem.greedy, noise, noise_tile)))
      memcpy(&problem.logits[(cluster * problem.rows + row) * kNoiseTile], kept[row], sizeof kept[row]);
  }

  void add_mixture(int block, int tile) {
    const Memory& shared = memory[block];
    for (int panel = 0; panel < Tile::kPanels; panel++) {
      Sums<64>& sums = mixture[block][panel];
      for (int thread = 0; thread < 128; thread++)
        for (int i = 0; i < 32; i++)
          sums[thread][i] *= shared.get<float>(kBase + Tile::kScaleAt + (tile % 2 * kRows + sum_row(thread, i)) * 4);
      for (int step = 0; step < Tile::kIds / 16; step++) {
        static float a[64][16], b[16][64];
        for (int thread = 0; thread < 128; thread++)
          for (int i = 0; i < 4; i++) {
            const uint32_t pair = shared.get<uint32_t>(
                kBase + Tile::kProbAt + tile % 2 * Tile::kHiddenPanel +
                swizzled(pair_row(thread, i), 2 * (step * 16 + pair_column(thread, i))));
            // registers a0 .. a3 hold two numbers each: rows g, g + 8, g, g + 8; k 2t, 2t, 2t + 8, 2t + 8
            float* to = &a[(thread >> 5) * 16 + (thread % 32 >> 2) + (i & 1) * 8][(thread & 3) * 2 + (i >> 1) * 8];
            to[0] = from_bf16((uint16_t)pair), to[1] = from_bf16((uint16_t)(pair >> 16));
          }
        read_b(shared, descriptor(stage(tile) + panel * Tile::kWeightPanel + step * 16 * kRowBytes), true, b);
        multiply<64>(sums, a, b, true);
      }
    }
  }

  void run() {
    for (int block = 0; block < kBlocks; block++) {
      for (int panel = 0; panel < Tile::kPanels; panel++)
        load_box(memory[block], kBase + panel * Tile::kHiddenPanel, problem.hidden, problem.rows, Tile::kWidth,
                 (block * Tile::kPanels + panel) * kPanel, 0, kRows);
      for (int tile = 0; tile < Tile::kStages && tile < tiles; tile++) load(block, tile);
      send_logits(block, 0);
    }
    // the kernel's order between its barriers: a stage that is filled too early, or read too late, shows in the sums
    for (int tile = 0; tile < tiles; tile++) {
      for (int row = 0; row < kRows; row++) weigh(row, tile);
      for (int block = 0; block < kBlocks; block++) {
        const int next = tile - 1 + Tile::kStages;
        if (tile > 0 && next < tiles) load(block, next);
        if (tile + 1 < tiles) send_logits(block, tile + 1);
      }
      for (int block = 0; block < kBlocks; block++) add_mixture(block, tile);
    }
    for (int row = 0; row < problem.rows; row++) problem.parts[cluster * problem.rows + row] = part[row];
    for (int block = 0; block < kBlocks; block++)
      for (int panel = 0; panel < Tile::kPanels; panel++)
        for (int thread = 0; thread < 128; thread++)
          for (int i = 0; i < 32; i++) {
            const int row = sum_row(thread, i);
            const int column = (block * Tile::kPanels + panel) * kPanel + sum_column(thread, i);
            if (row < problem.rows && column < Tile::kWidth)
              problem.mixtures[(cluster * problem.rows + row) * Tile::kWidth + column] = mixture[block][panel][thread][i];
          }
  }
};

void finish(const Problem& problem, int64_t width, int64_t row, int64_t* token, float* logprob, float* entropy,
            float* mixture) {
  const RowPart* parts = &problem.parts[row];
  const Row whole(parts, problem.clusters, problem.rows);
  for (int64_t column = 0; column < width; column++) {
    float sum = 0;
    for (int64_t c = 0; c < problem.clusters; c++)
      sum += whole.weight(parts[c * problem.rows]) * problem.mixtures[(c * problem.rows + row) * width + column];
    mixture[column] = sum;
  }
  const float* logits = &problem.logits[(whole.leader * problem.rows + row) * kNoiseTile];
  const int64_t first_id = (int64_t)parts[whole.leader * problem.rows].tile * kNoiseTile;
  const RowNoise noise(problem.seed, problem.counter + 3 * row, kStreamId);
  PlaceRace race[32];
  for (int lane = 0; lane < 32; lane++)
    for (int at = lane; at < kNoiseTile && first_id + at < problem.vocab; at += 32)
      race[lane].run(at, logits[at], first_id + at, problem.greedy, noise);
  for (int step = 16; step > 0; step /= 2) {
    PlaceRace next[32];
    memcpy(next, race, sizeof race);
    for (int lane = 0; lane < 32; lane++) next[lane].challenge(race[lane ^ step].score, race[lane ^ step].place);
    memcpy(race, next, sizeof race);
  }
  *token = first_id + race[0].place;
  *logprob = whole.logprob(logits[race[0].place]);
  *entropy = whole.entropy();
}

template <int kWidth>
void run(Problem& problem) {
  for (int64_t c = 0; c < problem.clusters; c++) Cluster<HeadTile<kWidth>>(problem, c).run();
}

}  // namespace

extern "C" void vocab_head(int64_t width, const uint16_t* hidden, const uint16_t* weight, int64_t rows, int64_t vocab,
                           float inv_temperature, int64_t seed, const int64_t* counter, int greedy, int64_t clusters,
                           int64_t* token, float* logprob, float* entropy, float* mixture) {
  const size_t parts = clusters * rows;
  Problem problem{hidden, weight, rows, vocab, inv_temperature, seed, counter, greedy != 0, clusters,
                  std::vector<RowPart>(parts), std::vector<float>(parts * kNoiseTile, NAN),
                  std::vector<float>(parts * width, NAN)};
  if (width == 896) run<896>(problem);
  else if (width == 1536) run<1536>(problem);
  else run<2048>(problem);
  for (int64_t row = 0; row < rows; row++)
    finish(problem, width, row, token + row, logprob + row, entropy + row, mixture + row * width);
}

extern "C" int64_t begin_of(int64_t cluster, int64_t clusters, int64_t vocab) { return first_tile(cluster, clusters, vocab); }

extern "C" void uniforms(int64_t seed, const int64_t* counter, int stream, int count, float* out) {
  const RowNoise noise(seed, counter, (Stream)stream);
  for (int i = 0; i < count; i++) out[i] = noise.uniform((uint32_t)i * 2654435761u);
}
