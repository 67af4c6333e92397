// How a layer's steps are split over threads, and whether its input's part is one GEMM: the CPU's
// only heuristic for both. No torch here.
#pragma once

#include <cstdint>

#include "machine.h"

namespace fusedrnn::cpu {

/// What one direction of a layer computes.
struct LayerWork {
  int64_t rows, steps;    ///< B, T
  int64_t input_size;     ///< I; 0 in a backward pass
  int64_t output_size;    ///< P: K of the product with the state
  int64_t vectors;        ///< column vectors of this product: gates times blocks of units
  int64_t parts;          ///< in how many parts threads can share the units
  int64_t tile_rows;      ///< rows in a full tile
  int64_t vector_bytes;   ///< of a vector of weights: 32 on AVX2, 8 there for int8
  int64_t vector_cycles;  ///< half cycles of a multiply-add: 2 where a core has one such unit
  /// The same for the input: less than vector_cycles where only the states are split int16.
  int64_t input_vector_cycles;
  bool packs_in_step;  ///< whether each thread packs its weights within the step
};

/// Whether the input's part shall be one GEMM. Sums are rounded in another order then, so this does
/// not depend on the number of threads.
bool multiplies_input(const LayerWork& work, const Caches& caches);

/// A direction's split: `groups` of rows, each with `members` threads that share its units.
struct Split {
  int64_t members = 1, groups = 1;
  double cycles = 0;  ///< of a direction's steps
};

/// The split with the fewest cycles, for up to `threads` threads a direction.
Split choose_split(const LayerWork& work, bool input_gemm, int64_t threads, const Caches& caches);

}  // namespace fusedrnn::cpu
