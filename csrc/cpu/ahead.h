// Memory that is wanted next, brought into the second level cache while something else is computed.
#pragma once

#include <stdint.h>

#include "simd.h"

namespace fastlatent {
namespace FASTLATENT_ISA {

class Ahead {
  const char *at = nullptr, *end = nullptr;
  int64_t share = 0;

  static constexpr int64_t kPage = 4096;

 public:
  Ahead() = default;

  // In at most `steps` steps of whole lines: as small as they can be, for a processor stalls on more than it can wait for.
  // The pages come at once: it looks up several addresses side by side, but one at a time where it computes in between.
  Ahead(const void* from, int64_t bytes, int64_t steps)
      : at((const char*)from), end(at + bytes), share((bytes / steps / 64 + 1) * 64) {
    for (int64_t i = 0; i < bytes; i += kPage) __builtin_prefetch(at + i, 0, 2);
  }

  void step() {
    if (at >= end) return;
    for (int64_t i = 0; i < share; i += 64) __builtin_prefetch(at + i, 0, 2);
    at += share;
  }
};

}  // namespace FASTLATENT_ISA
}  // namespace fastlatent
