// The CUDA kernels as plain functions over plain structs: no torch and nothing of CUDA in here.
//
// Cell is one of cells.h; S the type of operands, T that of sums and states (sequence.h). Shapes as
// in sequence.h. Rows of a batch keep their places: those that have no part in a step, as `lengths`
// or the sizes of a packed batch say, keep their state. Functions put their work on the stream and
// return a cudaError_t.
#pragma once

#include <cstdint>

#include "../cells.h"
#include "../sequence.h"

namespace fusedrnn::cuda {

using scalar::Gru;
using scalar::Lstm;

// ---- step by step -------------------------------------------------------------------------------
//
// The products of a step are the caller's; these are what is between them.

/// The rows of one step: [0, rows), but for those with lengths[row] <= t.
struct StepRows {
  int64_t rows = 0, t = 0;
  const int64_t* lengths = nullptr;  ///< [rows], null: all take part
};

template <class S, class T = Accumulator<S>>
struct ForwardStep : StepRows {
  int64_t hidden_size = 0;
  const T* x_product = nullptr;  ///< [rows, G*H] weight_ih x
  const T* h_product = nullptr;  ///< [rows, G*H] weight_hh h, null: zeros
  const S* bias_ih = nullptr;    ///< [G*H], null: zeros
  const S* bias_hh = nullptr;    ///< [G*H]
  T* state = nullptr;            ///< [rows, H] read and written
  S* h = nullptr;                ///< [rows, H] the output, as an operand
  S* y = nullptr;                ///< [rows, H] the output, y_stride apart; null with a projection
  int64_t y_stride = 0;
  T* saved = nullptr;  ///< [rows, A, H], null: not wanted
};

/// What comes after the product of a projection.
template <class S, class T = Accumulator<S>>
struct ProjectedStep : StepRows {
  int64_t output_size = 0;
  const T* r = nullptr;  ///< [rows, P] the projected output
  S* h = nullptr;        ///< [rows, P]
  S* y = nullptr;        ///< [rows, P], y_stride apart
  int64_t y_stride = 0;
};

/// What a step back is given of the gradients of its output, F features: the sum of all three.
template <class T>
struct StepBack : StepRows {
  int64_t before = -1;      ///< the step before t in the order of the run, -1: none
  int64_t rows_before = 0;  ///< its rows
  const T* dy = nullptr;    ///< [rows, F], dy_stride apart; null: zeros
  int64_t dy_stride = 0;
  /// [rows, F] through weight_hh from the step after, zeros without one.
  const T* product = nullptr;
  /// [rows, F] of h_n. Rows that take no part add `product` to it, those that do leave zeros.
  T* dh = nullptr;
};

template <class S, class T = Accumulator<S>>
struct BackwardStep : StepBack<T> {
  int64_t hidden_size = 0;
  const T* saved = nullptr;         ///< [rows, A, H]
  const T* saved_before = nullptr;  ///< [rows_before, A, H]
  const T* h0 = nullptr;            ///< [rows, H] h0_stride apart, null: zeros
  const T* c0 = nullptr;
  int64_t h0_stride = 0, c0_stride = 0;
  const T* dh_raw = nullptr;  ///< with a projection, [rows, H] instead: of the output before it
  T* dstate = nullptr;      ///< [rows, H]
  S* dgates = nullptr;       ///< [rows, S*H] as operands, zero on entry
  S* dhidden = nullptr;     ///< [rows, G*H] of the sums that weight_hh feeds, where not just dgates
  S* h_previous = nullptr;  ///< [rows, H], null with a projection
  S* h_raw = nullptr;       ///< [rows, H] output before the projection
};

/// What comes before the product of a projection, going back.
template <class S, class T = Accumulator<S>>
struct ProjectedStepBack : StepBack<T> {
  int64_t output_size = 0;
  const T* y_before = nullptr;  ///< [rows_before, P], y_stride apart
  int64_t y_stride = 0;
  const T* h0 = nullptr;  ///< [rows, P], null: zeros
  int64_t h0_stride = 0;
  S* dr = nullptr;          ///< [rows, P] gradient of the output, zero on entry
  S* h_previous = nullptr;  ///< [rows, P]
};

template <class Cell, class S>
int forward_step(const ForwardStep<S>& step, void* stream);
template <class S>
int projected_step(const ProjectedStep<S>& step, void* stream);
template <class Cell, class S>
int backward_step(const BackwardStep<S>& step, void* stream);
template <class S>
int projected_step_back(const ProjectedStepBack<S>& step, void* stream);

/// Writes `count` numbers of the host to memory of the device. They travel as a kernel's argument:
/// no copy that waits, and none that a captured graph would read again when they are gone.
int upload(const int64_t* numbers, int64_t count, int64_t* to, void* stream);

// ---- all steps in one launch --------------------------------------------------------------------
//
// Each CTA keeps its units' part of weight_hh in registers for the whole sequence. A *group* of
// CTAs runs the units of one direction for a tile of rows; its CTAs tell each other of h, or of the
// gradients. No projection.

/// How far h has to go from step to step.
enum class Reach {
  cta,      ///< one CTA has all units
  cluster,  ///< the CTAs of a cluster have them and write into each other's shared memory
  grid,     ///< CTAs that run together, through `exchange` in global memory, count arrivals there
};

/// How a layer is cut up.
struct Cut {
  Reach reach = Reach::cta;
  bool half = false;   ///< half the registers hold all weights, so that a step is shorter
  int64_t ctas = 0;    ///< in a group
  int64_t groups = 0;  ///< in a direction; 0: the layer can't run so
  int64_t tile_rows = 0;
  int64_t depth = 0;  ///< units that the exchange has room for
};

enum class Precision { ieee, tf32 };  ///< of products of float32; the half types have their own

/// The cut of a layer of D directions with operands of `operand_bytes` for a device of so many
/// multiprocessors. `grid`: even if one CTA could do it.
Cut cut_of(int64_t steps, int64_t rows, int64_t hidden_size, int64_t directions,
           int64_t operand_bytes, int64_t multiprocessors, bool grid);

/// The cut into clusters, with as many rows in each as its shared memory has room for.
Cut cluster_cut_of(int64_t steps, int64_t rows, int64_t hidden_size, int64_t operand_bytes);
/// The same with no more rows than leave work for `clusters` that run at the same time.
Cut spread(Cut cut, int64_t rows, int64_t directions, int64_t clusters);

struct Recurrence {
  int steps = 0, rows = 0, hidden_size = 0, directions = 0, tile_rows = 0;
  const int64_t* lengths = nullptr;   ///< [B], null: all steps
  const int64_t* position = nullptr;  ///< [T + 1] of a packed batch, null: padded
  uint32_t* arrivals = nullptr;       ///< [D, groups], zero on entry; of Reach::grid
};

template <class S, class T = Accumulator<S>>
struct RecurrentForward : Recurrence {
  struct Direction {
    const S* weight_hh = nullptr;  ///< [G*H, H]
    const S* bias_ih = nullptr;
    const S* bias_hh = nullptr;
    const T* x_product = nullptr;  ///< [N, G*H]
    const T* h0 = nullptr;         ///< [B, H], null: zeros
    const T* c0 = nullptr;
    S* y = nullptr;         ///< [N, H], y_stride apart
    S* h_n = nullptr;       ///< [B, H]
    T* c_n = nullptr;       ///< [B, H], LSTM only
    T* saved = nullptr;     ///< [N, A, H], null: not wanted
    S* exchange = nullptr;  ///< [2, groups * tile_rows, depth], zero on entry; of Reach::grid
  } direction[2];
  int64_t h0_stride = 0, c0_stride = 0, y_stride = 0;
};

template <class S, class T = Accumulator<S>>
struct RecurrentBackward : Recurrence {
  struct Direction {
    const S* weight_hh = nullptr;
    const T* saved = nullptr;
    const T* h0 = nullptr;
    const T* c0 = nullptr;
    const T* dy = nullptr;    ///< [N, H], dy_stride apart; null: zeros
    const T* dh_n = nullptr;  ///< [B, H], null: zeros
    const T* dc_n = nullptr;
    S* dgates = nullptr;       ///< [N, S*H]
    S* h_previous = nullptr;  ///< [N, H]
    T* dh0 = nullptr;         ///< [B, H]
    T* dc0 = nullptr;         ///< [B, H], LSTM only
    S* exchange = nullptr;    ///< [2, groups * tile_rows, G, depth], zero on entry; likewise
  } direction[2];
  int64_t h0_stride = 0, c0_stride = 0, dy_stride = 0;
};

template <class Cell, class S>
int recurrent_forward(const RecurrentForward<S>& run, const Cut& cut, Precision precision,
                      void* stream);
template <class Cell, class S>
int recurrent_backward(const RecurrentBackward<S>& run, const Cut& cut, Precision precision,
                       void* stream);

/// How many clusters of such a cut run at the same time; 0: the device can't run it.
template <class Cell, class S>
int recurrent_clusters(const Cut& cut, bool backward, Precision precision);

}  // namespace fusedrnn::cuda
