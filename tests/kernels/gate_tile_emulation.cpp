// A block of hrpo_gate_decode.cu on a CPU: its layout (gate_tile.h) around an mma.m16n8k16 written from the PTX ISA's
// tables. The sums over k must be the plain products. Prints the largest error.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/cuda/gate_tile.h"

using namespace fastlatent;

struct Lane {
  float a[8], b[4], sum[4];  // A's a0..a7, B's b0..b3 and the accumulators c0..c3 of the PTX ISA
};

static void multiply(Lane (&lanes)[32]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const int group = lane >> 2, member = lane % 4;
    for (int i = 0; i < 8; i++) {
      const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
      const int column = member * 2 + (i & 1) + (i < 4 ? 0 : 8);
      a[row][column] = lanes[lane].a[i];
    }
    for (int i = 0; i < 4; i++) b[member * 2 + (i & 1) + (i < 2 ? 0 : 8)][group] = lanes[lane].b[i];
  }
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      const int row = i < 2 ? lane >> 2 : (lane >> 2) + 8, column = lane % 4 * 2 + (i & 1);
      for (int k = 0; k < 16; k++) lanes[lane].sum[i] += a[row][k] * b[k][column];
    }
}

int main() {
  const int width = 32 * 11;  // warps with one step and warps with two
  std::vector<float> weight(kTileColumns * width), token(kTileRows * width), got(kTileRows * kTileColumns);
  srand(1);
  for (float& x : weight) x = rand() % 17 - 8;
  for (float& x : token) x = rand() % 17 - 8;
  for (int warp = 0; warp < kTileWarps; warp++) {
    Lane lanes[32] = {};
    for (int step = warp; step < width / kTileDepth; step += kTileWarps)
      for (int product = 0; product < 2; product++) {
        for (int lane = 0; lane < 32; lane++) {
          // the four registers of 16 bytes are x, y, z, w: x and y go to the first product, z and w to the second
          const int64_t k = lane_k(step, lane) + product * 4;
          const float* low = &weight[lane_column(lane, 0) * width + k];
          const float* high = &weight[lane_column(lane, 1) * width + k];
          const float* x = &token[lane_row(lane) * width + k];
          const float a[8] = {low[0], low[1], high[0], high[1], low[2], low[3], high[2], high[3]};
          for (int i = 0; i < 8; i++) lanes[lane].a[i] = a[i];
          for (int i = 0; i < 4; i++) lanes[lane].b[i] = x[i];
        }
        multiply(lanes);
      }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++)
        got[sum_row(lane, i) * kTileColumns + sum_column(lane, i)] += lanes[lane].sum[i];
  }
  double worst = 0;
  for (int row = 0; row < kTileRows; row++)
    for (int column = 0; column < kTileColumns; column++) {
      double want = 0;
      for (int k = 0; k < width; k++) want += (double)weight[column * width + k] * token[row * width + k];
      worst = std::fmax(worst, std::fabs(want - got[row * kTileColumns + column]));
    }
  printf("%g\n", worst);
  // then the gate of what is asked for: u_r u_i lambda token mixture compat_eps a line
  float u_r, u_i, lambda, e, h, eps;
  while (scanf("%f %f %f %f %f %f", &u_r, &u_i, &lambda, &e, &h, &eps) == 6)
    printf("%.9g\n", gated(u_r, u_i, lambda, e, h, eps));
}
