// Kernels whose threads have a few neighbouring features of a batch row each: their memory accesses
// and their launch.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "../cells.h"
#include "lengths.cuh"
#include "params.h"
#include "ptx.cuh"

namespace fusedrnn::cuda {

using scalar::unroll;

/// V neighbouring elements, which one access loads or stores.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T value[V];
};

template <int V, class T>
FUSEDRNN_DEVICE Vector<T, V> load(const T* p) {
  return *reinterpret_cast<const Vector<T, V>*>(p);
}
template <int V, class T>
FUSEDRNN_DEVICE Vector<T, V> load_or_zeros(const T* p) {
  return p ? load<V>(p) : Vector<T, V>{};
}
/// V elements' values; zeros for null.
template <int V, class Element, class Accum = Accumulator<Element>>
FUSEDRNN_DEVICE Vector<Accum, V> load_values(const Element* p) {
  const Vector<Element, V> elements = load_or_zeros<V>(p);
  Vector<Accum, V> values;
  unroll<V>([&](auto v) { values.value[v] = value_of(elements.value[v]); });
  return values;
}
template <int V, class T>
FUSEDRNN_DEVICE void store(T* p, const Vector<T, V>& vector) {
  *reinterpret_cast<Vector<T, V>*>(p) = vector;
}
template <int V, class Element, class Accum>
FUSEDRNN_DEVICE Vector<Element, V> rounded(const Vector<Accum, V>& vector) {
  Vector<Element, V> to;
  unroll<V>([&](auto v) { round_to(to.value[v], vector.value[v]); });
  return to;
}
/// p + offset; null stays null.
template <class T>
FUSEDRNN_DEVICE T* offset_or_null(T* p, int64_t offset) {
  return p ? p + offset : nullptr;
}

/// Whether a row has a token in the step, which may be padding.
FUSEDRNN_DEVICE bool has_token(const StepRows& p, int64_t row) { return row < p.rows; }
FUSEDRNN_DEVICE bool is_active(const StepRows& p, int64_t row) {
  return has_token(p, row) && (!p.lengths || p.lengths[row] > p.t);
}

/// A kernel whose threads have V neighbouring features of a row each.
template <int V>
struct RowKernel {
  static constexpr int kThreads = 256;
  struct Position {
    int64_t row, feature;
  };
  /// row < 0: the thread has nothing to do.
  static FUSEDRNN_DEVICE Position position(int64_t rows, int64_t features) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, per_row = features / V;
    if (i >= rows * per_row) return {-1, 0};
    if (rows * per_row <= UINT32_MAX) {  // a 64-bit division takes several times as long
      const uint32_t row = uint32_t(i) / uint32_t(per_row);
      return {row, int64_t(uint32_t(i) - row * uint32_t(per_row)) * V};
    }
    return {i / per_row, i % per_row * V};
  }
};

/// Whether all pointers and strides allow accesses of V elements. Null does.
template <int V, class T>
bool fits(std::initializer_list<const T*> pointers, std::initializer_list<int64_t> strides) {
  bool fit = true;
  for (const T* p : pointers) fit &= reinterpret_cast<uintptr_t>(p) % (V * sizeof(T)) == 0;
  for (int64_t stride : strides) fit &= stride % V == 0;
  return fit;
}

/// Launches Kernel<V> if `fit`, else Kernel<1>.
template <template <int> class Kernel, int V, class Params>
int launch_rows(const Params& params, int64_t rows, int64_t features, bool fit, void* stream) {
  const auto run = [&](auto v) {
    Kernel<v> kernel;
    kernel.p = params;
    const int64_t threads = rows * (features / v);
    if (threads == 0) return 0;
    return launch(kernel, {unsigned(scalar::divide_up(threads, Kernel<v>::kThreads))}, stream);
  };
  return fit ? run(std::integral_constant<int, V>{}) : run(std::integral_constant<int, 1>{});
}

/// Accumulators in a 16-byte access.
template <class Element>
constexpr int kVector = 16 / sizeof(Accumulator<Element>);

// ---- the forward step ---------------------------------------------------------------------------

/// The units u, u + 1, ... of a row in a forward step: loads, then GEMMs add to preacts, then
/// finish() stores.
template <class Cell, class Element, int V>
struct ForwardUnits {
  using Accum = Accumulator<Element>;
  using Params = ForwardStepParams<Element>;

  const Params& p;
  const int64_t row, u;
  const bool active;
  Vector<Accum, V> state, preacts[Cell::kPreacts] = {};

  FUSEDRNN_DEVICE ForwardUnits(const Params& params, int64_t row, int64_t u)
      : p(params), row(row), u(u), active(is_active(params, row)) {
    const int64_t H = p.hidden_size;
    if (p.is_first) {
      if (p.lengths) check_length(p.lengths[row], p.steps);
      state = load_values<V>(
          offset_or_null(Cell::kHasCellState ? p.c0 : p.h_before,
                         row * (Cell::kHasCellState ? p.c0_stride : p.h_before_stride) + u));
    } else {
      state = load<V>(p.state + row * H + u);
    }
    if (!active) return;
    unroll<Cell::kGates>([&](auto g) {
      constexpr int input = Cell::input_preact[g], hidden = Cell::hidden_preact[g];
      const int64_t bias_at = g * H + u, at = row * Cell::kGates * H + bias_at;
      const Vector<Accum, V> x = load_or_zeros<V>(offset_or_null(p.x_product, at));
      const Vector<Accum, V> h = load_or_zeros<V>(offset_or_null(p.h_product, at));
      const Vector<Accum, V> b_ih = load_values<V>(offset_or_null(p.bias_ih, bias_at));
      const Vector<Accum, V> b_hh = load_values<V>(offset_or_null(p.bias_hh, bias_at));
      unroll<V>([&](auto v) {
        preacts[input].value[v] += x.value[v] + b_ih.value[v];
        preacts[hidden].value[v] += h.value[v] + b_hh.value[v];
      });
    });
  }

  FUSEDRNN_DEVICE void finish() {
    const int64_t H = p.hidden_size;
    if (active) {
      Vector<Accum, V> out, saved[Cell::kSaved];
      unroll<V>([&](auto v) {
        Accum preact[Cell::kPreacts], of_unit[Cell::kSaved];
        unroll<Cell::kPreacts>([&](auto k) { preact[k] = preacts[k].value[v]; });
        out.value[v] = Cell::forward(preact, state.value[v], of_unit);
        unroll<Cell::kSaved>([&](auto a) { saved[a].value[v] = of_unit[a]; });
      });
      store_token(rounded<V, Element>(out), saved);
      store(p.h + row * H + u, rounded<V, Element>(out));
    } else {
      if (has_token(p, row)) store_token({}, {});
      if (p.h_before != p.h) {
        const Element* const before = offset_or_null(p.h_before, row * p.h_before_stride + u);
        store(p.h + row * H + u, load_or_zeros<V>(before));
      }
    }
    if (p.state && (active || p.is_first)) store(p.state + row * H + u, state);
    if (p.c_n) store(p.c_n + row * H + u, rounded<V, Element>(state));
  }

 private:
  using Saved = Vector<Accum, V>[Cell::kSaved];

  /// The padding gets zeros.
  FUSEDRNN_DEVICE void store_token(const Vector<Element, V>& h, const Saved& saved) const {
    const int64_t H = p.hidden_size;
    if (p.y) store(p.y + row * p.y_stride + u, h);
    if (p.saved) {
      unroll<Cell::kSaved>(
          [&](auto a) { store(p.saved + (row * Cell::kSaved + a) * H + u, saved[a]); });
    }
  }
};

}  // namespace fusedrnn::cuda
