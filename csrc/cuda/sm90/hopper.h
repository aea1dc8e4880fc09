// Hopper's own instructions, one function each: clusters, mbarriers, the tensor memory accelerator (TMA) and wgmma.
// Names and rules: PTX ISA 8.0 and later.
#pragma once

#include <cuda.h>
#include <stdint.h>

namespace fastlatent {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return (uint32_t)__cvta_generic_to_shared(pointer);
}

// ---- clusters

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return (int)rank;
}

// All threads of all blocks arrive, then wait; what one wrote before it arrived, the others see after they waited.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The address in another block of the cluster of what has this address here.
__device__ __forceinline__ uint32_t address_in(int rank, uint32_t address) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

__device__ __forceinline__ void store_there(uint32_t there, float x) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(x) : "memory");
}
__device__ __forceinline__ void store_there(uint32_t there, float x, float y) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(there), "f"(x), "f"(y) : "memory");
}
__device__ __forceinline__ void store_there(uint32_t there, uint32_t x) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there), "r"(x) : "memory");
}

// ---- mbarriers, whose phases end when TMA has brought all bytes that were announced

__device__ __forceinline__ void barrier_init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
// makes the new barriers known to TMA
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
}

__device__ __forceinline__ void announce(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ bool has_come(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}
// Where nothing comes for about ten seconds the launch ends with an error, and the caller need not wait for ever.
__device__ __forceinline__ void wait_for(uint32_t barrier, uint32_t parity) {
  uint32_t begin = 0, now;
  while (!has_come(barrier, parity)) {
    asm volatile("mov.u32 %0, %%globaltimer_hi;" : "=r"(now));  // of 4.3 s
    if (begin == 0) begin = now;
    if (now - begin > 2) __trap();
  }
}

// ---- TMA

// A box of a matrix, from (column, row) on, into this block's shared memory; 0 for what lies outside the matrix.
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap& map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// ---- wgmma

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_finish() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// The compiler does not know that sums change until wgmma_finish: let it move none of their uses across this.
template <int N>
__device__ __forceinline__ void hold(float (&sum)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(sum[i])::"memory");
}

#define FASTLATENT_SUMS4(s, i) "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3])
#define FASTLATENT_SUMS16(s, i) \
  FASTLATENT_SUMS4(s, i), FASTLATENT_SUMS4(s, i + 4), FASTLATENT_SUMS4(s, i + 8), FASTLATENT_SUMS4(s, i + 12)

// sum (+)= A B for A [64, 16] and B [16, N], both K-major in shared memory; the sums start from 0 where !adds.
__device__ __forceinline__ void multiply(float (&sum)[32], uint64_t a, uint64_t b, bool adds) {
  asm volatile(
      "{\n"
      ".reg .pred adds;\n"
      "setp.ne.b32 adds, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, adds, 1, 1, 0, 0;\n"
      "}\n"
      : FASTLATENT_SUMS16(sum, 0), FASTLATENT_SUMS16(sum, 16)
      : "l"(a), "l"(b), "r"((int)adds));
}
__device__ __forceinline__ void multiply(float (&sum)[16], uint64_t a, uint64_t b, bool adds) {
  asm volatile(
      "{\n"
      ".reg .pred adds;\n"
      "setp.ne.b32 adds, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "%16, %17, adds, 1, 1, 0, 0;\n"
      "}\n"
      : FASTLATENT_SUMS16(sum, 0)
      : "l"(a), "l"(b), "r"((int)adds));
}

// sum += A B for A [64, 16] in registers and B [16, 64] MN-major in shared memory.
__device__ __forceinline__ void multiply_transposed(float (&sum)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
      : FASTLATENT_SUMS16(sum, 0), FASTLATENT_SUMS16(sum, 16)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

}  // namespace fastlatent
