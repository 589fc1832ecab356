// What the binding knows of each op, as plain data.
#pragma once

namespace diffcore {

struct OpInfo {
  const char* name;
  int n_in, n_out, n_sum, n_coef;  // n_in: inputs read from memory
  bool draws;                      // generates its last input, the noise
};

struct OpTable {
  const OpInfo* ops;
  int size;

  const OpInfo* find(int op) const { return op >= 0 && op < size ? ops + op : nullptr; }
};
OpTable op_table();  // in the order of AllOps

// Names of coefficients in their order: rows of a step and of a term of the bound.
struct Names {
  const char* const* first;
  int size;
};
Names step_columns();
Names vlb_columns();

}  // namespace diffcore
