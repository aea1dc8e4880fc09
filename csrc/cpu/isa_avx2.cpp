#define FASTLATENT_ISA avx2
#define FASTLATENT_LANES 8
#include "topk_mixture.h"
#include "vocab_head.h"
