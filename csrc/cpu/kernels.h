// The CPU kernels, compiled once per instruction set, and the choice among them at run time.
#pragma once

#include "../structs.h"

namespace fastlatent {

struct CpuKernels {
  const char* isa;
  void (*vocab_head)(const VocabHead&);
  void (*topk_mixture)(const TopkMixture&);
  void (*topk_gumbel)(const TopkGumbel&);
  void (*hrpo_gate)(const HrpoGate&);
  void (*hrpo_gate_backward)(const HrpoGateBackward&);
  void (*soft_embedding)(const SoftEmbedding&);
  void (*soft_embedding_weight_gradient)(const SoftEmbedding&);
  void (*soft_embedding_table_gradient)(const SoftEmbedding&);
};

// Sets this processor can run, best first; ends with {nullptr}.
const CpuKernels* cpu_kernels();

using VocabHeadBf16Kernel = void (*)(const VocabHeadBf16&);

// Null where they cannot run: they take AVX512_BF16; and beside AMX, with which a library's GEMM leaves it far behind.
VocabHeadBf16Kernel vocab_head_bf16_kernel();
VocabHeadBf16Kernel head_logits_bf16_kernel();

}  // namespace fastlatent
