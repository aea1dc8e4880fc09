// The CPU kernels, compiled once per instruction set, and the choice among them at run time.
#pragma once

#include "../structs.h"

namespace fastlatent {

struct CpuKernels {
  const char* isa;
  void (*vocab_head)(const VocabHead&);
  void (*topk_mixture)(const TopkMixture&);
};

// Sets this processor can run, best first; ends with {nullptr}.
const CpuKernels* cpu_kernels();

}  // namespace fastlatent
