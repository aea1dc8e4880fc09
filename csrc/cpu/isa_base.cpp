#define FASTLATENT_ISA base
#define FASTLATENT_LANES 4
#include "hrpo_gate.h"
#include "soft_embedding.h"
#include "topk_gumbel.h"
#include "topk_mixture.h"
#include "vocab_head.h"
