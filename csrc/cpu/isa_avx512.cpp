#define FASTLATENT_ISA avx512
#define FASTLATENT_LANES 16
#include "hrpo_gate.h"
#include "soft_embedding.h"
#include "topk_gumbel.h"
#include "topk_mixture.h"
#include "vocab_head.h"
