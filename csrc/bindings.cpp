// fastlatent_kernels._C: the table of contents of the native code.
//
// Pointers arrive as integers from native_impl.py, which has checked device, dtype, shape and contiguity.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;
using namespace fastlatent;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const CpuKernels& kernels_for(const std::string& isa) {
  for (const CpuKernels* row = cpu_kernels(); row->isa; row++)
    if (isa.empty() || isa == row->isa) return *row;
  throw std::invalid_argument("isa: this processor has no '" + isa + "'");
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const CpuKernels* row = cpu_kernels(); row->isa; row++) names.emplace_back(row->isa);
  return names;
}

void fill(Rows& args, uintptr_t logits, bool logits_bf16, int64_t rows, int64_t vocab, double temperature, uintptr_t seed,
          uintptr_t counter, bool greedy, uintptr_t token, uintptr_t logprob, uintptr_t entropy, uintptr_t scratch, int threads) {
  args.logits = pointer<const void>(logits);
  args.logits_dtype = logits_bf16 ? DType::kBFloat16 : DType::kFloat32;
  args.rows = rows;
  args.vocab = vocab;
  args.inv_temperature = static_cast<float>(1.0 / temperature);
  args.seed = pointer<const int64_t>(seed);
  args.counter = pointer<const int64_t>(counter);
  args.greedy = greedy;
  args.token = pointer<int64_t>(token);
  args.logprob = pointer<float>(logprob);
  args.entropy = pointer<float>(entropy);
  args.scratch = pointer<float>(scratch);
  args.threads = threads;
}

void vocab_head(uintptr_t logits, bool logits_bf16, int64_t rows, int64_t vocab, double temperature, uintptr_t seed,
                uintptr_t counter, bool greedy, uintptr_t token, uintptr_t logprob, uintptr_t entropy, uintptr_t scratch,
                int threads, uintptr_t unit_p, bool unit_p_bf16, const std::string& isa) {
  VocabHead args;
  fill(args, logits, logits_bf16, rows, vocab, temperature, seed, counter, greedy, token, logprob, entropy, scratch, threads);
  args.unit_p = pointer<void>(unit_p);
  args.unit_p_dtype = unit_p_bf16 ? DType::kBFloat16 : DType::kFloat32;
  const CpuKernels& kernels = kernels_for(isa);
  py::gil_scoped_release release;
  kernels.vocab_head(args);
}

void topk_mixture(uintptr_t logits, bool logits_bf16, int64_t rows, int64_t vocab, double temperature, uintptr_t seed,
                  uintptr_t counter, bool greedy, uintptr_t token, uintptr_t logprob, uintptr_t entropy, uintptr_t scratch,
                  int threads, int top_k, double top_p, uintptr_t log_kept, uintptr_t ids, uintptr_t weights,
                  const std::string& isa) {
  TopkMixture args;
  fill(args, logits, logits_bf16, rows, vocab, temperature, seed, counter, greedy, token, logprob, entropy, scratch, threads);
  args.top_k = top_k;
  args.top_p = static_cast<float>(top_p);
  args.log_kept = pointer<float>(log_kept);
  args.ids = pointer<int64_t>(ids);
  args.weights = pointer<float>(weights);
  const CpuKernels& kernels = kernels_for(isa);
  py::gil_scoped_release release;
  kernels.topk_mixture(args);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of fastlatent_kernels; call them through the ops, which check shapes and choose a backend.";
  m.def("isas", &isas, "Instruction sets of this processor there are kernels for, best first.");
  m.def("scratch_floats", &scratch_floats, "Floats of scratch per thread for rows of this many logits.");
  m.def("vocab_head", &vocab_head);
  m.def("topk_mixture", &topk_mixture);
}
