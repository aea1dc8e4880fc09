#define FASTLATENT_ISA base
#define FASTLATENT_LANES 4
#include "topk_mixture.h"
#include "vocab_head.h"
