#include "kernels.h"

#ifdef FASTLATENT_AVX512_BF16
#include <cpuid.h>
#endif

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
#ifdef FASTLATENT_AVX512_BF16
namespace avx512_bf16 {
void vocab_head_bf16(const VocabHeadBf16&);
void head_logits_bf16(const VocabHeadBf16&);
}
#endif

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

#ifdef FASTLATENT_AVX512_BF16
static bool multiplies_bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool has_amx_bf16 = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1);
  const bool has_avx512_bf16 = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
  // the first row being avx512's says that the system saves its registers too
  return has_avx512_bf16 && !has_amx_bf16 && cpu_kernels()->vocab_head == avx512::vocab_head;
}

VocabHeadBf16Kernel vocab_head_bf16_kernel() { return multiplies_bf16() ? avx512_bf16::vocab_head_bf16 : nullptr; }
VocabHeadBf16Kernel head_logits_bf16_kernel() { return multiplies_bf16() ? avx512_bf16::head_logits_bf16 : nullptr; }
#else
VocabHeadBf16Kernel vocab_head_bf16_kernel() { return nullptr; }
VocabHeadBf16Kernel head_logits_bf16_kernel() { return nullptr; }
#endif

}  // namespace fastlatent
