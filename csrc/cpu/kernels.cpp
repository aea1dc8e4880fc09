#include "kernels.h"

namespace fastlatent {

#define DECLARE(isa)                       \
  namespace isa {                          \
  void vocab_head(const VocabHead&);       \
  void topk_mixture(const TopkMixture&);   \
  }
DECLARE(base)
#ifdef FASTLATENT_X86
DECLARE(avx2)
DECLARE(avx512)
#endif
#undef DECLARE

const CpuKernels* cpu_kernels() {
  static const struct Table {
    CpuKernels rows[4] = {};
    Table() {
      int n = 0;
#ifdef FASTLATENT_X86
      __builtin_cpu_init();
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        rows[n++] = {"avx512", avx512::vocab_head, avx512::topk_mixture};
      if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        rows[n++] = {"avx2", avx2::vocab_head, avx2::topk_mixture};
#endif
      rows[n++] = {"base", base::vocab_head, base::topk_mixture};
    }
  } table;
  return table.rows;
}

}  // namespace fastlatent
