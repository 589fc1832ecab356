// What the binding knows of each op, as numbers.
#pragma once

#include "ops/all.h"

namespace diffcore {

struct OpInfo {
  const char* name;
  int n_in, n_out, n_sum, n_coef;  // n_in: inputs read from memory
  bool draws;                      // generates its last input, the noise
};

template <class... Op>
const OpInfo* info_table(OpList<Op...>) {
  static const OpInfo table[] = {
      {Op::name, kReads<Op>, Op::n_out, Op::n_sum, Op::n_coef, kDraws<Op>}...};
  return table;
}
inline const OpInfo* ops() { return info_table(AllOps{}); }

}  // namespace diffcore
