// The kernels of a variant's steps (ops.cpp, <cell>_variant), between the GEMMs.
//
// A CTA has a batch row; the layer norms sum over it. Without norms several CTAs share a row. A
// thread has the same units in all loops of a kernel. So only the sums need barriers.
#include <algorithm>
#include <cmath>

#include "../random.h"
#include "kernel_table.h"
#include "rows.cuh"

namespace fusedrnn::cuda {
namespace {

constexpr int kLanes = 32;

/// A base for kernels whose threads have every kThreads-th unit of a row, or of the CTA's share.
struct UnitKernel {
  static constexpr int kThreads = 256, kWarps = kThreads / kLanes;

  template <class F>
  static FUSEDRNN_DEVICE void for_units(int64_t units, F&& f) {
    for (int64_t u = int64_t(blockIdx.y) * kThreads + threadIdx.x; u < units;
         u += int64_t(gridDim.y) * kThreads) {
      f(u);
    }
  }
  /// Sums over the CTA's threads in a fixed order. partial: shared memory [kWarps, n], not read
  /// since the last barrier.
  template <int n, class Accum>
  static FUSEDRNN_DEVICE void sum_over_cta(Accum (&values)[n], Accum* partial) {
    for (int mask = 1; mask < kLanes; mask *= 2) {
      unroll<n>([&](auto i) { values[i] += shuffle_xor(values[i], mask); });
    }
    if (threadIdx.x % kLanes == 0) {
      unroll<n>([&](auto i) { partial[threadIdx.x / kLanes * n + i] = values[i]; });
    }
    sync_cta();
    unroll<n>([&](auto i) { values[i] = 0; });
    for (int warp = 0; warp < kWarps; ++warp) {
      unroll<n>([&](auto i) { values[i] += partial[warp * n + i]; });
    }
  }
};

// ---- layer norm ---------------------------------------------------------------------------------

/// Values x are normalised to (x - mean) rstd.
template <class Accum>
struct Moments {
  Accum mean = 0, rstd = 1;
  FUSEDRNN_DEVICE Accum normalised(Accum x) const { return (x - mean) * rstd; }
};
/// partial: shared memory for kMomentSums sums a warp. The next call may have the same: each of its
/// halves is written a barrier after its last read.
constexpr int kMomentSums = 2;
/// Of n values a unit, value(unit, i).
template <int n, class Accum, class F>
FUSEDRNN_DEVICE Moments<Accum> moments(int64_t units, Accum* partial, F&& value) {
  Moments<Accum> found;
  Accum sum[1] = {}, squares[1] = {};
  UnitKernel::for_units(units,
                        [&](int64_t u) { unroll<n>([&](auto i) { sum[0] += value(u, i); }); });
  UnitKernel::sum_over_cta(sum, partial);
  found.mean = sum[0] / Accum(n * units);
  UnitKernel::for_units(units, [&](int64_t u) {
    unroll<n>([&](auto i) {
      const Accum d = value(u, i) - found.mean;
      squares[0] += d * d;
    });
  });
  UnitKernel::sum_over_cta(squares, partial + UnitKernel::kWarps);
  found.rstd = Accum(1) / std::sqrt(squares[0] / Accum(n * units) + Accum(kNormEps));
  return found;
}

/// A layer norm's gradient at a value: rstd (g - mean(g) - x mean(g x)). g: the gradient times the
/// scale. x: the normalised value. The sums are of g and g x.
template <class Accum>
FUSEDRNN_DEVICE Accum norm_gradient(Accum g, Accum x, Accum rstd, Accum sum, Accum slope,
                                    int64_t count) {
  return rstd * (g - sum / Accum(count) - x * (slope / Accum(count)));
}

// ---- both passes --------------------------------------------------------------------------------

/// What zoneout keeps of a value from before the step.
template <class Accum>
struct Zoneout {
  const bool* mask;
  Accum share;  ///< without a mask
  FUSEDRNN_DEVICE Accum state(int64_t at, Accum before, Accum after) const {
    if (mask) return mask[at] ? before : after;
    return share == 0 ? after : share * before + (1 - share) * after;
  }
  /// Splits a gradient into `after`'s, which is returned, and `before`'s.
  FUSEDRNN_DEVICE Accum gradient(int64_t at, Accum d, Accum& before) const {
    if (mask) {
      before = mask[at] ? d : 0;
      return mask[at] ? 0 : d;
    }
    before = share * d;
    return share == 0 ? d : (1 - share) * d;
  }
};
template <class Accum>
FUSEDRNN_DEVICE Zoneout<Accum> zoneout_h(const Variant<Accum>& v) {
  return {v.zoneout_h_mask, v.zoneout_h};
}
template <class Accum>
FUSEDRNN_DEVICE Zoneout<Accum> zoneout_c(const Variant<Accum>& v) {
  return {v.zoneout_c_mask, v.zoneout_c};
}
template <class Accum>
FUSEDRNN_DEVICE scalar::ScaledCandidate<Accum> candidate_of(const Variant<Accum>& v, int64_t at) {
  if (!v.candidate_mask) return {Accum(1)};
  return {v.candidate_mask[at] ? v.candidate_scale : Accum(0)};
}

FUSEDRNN_DEVICE bool is_active_after(const VariantStepRows& p, int64_t row) {
  return p.after >= 0 && row < p.after_rows && (!p.lengths || p.lengths[row] > p.after);
}
/// Whether the row begins again at the step after.
template <class Accum>
FUSEDRNN_DEVICE bool resets_after(const VariantStepRows& p, const Variant<Accum>& v, int64_t row) {
  return v.reset_mask && is_active_after(p, row) && v.reset_mask[p.after_token + row];
}
/// A value of an initial state; zero for null.
template <class Element>
FUSEDRNN_DEVICE Accumulator<Element> initial_value(const Element* state, int64_t at) {
  return state ? value_of(state[at]) : 0;
}
/// h as weight_hh's operand. at: in [B, P].
template <class Accum>
FUSEDRNN_DEVICE Accum masked_operand(const Variant<Accum>& v, int64_t at, Accum h) {
  return v.hidden_mask ? h * v.hidden_mask[at] : h;
}

// ---- forward ------------------------------------------------------------------------------------

template <class Element>
struct VariantInputKernel : UnitKernel {
  using Accum = Accumulator<Element>;
  VariantInputParams<Element> p;

