// The properties of each op that the binding uses, as plain data.
#pragma once

namespace diffcore {

struct OpInfo {
  const char* name;
  int n_in, n_out, n_sum, n_coef;  // n_in: inputs read from memory; n_sum: results of a row
  bool generates_noise;            // generates its last input, the noise
};

struct OpTable {
  const OpInfo* ops;
  int size;

  const OpInfo* find(int op) const { return op >= 0 && op < size ? ops + op : nullptr; }
};
OpTable op_table();  // in the order of AllOps

// Names in their order: columns of a step table and of a table of bound terms, kinds of guidance.
struct Names {
  const char* const* first;
  int size;
};
Names step_columns();
Names vlb_columns();
Names guidance_kinds();

}  // namespace diffcore
