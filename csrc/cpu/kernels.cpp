#include "kernels.h"

namespace fastlatent {

#define DECLARE(isa)                                            \
  namespace isa {                                               \
  void vocab_head(const VocabHead&);                            \
  void topk_mixture(const TopkMixture&);                        \
  void topk_gumbel(const TopkGumbel&);                          \
  void hrpo_gate(const HrpoGate&);                              \
  void hrpo_gate_backward(const HrpoGateBackward&);             \
  void soft_embedding(const SoftEmbedding&);                    \
  void soft_embedding_weight_gradient(const SoftEmbedding&);    \
  void soft_embedding_table_gradient(const SoftEmbedding&);     \
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
        rows[n++] = {"avx512", avx512::vocab_head, avx512::topk_mixture, avx512::topk_gumbel,
                     avx512::hrpo_gate, avx512::hrpo_gate_backward, avx512::soft_embedding,
                     avx512::soft_embedding_weight_gradient, avx512::soft_embedding_table_gradient};
      if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        rows[n++] = {"avx2", avx2::vocab_head, avx2::topk_mixture, avx2::topk_gumbel,
                     avx2::hrpo_gate, avx2::hrpo_gate_backward, avx2::soft_embedding,
                     avx2::soft_embedding_weight_gradient, avx2::soft_embedding_table_gradient};
#endif
      rows[n++] = {"base", base::vocab_head, base::topk_mixture, base::topk_gumbel,
                   base::hrpo_gate, base::hrpo_gate_backward, base::soft_embedding,
                   base::soft_embedding_weight_gradient, base::soft_embedding_table_gradient};
    }
  } table;
  return table.rows;
}

}  // namespace fastlatent