  FUSEDRNN_DEVICE void operator()(unsigned char* memory) const {
    const int64_t token = blockIdx.x;
    if (p.lengths && p.lengths[token % p.batch] <= token / p.batch) return;
    Accum* const x = p.x_product + token * p.size;
    Accum* const saved = p.saved ? p.saved + token * p.saved_size : nullptr;
    const Moments<Accum> m =
        moments<1>(p.size, reinterpret_cast<Accum*>(memory), [&](int64_t k, auto) { return x[k]; });
    if (saved && threadIdx.x == 0) saved[p.saved_at.rstd] = m.rstd;
    for_units(p.size, [&](int64_t k) {
      const Accum value = m.normalised(x[k]);
      if (saved) saved[p.saved_at.input + k] = value;
      x[k] = value * p.norm[k] + initial_value(p.bias, k);
    });
  }
};

/// The end of a step for feature u of h. made: the step's own h, of an active row.
template <class Element, class Accum>
FUSEDRNN_DEVICE void finish_output(const VariantOutputParams<Element>& p, int64_t row, int64_t u,
                                   Accum made) {
  const Variant<Accum>& v = p.variant;
  const int64_t P = p.output_size, at = row * P + u, token = p.token + row;
  const bool active = is_active(p, row);
  Accum h = p.is_first ? initial_value(p.h0, row * p.h0_stride + u) : p.h[at];
  if (active) {
    h = zoneout_h(v).state(token * P + u, h, made);
    if (p.saved) p.saved[token * v.saved_size + p.saved_at.h + u] = h;
  }
  if (has_token(p, row)) round_to(p.y[token * p.y_stride + u], active ? h : 0);
  if (p.h_n) round_to(p.h_n[at], h);
  if (resets_after(p, v, row)) {
    h = v.reset_to_initial ? initial_value(p.h0, row * p.h0_stride + u) : 0;
  }
  p.h[at] = h;
  round_to(p.operand[at], masked_operand(v, at, h));
}

template <class Element>
struct VariantProjectionKernel : UnitKernel {
  using Accum = Accumulator<Element>;
  VariantOutputParams<Element> p;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const int64_t row = blockIdx.x, P = p.output_size;
    const bool active = is_active(p, row);
    for_units(P, [&](int64_t u) {
      finish_output(p, row, u, active ? p.projected[row * P + u] : Accum(0));
    });
  }
};

template <class Cell, class Element>
struct VariantForwardStepKernel : UnitKernel {
  using Accum = Accumulator<Element>;
  static constexpr int kSums = kMomentSums;  ///< of a warp, with layer norms
  VariantForwardStepParams<Element> p;

