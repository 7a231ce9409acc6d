// The kernels, written once. Every target's source file includes this inside its unnamed namespace, so that no function
// compiled for one instruction set can be linked into another. For the same reason nothing here may come from std.

// clang-format off
#include "body/math.h"
#include "body/attention.h"
#include "body/limits.h"
#include "body/matmul.h"
#include "body/rows.h"
#include "body/rounding.h"
// clang-format on

template <class Isa>
constexpr Kernels kernels() {
  return {.name = Isa::kName,
          .rows = Isa::kRows,
          .tiles_from_nibbles = Isa::kTilesFromNibbles,
          .query_lanes = 2 * Isa::kLanes,
          .pack_tile = pack_tile<Isa>,
          .unpack = unpack<Isa>,
          .multiply = multiply<Isa>,
          .multiply_float = multiply_float<Isa>,
          .quantize = quantize<Isa>,
          .quantize_dynamic = quantize_dynamic<Isa>,
          .normalize = normalize<Isa>,
          .normalize_quantize = normalize_quantize<Isa>,
          .activate = activate<Isa>,
          .round_in_turn = round_in_turn<Isa>,
          .attention_scratch = attention_scratch<Isa>,
          .attend = attend<Isa>,
          .read = read<Isa>,
          .dot = dot<Isa>};
}
