#include <algorithm>

#include "kernels.h"

namespace fusedrnn::cuda {
namespace {

constexpr int64_t kAloneRows = 8, kRows = 16;  // of a product
constexpr int64_t kBlockUnits = 16;            // of a block
constexpr int64_t kMostTileRows = 128;         // what shared memory has room for on every device
constexpr int64_t kGridDepth = 8;              // warps that share the depth of a product

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

// A CTA's registers hold 64K operands of two bytes: weight_hh of 128 units and four gates. Where
// that is all of it, one CTA runs a tile of rows by itself; there can be any number of tiles. Else
// 16 units are a CTA's, and all CTAs must run at the same time, one on a multiprocessor: there are
// as many groups as find room, down to one product's rows in each.
Cut cut_of(int64_t steps, int64_t rows, int64_t hidden_size, int64_t directions,
           int64_t operand_bytes, int64_t multiprocessors, bool grid) {
  const int64_t alone = operand_bytes == 2 ? 128 : 64;
  Cut cut;
  // The kernels count steps, rows and arrivals in 32 bits; a grid has 65,535 tiles at most.
  if (rows == 0 || rows > 65535 * kAloneRows ||
      steps * divide_up(hidden_size, kBlockUnits) > INT32_MAX ||
      (operand_bytes != 2 && operand_bytes != 4)) {
    return cut;
  }
  if (hidden_size <= alone && !grid) {
    cut = {0, 1, divide_up(rows, kAloneRows), kAloneRows, alone};
    return cut;
  }
  cut.variant = hidden_size <= kGridDepth * alone / 2 ? 1 : 2;
  cut.depth = kGridDepth * alone / (cut.variant == 1 ? 2 : 1);
  cut.ctas = divide_up(hidden_size, kBlockUnits);
  if (hidden_size > cut.depth) return cut;
  const int64_t most = std::min(divide_up(rows, kRows), multiprocessors / (directions * cut.ctas));
  if (most == 0) return cut;
  cut.tile_rows = divide_up(divide_up(rows, most), kRows) * kRows;
  if (cut.tile_rows <= kMostTileRows) cut.groups = divide_up(rows, cut.tile_rows);
  return cut;
}

}  // namespace fusedrnn::cuda