  FUSEDRNN_DEVICE void operator()(unsigned char* memory) const {
    const int64_t row = blockIdx.x;
    if (p.is_first && p.lengths) check_length(p.lengths[row], p.steps);
    if (is_active(p, row)) {
      step(row, reinterpret_cast<Accum*>(memory));
    } else {
      keep(row);
    }
  }

 private:
  static constexpr int G = Cell::kGates, S = Cell::kPreacts, A = Cell::kSaved;

  /// An inactive row's states stay. The padding gets zeros.
  FUSEDRNN_DEVICE void keep(int64_t row) const {
    const int64_t token = p.token + row;
    for_units(p.hidden_size, [&](int64_t u) {
      if constexpr (Cell::kHasCellState) {
        finish_cell_state(row, u, c_before(row, u));
        if (has_token(p, row)) round_to(p.cells[token * p.variant.cells_stride + u], Accum(0));
      }
      if (!p.raw) finish_output(p, row, u, Accum(0));
    });
    if (!has_token(p, row) || !p.saved) return;
    const int64_t size = p.variant.saved_size;
    for_units(size, [&](int64_t k) { p.saved[token * size + k] = 0; });
  }

  FUSEDRNN_DEVICE void step(int64_t row, Accum* partial) const {
    const Variant<Accum>& v = p.variant;
    const int64_t H = p.hidden_size, token = p.token + row;
    const Accum* const x = p.x_product + token * G * H;
    const Accum* const hidden = offset_or_null(p.h_product, row * G * H);
    Accum* const saved = offset_or_null(p.saved, token * v.saved_size);
    Moments<Accum> m;
    if (v.has_norms) {
      m = moments<G>(H, partial,
                     [&](int64_t u, auto g) { return hidden ? hidden[g * H + u] : Accum(0); });
      if (saved && threadIdx.x == 0) saved[p.saved_at.rstd + 1] = m.rstd;
    }
    for_units(H, [&](int64_t u) {
      Accum preacts[S] = {}, of_unit[A];
      unroll<G>([&](auto g) {
        const int64_t k = g * H + u;
        Accum h = hidden ? hidden[k] : 0;
        if (v.has_norms) {
          h = m.normalised(h);
          if (saved) saved[p.saved_at.hidden + k] = h;
          h *= v.norm_hh[k];
        }
        preacts[Cell::hidden_preact[g]] += h + initial_value(p.bias_hh, k);
        preacts[Cell::input_preact[g]] += x[k] + initial_value(p.bias_ih, k);
      });
      Accum state = (Cell::kHasCellState ? p.c : p.h)[row * H + u];
      const Accum out = Cell::forward(preacts, state, of_unit, candidate_of(v, token * H + u));
      if (Cell::kHasCellState && v.has_norms) {
        Accum* const to = p.scratch + row * (A + 1) * H + u;
        unroll<A>([&](auto a) { to[a * H] = of_unit[a]; });
        to[A * H] = state;
      } else {
        finish(row, u, state, out, of_unit);
      }
    });
    if constexpr (Cell::kHasCellState) {
      if (v.has_norms) step_behind_norm(row, partial);
    }
  }

  /// Normalises c, which h is made from.
  FUSEDRNN_DEVICE void step_behind_norm(int64_t row, Accum* partial) const {
    const Variant<Accum>& v = p.variant;
    const int64_t H = p.hidden_size;
    const Accum* const from = p.scratch + row * (A + 1) * H;
    Accum* const saved = offset_or_null(p.saved, (p.token + row) * v.saved_size);
    const Moments<Accum> m =
        moments<1>(H, partial, [&](int64_t u, auto) { return from[Cell::kSavedState * H + u]; });
    if (saved && threadIdx.x == 0) saved[p.saved_at.rstd + 2] = m.rstd;
    for_units(H, [&](int64_t u) {
      Accum of_unit[A];
      unroll<A>([&](auto a) { of_unit[a] = from[a * H + u]; });
      Accum& c = of_unit[Cell::kSavedState];
      c = m.normalised(c);
      if (saved) saved[p.saved_at.norm_c + u] = c;
      c = c * v.norm_c[u] + v.norm_c_bias[u];
      finish(row, u, from[A * H + u], Cell::output(of_unit), of_unit);
    });
  }

