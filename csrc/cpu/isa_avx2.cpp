#define FASTLATENT_ISA avx2
#define FASTLATENT_LANES 8
#include "hrpo_gate.h"
#include "soft_embedding.h"
#include "topk_gumbel.h"
#include "topk_mixture.h"
#include "vocab_head.h"
