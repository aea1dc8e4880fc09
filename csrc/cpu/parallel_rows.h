// Rows spread over threads; a row is always computed by one thread, so results do not depend on their number.
#pragma once

#include "../structs.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastlatent {
namespace FASTLATENT_ISA {

// Calls `row(index, this thread's scratch)` for every row.
template <class Row>
static inline void parallel_rows(const Rows& args, Row row) {
  const int64_t size = scratch_floats(args.vocab);
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(args.threads)
  for (int64_t b = 0; b < args.rows; b++) row(b, args.scratch + omp_get_thread_num() * size);
#else
  for (int64_t b = 0; b < args.rows; b++) row(b, args.scratch);
#endif
}

}  // namespace FASTLATENT_ISA
}  // namespace fastlatent