  /// The end of a step for a unit: its state, output and saved values.
  FUSEDRNN_DEVICE void finish(int64_t row, int64_t u, Accum state, Accum out,
                              const Accum (&of_unit)[A]) const {
    const Variant<Accum>& v = p.variant;
    const int64_t H = p.hidden_size, token = p.token + row;
    Accum* const saved = offset_or_null(p.saved, token * v.saved_size + u);
    if (saved) unroll<A>([&](auto a) { saved[a * H] = of_unit[a]; });
    if constexpr (Cell::kHasCellState) {
      const Accum c = zoneout_c(v).state(token * H + u, p.c[row * H + u], state);
      if (saved) saved[p.saved_at.c] = c;
      round_to(p.cells[token * v.cells_stride + u], c);
      finish_cell_state(row, u, c);
    }
    if (p.raw) {
      round_to(p.raw[row * H + u], out);
    } else {
      finish_output(p, row, u, out);
    }
  }

  FUSEDRNN_DEVICE Accum c_before(int64_t row, int64_t u) const {
    return p.is_first ? initial_value(p.c0, row * p.c0_stride + u) : p.c[row * p.hidden_size + u];
  }
  /// c for the next step.
  FUSEDRNN_DEVICE void finish_cell_state(int64_t row, int64_t u, Accum c) const {
    const int64_t at = row * p.hidden_size + u;
    if (p.c_n) round_to(p.c_n[at], c);
    if (resets_after(p, p.variant, row)) {
      c = p.variant.reset_to_initial ? initial_value(p.c0, row * p.c0_stride + u) : 0;
    }
    p.c[at] = c;
  }
};

// ---- backward -----------------------------------------------------------------------------------

/// A state's gradient behind the step, d, if the row begins again at the step after. It goes to the
/// initial state or nowhere.
template <class Accum>
FUSEDRNN_DEVICE Accum before_reset(bool resets, bool is_first, Accum* initial, int64_t at,
                                   Accum d) {
  if (initial) {
    if (is_first) {
      initial[at] = 0;
    } else if (resets) {
      initial[at] += d;
    }
  }
  return resets ? 0 : d;
}
/// The gradient of feature u of h behind the step, without dy.
template <class Element, class Accum = Accumulator<Element>>
FUSEDRNN_DEVICE Accum gradient_after(const VariantGradientParams<Element>& p, int64_t row,
                                     int64_t u) {
  const int64_t at = row * p.output_size + u;
  Accum d = p.is_first ? initial_value(p.dh_n, at) : p.dh[at];
  if (is_active_after(p, row)) d += masked_operand(p.variant, at, p.product[at]);
  return before_reset(resets_after(p, p.variant, row), p.is_first, p.reset_dh0, at, d);
}
/// The gradient of the step's own h, before zoneout. kept: the part that bypasses the step.
template <class Element, class Accum>
FUSEDRNN_DEVICE Accum output_gradient(const VariantGradientParams<Element>& p, int64_t row,
                                      int64_t u, bool active, Accum& kept) {
  const int64_t token = p.token + row;
  const Accum d = gradient_after(p, row, u);
  kept = d;
  if (!active) return 0;
  return zoneout_h(p.variant).gradient(token * p.output_size + u,
                                       d + initial_value(p.dy, token * p.dy_stride + u), kept);
}

/// The states before an active row's step. Null: zeros.
template <class Element>
struct StateBefore {
  using Accum = Accumulator<Element>;
  const bool resets;             ///< whether the row begins again
  const Accum* saved = nullptr;  ///< the token's values in the step before
  const Element* initial = nullptr;

