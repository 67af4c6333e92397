#include "plan.h"

#include <algorithm>
#include <cmath>

namespace fusedrnn::cpu {
namespace {

/// The model's figures, in cycles of about 0.3 ns, and bytes a cycle. Measured on Zen 3 and Zen 4.
constexpr double kL2Rate = 32, kL3Rate = 20, kMemoryRate = 7;  ///< of one core
constexpr double kCall = 15000;                                ///< a job for the pool's threads
constexpr double kBarrier = 500;        ///< threads that share a step: for each step,
constexpr double kBarrierMember = 150;  ///< and for each thread
constexpr double kCell = 15;            ///< the cell's maths, for one row and vector of a gate
constexpr double kExchangeRate = 5;     ///< of the state from other cores' caches
constexpr double kPack = 4;             ///< packing a vector of weights
/// One GEMM for the input must take less than this part of the time without: it takes memory.
constexpr double kGain = 0.95;
/// Part of a cache that weights may take.
constexpr double kUsable = 0.75;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Cycles to read this many bytes of weights, as in every step before.
double read_cycles(double bytes, const Caches& caches) {
  if (bytes <= kUsable * double(caches.l1)) return 0;
  if (bytes <= kUsable * double(caches.l2)) return bytes / kL2Rate;
  return bytes / (bytes <= kUsable * double(caches.l3) ? kL3Rate : kMemoryRate);
}

/// Cycles of the multiply-adds of rows with one vector of weights. A tile of R rows multiplies a
/// vector R times, at two a cycle. For few rows its loads take longer: 4 vectors and R operands.
double row_cycles(int64_t rows, const LayerWork& work) {
  const int64_t tiles = divide_up(rows, work.tile_rows);
  const double tile = double(rows) / double(tiles);
  return double(tiles) * std::max(tile, (4 + tile) / 4) / 2;
}

/// The longer of both hides most of the shorter: of equal times 0.6.
double joined(double arithmetic, double memory) { return std::hypot(arithmetic, memory); }

double step_cycles(const LayerWork& work, bool input_gemm, int64_t members, int64_t groups,
                   const Caches& caches) {
  const int64_t rows = divide_up(work.rows, groups);
  const double input = input_gemm ? 0 : double(work.input_size), output = double(work.output_size);
  // The longest part: 5 parts of 3 threads are 2, 2 and 1.
  const double share = double(divide_up(work.parts, members)) / double(work.parts);
  const double vectors = share * double(work.vectors), weights = vectors * (output + input);
  const double cycles_of_k =
      output * double(work.vector_cycles) + input * double(work.input_vector_cycles);
  double arithmetic = vectors * (row_cycles(rows, work) * cycles_of_k + double(rows) * kCell);
  if (work.packs_in_step) arithmetic += weights * kPack;
  const double cycles =
      joined(arithmetic, read_cycles(weights * double(work.vector_bytes), caches));
  if (members == 1) return cycles;
  const double others = double(rows * work.output_size) * (1 - share) * sizeof(float);
  return cycles + kBarrier + kBarrierMember * double(members) + others / kExchangeRate;
}

/// The input's part in one GEMM: full tiles, and its result written and read.
double input_cycles(const LayerWork& work, const Caches& caches) {
  const double products = double(work.rows * work.steps * work.vectors);
  const double bytes = products * double(work.vector_bytes);
  return products * double(work.input_size * work.input_vector_cycles) / 2 +
         2 * read_cycles(bytes, caches);
}

}  // namespace

bool multiplies_input(const LayerWork& work, const Caches& caches) {
  if (work.rows < work.tile_rows) return true;
  const double steps = double(work.steps);
  return steps * step_cycles(work, true, 1, 1, caches) + input_cycles(work, caches) <
         kGain * steps * step_cycles(work, false, 1, 1, caches);
}

Split choose_split(const LayerWork& work, bool input_gemm, int64_t threads, const Caches& caches) {
  Split best;
  best.cycles = -1;
  // Powers of two, and the largest number.
  const auto next = [](int64_t n, int64_t most) {
    return n < most ? std::min(2 * n, most) : n + 1;
  };
  const int64_t most_members = std::min(threads, work.parts);
  for (int64_t members = 1; members <= most_members; members = next(members, most_members)) {
    // A group has two rows at least: the sums of a single row are rounded in another order.
    const int64_t most_groups =
        std::clamp<int64_t>(threads / members, 1, std::max<int64_t>(work.rows / 2, 1));
    for (int64_t groups = 1; groups <= most_groups; groups = next(groups, most_groups)) {
      double cycles = double(work.steps) * step_cycles(work, input_gemm, members, groups, caches);
      if (members * groups > 1) cycles += kCall;
      if (best.cycles < 0 || cycles < best.cycles) best = {members, groups, cycles};
    }
  }
  return best;
}

}  // namespace fusedrnn::cpu
