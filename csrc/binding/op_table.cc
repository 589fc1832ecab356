#include "binding/op_table.h"

#include "ops/all.h"

namespace diffcore {
namespace {

template <class... Op>
OpTable table_of(OpList<Op...>) {
  static constexpr OpInfo kOps[] = {
      {Op::name, kReads<Op>, Op::n_out, kStored<Op>, Op::n_coef, kGeneratesNoise<Op>}...};
  return {kOps, sizeof...(Op)};
}

template <int kCount>
constexpr Names names_of(const char* const (&names)[kCount]) {
  return {names, kCount};
}

}  // namespace

OpTable op_table() { return table_of(AllOps{}); }
Names step_columns() { return names_of(kStepColumns); }
Names vlb_columns() { return names_of(kVlbColumns); }
Names guidance_kinds() { return names_of(kGuidanceKinds); }

}  // namespace diffcore
