#define FASTLATENT_ISA avx512
#define FASTLATENT_LANES 16
#include "topk_mixture.h"
#include "vocab_head.h"
