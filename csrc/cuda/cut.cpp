#include <algorithm>

#include "kernels.h"

namespace fusedrnn::cuda {
namespace {

constexpr int64_t kAloneRows = 8, kRows = 16;  // of a product
constexpr int64_t kBlockUnits = 16;            // of a block
constexpr int64_t kMostTileRows = 128;         // what shared memory has room for on every device
constexpr int64_t kGridDepth = 8;              // warps that share the depth of a product
constexpr int64_t kClusterUnits = 32, kClusterRows = 8, kClusterDepth = 4;  // the same, in clusters

using scalar::divide_up;

/// The units whose weights, all gates of 16 at a time, the registers of a CTA hold.
int64_t alone(int64_t operand_bytes) { return operand_bytes == 2 ? 128 : 64; }

/// The kernels count steps, rows and arrivals in 32 bits; a grid has 65,535 tiles at most.
bool can_count(int64_t steps, int64_t rows, int64_t hidden_size, int64_t operand_bytes) {
  return rows > 0 && rows <= 65535 * kAloneRows &&
         steps * divide_up(hidden_size, kBlockUnits) <= INT32_MAX &&
         (operand_bytes == 2 || operand_bytes == 4);
}

}  // namespace

// A CTA's registers hold 64K operands of two bytes: weight_hh of 128 units and four gates. Where
// that is all of it, one CTA runs a tile of rows by itself; there can be any number of tiles. Else
// 16 units are a CTA's, and all CTAs must run at the same time, one on a multiprocessor: there are
// as many groups as find room, down to one product's rows in each.
Cut cut_of(int64_t steps, int64_t rows, int64_t hidden_size, int64_t directions,
           int64_t operand_bytes, int64_t multiprocessors, bool grid) {
  Cut cut;
  if (!can_count(steps, rows, hidden_size, operand_bytes)) return cut;
  const int64_t most_alone = alone(operand_bytes);
  if (hidden_size <= most_alone && !grid) {
    return {Reach::cta, false, 1, divide_up(rows, kAloneRows), kAloneRows, most_alone};
  }
  cut.reach = Reach::grid;
  cut.half = hidden_size <= kGridDepth * most_alone / 2;
  cut.depth = kGridDepth * most_alone / (cut.half ? 2 : 1);
  cut.ctas = divide_up(hidden_size, kBlockUnits);
  if (hidden_size > cut.depth) return cut;
  const int64_t most = std::min(divide_up(rows, kRows), multiprocessors / (directions * cut.ctas));
  if (most == 0) return cut;
  cut.tile_rows = divide_up(divide_up(rows, most), kRows) * kRows;
  if (cut.tile_rows <= kMostTileRows) cut.groups = divide_up(rows, cut.tile_rows);
  return cut;
}

// 32 units are a CTA's: four warps share the depth of their product, and what they hold of it is
// what a warp of a CTA alone holds. Clusters of up to 8 run on every device that has clusters,
// those of up to 16 on some.
Cut cluster_cut_of(int64_t steps, int64_t rows, int64_t hidden_size, int64_t operand_bytes) {
  Cut cut;
  cut.reach = Reach::cluster;
  if (!can_count(steps, rows, hidden_size, operand_bytes)) return cut;
  cut.half = hidden_size <= kClusterDepth * alone(operand_bytes) / 2;
  cut.depth = kClusterDepth * alone(operand_bytes) / (cut.half ? 2 : 1);
  if (hidden_size > cut.depth) return cut;
  cut.ctas = std::max<int64_t>(2, divide_up(hidden_size, kClusterUnits));  // mail goes to another
  // Of 227 KB: what comes in a backward pass grows with the CTAs.
  cut.tile_rows = cut.ctas > 8 ? 32 : 64;
  cut.groups = divide_up(rows, cut.tile_rows);
  return cut;
}

Cut spread(Cut cut, int64_t rows, int64_t directions, int64_t clusters) {
  const int64_t groups = std::max<int64_t>(1, clusters / directions);
  const int64_t tile_rows = divide_up(divide_up(rows, groups), kClusterRows) * kClusterRows;
  cut.tile_rows = std::min(cut.tile_rows, tile_rows);
  cut.groups = divide_up(rows, cut.tile_rows);
  return cut;
}

}  // namespace fusedrnn::cuda