  FUSEDRNN_DEVICE StateBefore(const VariantGradientParams<Element>& p, int64_t row,
                              const Element* state0)
      : resets(p.variant.reset_mask && p.variant.reset_mask[p.token + row]) {
    const bool has_previous =
        p.previous >= 0 && row < p.previous_rows && (!p.lengths || p.lengths[row] > p.previous);
    if (!resets && has_previous) {
      saved = p.saved + (p.previous_token + row) * p.variant.saved_size;
    } else if (!resets || p.variant.reset_to_initial) {
      initial = state0;
    }
  }
  /// saved_at: the state's place among saved values.
  FUSEDRNN_DEVICE Accum value(int64_t saved_at, int64_t u) const {
    return saved ? saved[saved_at + u] : initial_value(initial, u);
  }
};
template <class Element>
FUSEDRNN_DEVICE void store_operand(const VariantGradientParams<Element>& p, int64_t row, int64_t u,
                                   bool active) {
  using Accum = Accumulator<Element>;
  const int64_t P = p.output_size;
  Accum h = 0;
  if (active) {
    const StateBefore<Element> before(p, row, offset_or_null(p.h0, row * p.h0_stride));
    h = masked_operand(p.variant, row * P + u, before.value(p.saved_at.h, u));
  }
  round_to(p.h_previous[(p.token + row) * P + u], h);
}

template <class Element>
struct VariantProjectionBackwardKernel : UnitKernel {
  using Accum = Accumulator<Element>;
  VariantGradientParams<Element> p;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const int64_t row = blockIdx.x, P = p.output_size;
    const bool active = is_active(p, row);
    for_units(P, [&](int64_t u) {
      Accum kept;
      const Accum d = output_gradient(p, row, u, active, kept);
      p.dh[row * P + u] = kept;
      if (!has_token(p, row)) return;
      round_to(p.dr[(p.token + row) * P + u], d);
      store_operand(p, row, u, active);
    });
  }
};

/// The gradient of c behind the step, without dcells.
template <class Element>
FUSEDRNN_DEVICE Accumulator<Element> c_gradient_after(const VariantBackwardStepParams<Element>& p,
                                                      int64_t row, int64_t u) {
  const int64_t at = row * p.hidden_size + u;
  return before_reset(resets_after(p, p.variant, row), p.is_first, p.reset_dc0, at,
                      p.is_first ? initial_value(p.dc_n, at) : p.dc[at]);
}

template <class Cell, class Element>
struct VariantBackwardStepKernel : UnitKernel {
  using Accum = Accumulator<Element>;
  static constexpr int kSums = 2 + 4;  ///< of a warp, with layer norms: c's, then both GEMMs'
  VariantBackwardStepParams<Element> p;

  FUSEDRNN_DEVICE void operator()(unsigned char* memory) const {
    const int64_t row = blockIdx.x;
    if (is_active(p, row)) {
      step(row, reinterpret_cast<Accum*>(memory));
    } else {
      keep(row);
    }
  }

 private:
  static constexpr int G = Cell::kGates, S = Cell::kPreacts, A = Cell::kSaved;
  static constexpr int kStored = S + 2;  ///< scratch values of a unit: dgates, dh, dc's kept part

  /// An inactive row's gradients stay. The padding gets zeros.
  FUSEDRNN_DEVICE void keep(int64_t row) const {
    const int64_t H = p.hidden_size, token = p.token + row;
    for_units(H, [&](int64_t u) {
      if (!p.dh_raw) {
        Accum kept;
        output_gradient(p, row, u, false, kept);
        p.dh[row * H + u] = kept;
      }
      if constexpr (Cell::kHasCellState) p.dc[row * H + u] = c_gradient_after(p, row, u);
      if (!has_token(p, row)) return;
      const auto zero = [&](Element* to, int64_t at) {
        if (to) round_to(to[at], Accum(0));
      };
      unroll<S>([&](auto k) { zero(p.dgates, (token * S + k) * H + u); });
      unroll<G>([&](auto g) {
        zero(p.dhidden, (row * G + g) * H + u);
        zero(p.dinput, (token * G + g) * H + u);
      });
      if (p.dnorm_c) p.dnorm_c[token * H + u] = 0;
      if (p.dh_raw) {
        zero(p.h_raw, token * H + u);
      } else {
        store_operand(p, row, u, false);
      }
    });
  }

