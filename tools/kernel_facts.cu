// Prints, for every op and storage type, what its CUDA kernel does by the source: its packed loads
// and stores, and whether it exists. Runs on the host; tools/compiled_code.py reads it.
#include <cstdio>
#include <typeinfo>

#include "cuda/map.cuh"
#include "cuda/select.cuh"
#include "ops/kernel_matrix.h"

namespace diffcore {
namespace {

template <class Op, class S>
void print() {
  // The engine generates the noise of a double tensor with Randn and reads it.
  const bool unused = sizeof(S) == 8 && kGeneratesNoise<Op> && kReads<Op> > 0;
  int unroll = kUnroll<Op>;
  if constexpr (kSelects<Op>) unroll = HeldKeys<Op, S>::kPacks;
  std::printf("%s\t%s\t%d\t%d\t%d\n", typeid(Op).name(), typeid(S).name(), kReads<Op> * unroll,
              Op::n_out * (kSelects<Op> ? 1 : kUnrolledPacks<Op>), !unused);
}

template <class... Op>
void print_all(OpList<Op...>) {
  ((print<Op, float>(), print<Op, double>(), print<Op, Bf16>(), print<Op, F16>()), ...);
}

}  // namespace
}  // namespace diffcore

int main() { diffcore::print_all(diffcore::AllOps{}); }
