#define FASTLATENT_ISA avx512_bf16
#define FASTLATENT_LANES 16
#include "vocab_head_bf16.h"