  /// Gradients of the cell's own states: h's, and c's if it has one. kept: the part of the state's
  /// gradient that bypasses the cell.
  struct StateGradients {
    Accum dh, dstate, kept;
  };
  FUSEDRNN_DEVICE StateGradients end_of_step(int64_t row, int64_t u) const {
    const int64_t H = p.hidden_size, token = p.token + row;
    StateGradients d = {};
    if (p.dh_raw) {
      d.dh = p.dh_raw[row * H + u];
    } else {
      d.dh = output_gradient(p, row, u, true, d.kept);
    }
    if constexpr (Cell::kHasCellState) {
      if (!p.dh_raw) p.dh[row * H + u] = d.kept;
      const Accum dc =
          c_gradient_after(p, row, u) + initial_value(p.dcells, token * p.variant.cells_stride + u);
      d.dstate = zoneout_c(p.variant).gradient(token * H + u, dc, d.kept);
    }
    return d;
  }
  FUSEDRNN_DEVICE void load_saved(Accum (&to)[A], int64_t row, int64_t u) const {
    const Accum* const saved = p.saved + (p.token + row) * p.variant.saved_size + u;
    unroll<A>([&](auto a) { to[a] = saved[a * p.hidden_size]; });
  }
  FUSEDRNN_DEVICE Accum* scratch_of(int64_t row, int64_t u) const {
    return p.scratch + row * kStored * p.hidden_size + u;
  }

  FUSEDRNN_DEVICE void step(int64_t row, Accum* partial) const {
    if (!p.variant.has_norms) {
      for_units(p.hidden_size, [&](int64_t u) {
        Accum dgates[S];
        cell_backward(row, u, end_of_step(row, u), dgates);
        if (!p.dhidden) return;
        unroll<G>([&](auto g) {
          round_to(p.dhidden[(row * G + g) * p.hidden_size + u], dgates[Cell::hidden_preact[g]]);
        });
      });
      return;
    }
    step_with_norms(row, partial);
  }

  /// The cell's own backward pass for a unit.
  FUSEDRNN_DEVICE void cell_backward(int64_t row, int64_t u, const StateGradients& d,
                                     Accum (&dgates)[S]) const {
    const int64_t H = p.hidden_size, token = p.token + row;
    Accum saved[A], prepared[Cell::kPrepared], dstate = d.dstate;
    load_saved(saved, row, u);
    const Element* const state0 = Cell::kHasCellState ? offset_or_null(p.c0, row * p.c0_stride)
                                                      : offset_or_null(p.h0, row * p.h0_stride);
    const Accum before = StateBefore<Element>(p, row, state0)
                             .value(Cell::kHasCellState ? p.saved_at.c : p.saved_at.h, u);
    Cell::prepare(saved, before, prepared, candidate_of(p.variant, token * H + u));
    if constexpr (Cell::kHasCellState) {
      if (p.variant.has_norms) prepared[Cell::kPreparedOutput] = 0;  // it went through the norm
    }
    Cell::backward(prepared, d.dh, dstate, dgates);
    (Cell::kHasCellState ? p.dc : p.dh)[row * H + u] = dstate + d.kept;
    unroll<S>([&](auto k) { round_to(p.dgates[(token * S + k) * H + u], dgates[k]); });
    if (p.dh_raw) {
      round_to(p.h_raw[token * H + u], Cell::output(saved));
    } else {
      store_operand(p, row, u, true);
    }
  }

  FUSEDRNN_DEVICE void step_with_norms(int64_t row, Accum* partial) const {
    const Variant<Accum>& v = p.variant;
    const int64_t H = p.hidden_size, token = p.token + row;
    const Accum* const saved = p.saved + token * v.saved_size;
    const Accum* const rstd = saved + p.saved_at.rstd;
    Accum of_c[2] = {};
    if constexpr (Cell::kHasCellState) {
      for_units(H, [&](int64_t u) {
        const StateGradients d = end_of_step(row, u);
        Accum of_unit[A], prepared[Cell::kPrepared];
        load_saved(of_unit, row, u);
        Cell::prepare(of_unit, Accum(0), prepared);
        const Accum dnorm = d.dh * prepared[Cell::kPreparedOutput], g = dnorm * v.norm_c[u];
        p.dnorm_c[token * H + u] = dnorm;
        of_c[0] += g;
        of_c[1] += g * saved[p.saved_at.norm_c + u];
        Accum* const to = scratch_of(row, u);
        to[0] = d.dh;
        to[H] = d.kept;
        p.dc[row * H + u] = d.dstate;
      });
      sum_over_cta(of_c, partial);
    }
    Accum sums[4] = {};
    for_units(H, [&](int64_t u) {
      Accum* const to = scratch_of(row, u);
      StateGradients d;
      if constexpr (Cell::kHasCellState) {
        const Accum g = p.dnorm_c[token * H + u] * v.norm_c[u];
        d = {to[0], p.dc[row * H + u], to[H]};
        d.dstate += norm_gradient(g, saved[p.saved_at.norm_c + u], rstd[2], of_c[0], of_c[1], H);
      } else {
        d = end_of_step(row, u);
      }
      Accum dgates[S];
      cell_backward(row, u, d, dgates);
      unroll<S>([&](auto k) { to[(2 + k) * H] = dgates[k]; });
      unroll<G>([&](auto g) {
        const int64_t k = g * H + u;
        const Accum of_input = dgates[Cell::input_preact[g]] * v.norm_ih[k];
        const Accum of_hidden = dgates[Cell::hidden_preact[g]] * v.norm_hh[k];
        sums[0] += of_input;
        sums[1] += of_input * saved[p.saved_at.input + k];
        sums[2] += of_hidden;
        sums[3] += of_hidden * saved[p.saved_at.hidden + k];
      });
    });
    sum_over_cta(sums, partial + 2 * kWarps);
    // Where h before the step is a constant, the GEMM's zeros have a rstd of 316, and its gradient
    // could overflow a half type.
    const StateBefore<Element> before(p, row, offset_or_null(p.h0, row * p.h0_stride));
    const bool to_initial = !before.resets || v.reset_to_initial;
    const bool is_constant = !before.saved && !before.initial && !(to_initial && p.wants_dh0);
    for_units(H, [&](int64_t u) {
      const Accum* const dgates = scratch_of(row, u) + 2 * H;
      unroll<G>([&](auto g) {
        const int64_t k = g * H + u;
        const Accum of_input = dgates[Cell::input_preact[g] * H] * v.norm_ih[k];
        const Accum of_hidden = dgates[Cell::hidden_preact[g] * H] * v.norm_hh[k];
        round_to(p.dinput[token * G * H + k], norm_gradient(of_input, saved[p.saved_at.input + k],
                                                            rstd[0], sums[0], sums[1], G * H));
        const Accum d = norm_gradient(of_hidden, saved[p.saved_at.hidden + k], rstd[1], sums[2],
                                      sums[3], G * H);
        round_to(p.dhidden[row * G * H + k], is_constant ? Accum(0) : d);
      });
    });
  }
};

template <class Element>
struct VariantInitialGradientsKernel : UnitKernel {
  using Accum = Accumulator<Element>;
  VariantBackwardStepParams<Element> p;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const int64_t row = blockIdx.x, P = p.output_size, H = p.hidden_size;
    if (p.dh0) {
      for_units(P, [&](int64_t u) {
        const Accum d = gradient_after(p, row, u);
        store(p.dh0, p.reset_dh0, row * P + u, d);
      });
    }
    if (p.dc0) {
      for_units(H, [&](int64_t u) {
        const Accum d = c_gradient_after(p, row, u);
        store(p.dc0, p.reset_dc0, row * H + u, d);
      });
    }
  }

 private:
  static FUSEDRNN_DEVICE void store(Element* to, const Accum* resets, int64_t at, Accum d) {
    round_to(to[at], resets ? resets[at] + d : d);
  }
};

// ---- random masks -------------------------------------------------------------------------------

/// A thread has a counter.
struct RandomMaskKernel {
  static constexpr int kThreads = 256;
  RandomMaskParams p;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    using namespace scalar;
    const int64_t counter = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t first =
        counter / kMaskCounters * kMaskBlock + counter % kMaskCounters;  // a word's value
    if (first >= p.count) return;
    uint32_t word[4] = {uint32_t(counter), uint32_t(uint64_t(counter) >> 32), 0, 0};
    PhiloxKey key(uint64_t(*p.seed));
    for (int round = 0; round < kPhiloxRounds; ++round) {
      philox_round(word[0], word[1], word[2], word[3], key);
      key.advance();
    }
    unroll<4>([&](auto w) {
      const int64_t at = first + w * kMaskCounters;
      if (at < p.count) p.out[at] = p.all || word[w] < p.threshold;
    });
  }
};

// ---- launches -----------------------------------------------------------------------------------

/// A CTA a row, with shared memory for `sums` sums a warp; without sums, as many as its units need.
template <class Kernel, class Params>
int launch_units(const Params& params, int64_t rows, int64_t units, int sums, void* stream) {
  if (rows == 0) return 0;
  Kernel kernel;
  kernel.p = params;
  Grid grid{unsigned(rows)};
  if (sums > 0) {
    grid.shared = size_t(sums * Kernel::kWarps) * sizeof(typename Kernel::Accum);
  } else {
    constexpr int64_t kMost = 65535;  // of a grid in y
    grid.y = unsigned(std::min(scalar::divide_up(units, Kernel::kThreads), kMost));
  }
  return launch(kernel, grid, stream);
}

template <class Cell, class Element>
int forward_step(const VariantForwardStepParams<Element>& p, void* stream) {
  using Kernel = VariantForwardStepKernel<Cell, Element>;
  return launch_units<Kernel>(p, p.all_rows, p.hidden_size, p.variant.has_norms ? Kernel::kSums : 0,
                              stream);
}
template <class Cell, class Element>
int backward_step(const VariantBackwardStepParams<Element>& p, void* stream) {
  using Kernel = VariantBackwardStepKernel<Cell, Element>;
  return launch_units<Kernel>(p, p.all_rows, p.hidden_size, p.variant.has_norms ? Kernel::kSums : 0,
                              stream);
}

template <class Element, class... Cell>
const VariantKernels<Element>& variant_kernels_of(int cell, scalar::CellList<Cell...>) {
  static constexpr VariantKernels<Element> table[] = {
      {&forward_step<Cell, Element>, &backward_step<Cell, Element>}...};
  return table[cell];
}

}  // namespace

template <class Element>
const VariantKernels<Element>& variant_kernels(int cell) {
  return variant_kernels_of<Element>(cell, scalar::Cells());
}
template <class Element>
int variant_input(const VariantInputParams<Element>& p, void* stream) {
  return launch_units<VariantInputKernel<Element>>(p, p.tokens, p.size, kMomentSums, stream);
}
template <class Element>
int variant_projection(const VariantOutputParams<Element>& p, void* stream) {
  return launch_units<VariantProjectionKernel<Element>>(p, p.all_rows, p.output_size, 0, stream);
}
template <class Element>
int variant_projection_backward(const VariantGradientParams<Element>& p, void* stream) {
  return launch_units<VariantProjectionBackwardKernel<Element>>(p, p.all_rows, p.output_size, 0,
                                                                stream);
}
template <class Element>
int variant_initial_gradients(const VariantBackwardStepParams<Element>& p, void* stream) {
  return launch_units<VariantInitialGradientsKernel<Element>>(
      p, p.all_rows, std::max(p.hidden_size, p.output_size), 0, stream);
}

int random_mask(const RandomMaskParams& p, void* stream) {
  if (p.count == 0) return 0;
  RandomMaskKernel kernel;
  kernel.p = p;
  const int64_t counters = scalar::divide_up(p.count, scalar::kMaskBlock) * scalar::kMaskCounters;
  return launch(kernel, {unsigned(scalar::divide_up(counters, RandomMaskKernel::kThreads))},
                stream);
}

#define FUSEDRNN_VARIANTS_OF(Element)                                                     \
  template const VariantKernels<Element>& variant_kernels(int);                           \
  template int variant_input(const VariantInputParams<Element>&, void*);                  \
  template int variant_projection(const VariantOutputParams<Element>&, void*);            \
  template int variant_projection_backward(const VariantGradientParams<Element>&, void*); \
  template int variant_initial_gradients(const VariantBackwardStepParams<Element>&, void*);
FUSEDRNN_VARIANTS_OF(float)
FUSEDRNN_VARIANTS_OF(double)
FUSEDRNN_VARIANTS_OF(BFloat16)
FUSEDRNN_VARIANTS_OF(Float16)

}  // namespace fusedrnn::cuda
