// Kernels for variants of a recurrence (ops.cpp, <cell>_variant): resets, recurrent dropout,
// zoneout, layer norm, the cell states of all steps.
//
// A step's operand is made from h at the end of the step before: h, or where the row begins again
// the initial state, times the mask. Zoneout is the step's last line. The GEMMs are the plain
// cell's.
//
// Layer norm needs all units of a row between the GEMM and the cell. One thread then runs all
// blocks of a step.
//
// Included at the end of cell_kernels.h.
#pragma once

#include "../random.h"

namespace fusedrnn::FUSEDRNN_TARGET {

// ---- both passes --------------------------------------------------------------------------------

/// A byte for each lane.
template <class Accum>
struct LaneBytes;
template <>
struct LaneBytes<float> {
  typedef unsigned char type __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES / 4)));
};
template <>
struct LaneBytes<double> {
  typedef unsigned char type __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES / 8)));
};

/// 1 where a mask is true, for its first n values.
template <class Accum>
FUSEDRNN_INLINE Vec<Accum> load_mask(const bool* p, int64_t n) {
  constexpr int L = kLanes<Accum>;
  typename LaneBytes<Accum>::type bytes = {};
  if (n >= L) {
    __builtin_memcpy(&bytes, p, L);
  } else {
    for (int64_t l = 0; l < n; ++l) bytes[l] = p[l];
  }
  return __builtin_convertvector(bytes, Vec<Accum>);
}
/// A select: an infinite or undefined value that is not taken leaves no trace.
template <class V>
FUSEDRNN_INLINE V where(V mask, V a, V b) {
  return mask != V{} ? a : b;
}

/// A mask's values from `at` on, or a share without a mask: what zoneout keeps.
template <class Accum>
struct Zoneout {
  const bool* mask;
  Accum share;
  FUSEDRNN_INLINE bool is_there() const { return mask || share != 0; }
  FUSEDRNN_INLINE Vec<Accum> state(int64_t at, int64_t n, Vec<Accum> before,
                                   Vec<Accum> after) const {
    if (mask) return where(load_mask<Accum>(mask + at, n), before, after);
    return share == 0 ? after : share * before + (1 - share) * after;
  }
  /// Splits a gradient into `after`'s, which is returned, and `before`'s.
  FUSEDRNN_INLINE Vec<Accum> gradient(int64_t at, int64_t n, Vec<Accum> d,
                                      Vec<Accum>& before) const {
    if (mask) {
      const Vec<Accum> keeps = load_mask<Accum>(mask + at, n);
      before = where(keeps, d, Vec<Accum>{});
      return where(keeps, Vec<Accum>{}, d);
    }
    before = share * d;
    return share == 0 ? d : (1 - share) * d;
  }
};
template <class Accum>
FUSEDRNN_INLINE Zoneout<Accum> zoneout_h(const Variant<Accum>& v) {
  return {v.zoneout_h_mask, v.zoneout_h};
}
template <class Accum>
FUSEDRNN_INLINE Zoneout<Accum> zoneout_c(const Variant<Accum>& v) {
  return {v.zoneout_c_mask, v.zoneout_c};
}

template <class Run>
FUSEDRNN_INLINE bool resets(const Run& s, int64_t t, int64_t j) {
  const bool* const mask = s.variant->reset_mask;
  return mask && mask[s.step_offset[t] + s.row[j]];
}
/// Whether row j has a step after t, and begins again there.
template <class Run>
FUSEDRNN_INLINE bool resets_after(const Run& s, int64_t t, int64_t j) {
  const int64_t next = step_after(s, t);
  return next >= 0 && j < s.active[next] && resets(s, next, j);
}
/// A state's vector from `unit` on in a row that begins again. state0: the row's initial state.
template <class Accum>
FUSEDRNN_INLINE Vec<Accum> reset_state(const Variant<Accum>& v, const Accum* state0, int64_t unit,
                                       int64_t n) {
  return v.reset_to_initial && state0 ? load(state0 + unit, n) : Vec<Accum>{};
}
/// h as weight_hh's operand.
template <class Accum>
FUSEDRNN_INLINE Vec<Accum> masked_operand(const Variant<Accum>& v, int64_t at, int64_t n,
                                          Vec<Accum> h) {
  return v.hidden_mask ? h * load(v.hidden_mask + at, n) : h;
}
template <class Accum>
FUSEDRNN_INLINE ScaledCandidate<Vec<Accum>> candidate_of(const Variant<Accum>& v, int64_t at,
                                                         int64_t n) {
  if (!v.candidate_mask) return {Vec<Accum>{} + Accum(1)};
  return {load_mask<Accum>(v.candidate_mask + at, n) * v.candidate_scale};
}

// ---- random masks -------------------------------------------------------------------------------

/// A mask's values [first, first + count); `first` is a multiple of kMaskBlock.
inline void random_mask(uint64_t seed, int64_t first, int64_t count, uint32_t threshold,
                        bool* out) {
  for (int64_t at = 0; at < count; at += kMaskBlock) {
    const uint64_t counter = uint64_t(first + at) / 4;
    uint32_t word[4][kMaskCounters];
    for (int l = 0; l < kMaskCounters; ++l) {
      word[0][l] = uint32_t(counter + uint64_t(l));
      word[1][l] = uint32_t((counter + uint64_t(l)) >> 32);
      word[2][l] = word[3][l] = 0;
    }
    PhiloxKey key(seed);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int l = 0; l < kMaskCounters; ++l) {
        philox_round(word[0][l], word[1][l], word[2][l], word[3][l], key);
      }
      key.advance();
    }
    unsigned char values[kMaskBlock];
    for (int w = 0; w < 4; ++w) {
      for (int l = 0; l < kMaskCounters; ++l) {
        values[w * kMaskCounters + l] = word[w][l] < threshold;
      }
    }
    __builtin_memcpy(out + at, values, size_t(smaller(kMaskBlock, count - at)));
  }
}

// ---- layer norm ---------------------------------------------------------------------------------

template <class Accum>
FUSEDRNN_INLINE Accum sum_of_lanes(Vec<Accum> v) {
  Accum sum = 0;
  for (int l = 0; l < kLanes<Accum>; ++l) sum += v[l];
  return sum;
}
/// The sum of f(vector, i) over vectors of the n values; f gets a count of valid lanes, and gives
/// zeros in others.
template <class Accum, class F>
FUSEDRNN_INLINE Accum sum_over(int64_t n, F&& f) {
  Vec<Accum> sum = {};
  for (int64_t i = 0; i < n; i += kLanes<Accum>) sum += f(i, n - i);
  return sum_of_lanes<Accum>(sum);
}
template <class Accum>
FUSEDRNN_INLINE Vec<Accum> first_of(Vec<Accum> v, int64_t n) {
  for (int64_t l = n; l < kLanes<Accum>; ++l) v[l] = 0;
  return v;
}
/// Normalises n values in place; gives the reciprocal of their standard deviation.
template <class Accum>
FUSEDRNN_INLINE Accum normalise(Accum* x, int64_t n) {
  constexpr int L = kLanes<Accum>;
  const Accum mean =
      sum_over<Accum>(n, [&](int64_t i, int64_t left) { return load(x + i, left); }) / Accum(n);
  const Accum squares = sum_over<Accum>(n, [&](int64_t i, int64_t left) {
    const Vec<Accum> d = first_of<Accum>(load(x + i, left) - mean, left);
    return d * d;
  });
  const auto rstd = Accum(1 / __builtin_sqrt(double(squares / Accum(n)) + kNormEps));
  for (int64_t i = 0; i < n; i += L) store(x + i, (load(x + i, n - i) - mean) * rstd, n - i);
  return rstd;
}
/// A layer norm's gradient: out = rstd (g - mean(g) - x mean(g x)), g the gradient times the scale.
/// x: the normalised values. The gradient is gradient(i, left), from i on.
template <class Accum, class Gradient>
FUSEDRNN_INLINE void normalise_backward(int64_t n, const Accum* x, const Accum* scale, Accum rstd,
                                        Gradient&& gradient, Accum* out) {
  const auto g = [&](int64_t i, int64_t left)
                     FUSEDRNN_LAMBDA { return gradient(i, left) * load(scale + i, left); };
  const Accum mean =
      sum_over<Accum>(n, [&](int64_t i, int64_t left) { return g(i, left); }) / Accum(n);
  const Accum slope =
      sum_over<Accum>(n, [&](int64_t i, int64_t left) { return g(i, left) * load(x + i, left); }) /
      Accum(n);
  for (int64_t i = 0; i < n; i += kLanes<Accum>) {
    store(out + i, rstd * (g(i, n - i) - mean - load(x + i, n - i) * slope), n - i);
  }
}

/// sums += a b, or += a without b.
template <class Accum>
FUSEDRNN_INLINE void add_products(int64_t n, const Accum* a, const Accum* b, Accum* sums) {
  for (int64_t i = 0; i < n; i += kLanes<Accum>) {
    Vec<Accum> product = load(a + i, n - i);
    if (b) product *= load(b + i, n - i);
    store(sums + i, load(sums + i, n - i) + product, n - i);
  }
}

/// The layer norm of tokens [begin, end) of weight_ih x, [N, G*H] in place, and the biases.
template <class Cell, class Accum>
void variant_input(const Forward<Accum>& s, Accum* x_product, int64_t begin, int64_t end) {
  constexpr int L = kLanes<Accum>;
  const Variant<Accum>& v = *s.variant;
  const int64_t H = s.hidden_size, n = Cell::kGates * H;
  const SavedVariant& at = v.saved_at;
  for (int64_t token = begin; token < end; ++token) {
    Accum* const x = x_product + token * s.x_product_stride;
    const Accum rstd = normalise(x, n);
    if (s.saved) {
      Accum* const saved = s.saved + token * v.saved_size;
      copy_row(saved + at.input, static_cast<const Accum*>(x), n, n);
      saved[at.rstd] = rstd;
    }
    for (int64_t i = 0; i < n; i += L) {
      Vec<Accum> y = load(x + i, n - i) * load(v.norm_ih + i, n - i);
      if (v.bias_ih) y += load(v.bias_ih + i, n - i);
      store(x + i, y, n - i);
    }
  }
}

// ---- forward ------------------------------------------------------------------------------------

template <class Cell, class Accum>
struct VariantForwardState : ForwardState<Accum> {
  explicit VariantForwardState(const Forward<Accum>& s)
      : ForwardState<Accum>(s),
        sums_size(padded<Accum>(Cell::kGates * s.hidden_size)),
        kept(s.workspace + forward_workspace<Accum>(s)),
        sums(kept + s.rows * this->h_size),
        cell(sums + s.rows * sums_size) {}
  int64_t sums_size;
  Accum* kept;  ///< [rows, h_size] h before the next step, unmasked
  Accum* sums;  ///< [rows, sums_size] with layer norms: weight_hh h
  Accum* cell;  ///< [kSaved, state_size] with layer norms: a row's values before c's norm
};

template <class Cell, class Accum>
int64_t variant_forward_workspace(const Sequence<Accum>& s) {
  const int64_t H = padded<Accum>(s.hidden_size), P = padded<Accum>(s.output_size);
  return forward_workspace<Accum>(s) + s.rows * (P + padded<Accum>(Cell::kGates * s.hidden_size)) +
         (Cell::kSaved + 1) * H;
}

/// Stores h for the step after t: as zoneout keeps it, and as an operand.
template <class Cell, class Accum>
FUSEDRNN_INLINE Vec<Accum> store_next_h(const Forward<Accum>& s,
                                        const VariantForwardState<Cell, Accum>& m, int64_t i,
                                        int64_t j, int64_t unit, bool begins_again, Vec<Accum> h) {
  const int64_t row = s.row[j], n = s.output_size - unit;
  if (begins_again) h = reset_state(*s.variant, row_of(s.h0, row, s.h0_stride), unit, n);
  store(m.kept + j * m.h_size + unit, h);
  store(m.h[(i + 1) % 2] + j * m.h_size + unit,
        masked_operand(*s.variant, row * s.output_size + unit, n, h));
  return h;
}

/// The end of a step for a vector of row j's units. state_before, state, out: c and h, or h twice
/// without a cell state; `out` before a projection.
template <class Cell, class Accum>
FUSEDRNN_INLINE void finish_units(const Forward<Accum>& s,
                                  const VariantForwardState<Cell, Accum>& m, int64_t i, int64_t t,
                                  int64_t j, int64_t unit, Vec<Accum> state_before,
                                  Vec<Accum> state, Vec<Accum> out,
                                  const Vec<Accum> (&saved)[Cell::kSaved]) {
  const Variant<Accum>& v = *s.variant;
  const int64_t H = s.hidden_size, row = s.row[j], token = s.step_offset[t] + row, n = H - unit;
  const bool begins_again = resets_after(s, t, j);
  const SavedVariant& at = v.saved_at;
  Accum* const to = s.saved ? s.saved + token * v.saved_size + unit : nullptr;
  if (to) unroll<Cell::kSaved>([&](auto a) FUSEDRNN_LAMBDA { store(to + a * H, saved[a], n); });
  Accum* const state_at = m.state + j * m.state_size + unit;
  if constexpr (Cell::kHasCellState) {
    const Vec<Accum> c = zoneout_c(v).state(token * H + unit, n, state_before, state);
    if (to && at.keeps_c) store(to + at.c, c, n);
    if (v.cells) store(v.cells + token * v.cells_stride + unit, c, n);
    const Accum* const c0 = row_of(s.c0, row, s.c0_stride);
    store(state_at, begins_again ? reset_state(v, c0, unit, n) : c);
  }
  if (m.raw) return store(m.raw + j * m.state_size + unit, out);
  const Vec<Accum> before = load(m.kept + j * m.h_size + unit);
  const Vec<Accum> h = zoneout_h(v).state(token * H + unit, n, before, out);
  store(s.y + token * s.y_stride + unit, h, n);
  if (to && at.keeps_h) store(to + at.h, h, n);
  const Vec<Accum> next = store_next_h(s, m, i, j, unit, begins_again, h);
  if constexpr (!Cell::kHasCellState) store(state_at, next);
}

/// Not inlined: the plain cell's code does not grow by it.
template <class Cell, class Accum>
FUSEDRNN_NOINLINE void variant_units(const Forward<Accum>& s,
                                     const VariantForwardState<Cell, Accum>& m, int64_t i,
                                     int64_t t, int64_t j, int64_t unit,
                                     const Vec<Accum>* preacts) {
  const int64_t H = s.hidden_size, token = s.step_offset[t] + s.row[j];
  const Vec<Accum> before = load(m.state + j * m.state_size + unit);
  Vec<Accum> state = before, saved[Cell::kSaved];
  const Vec<Accum> out =
      Cell::forward(preacts, state, saved, candidate_of(*s.variant, token * H + unit, H - unit));
  finish_units<Cell>(s, m, i, t, j, unit, before, state, out, saved);
}

/// A row's cell behind the layer norm of weight_hh h, in m.sums.
template <class Cell, class Accum>
FUSEDRNN_NOINLINE void variant_row(const Forward<Accum>& s,
                                   const VariantForwardState<Cell, Accum>& m, int64_t i, int64_t t,
                                   int64_t j) {
  constexpr int L = kLanes<Accum>, G = Cell::kGates, S = Cell::kPreacts;
  const Variant<Accum>& v = *s.variant;
  const int64_t H = s.hidden_size, token = s.step_offset[t] + s.row[j];
  const SavedVariant& at = v.saved_at;
  Accum* const hidden = m.sums + j * m.sums_size;
  Accum* const saved_row = s.saved ? s.saved + token * v.saved_size : nullptr;
  const Accum* const x = s.x_product + token * s.x_product_stride;
  const Accum rstd = normalise(hidden, G * H);
  if (saved_row) {
    copy_row(saved_row + at.hidden, static_cast<const Accum*>(hidden), G * H, G * H);
    saved_row[at.rstd + 1] = rstd;
  }
  for (int64_t unit = 0; unit < H; unit += L) {
    const int64_t n = H - unit;
    Vec<Accum> preacts[S] = {};
    unroll<G>([&](auto g) FUSEDRNN_LAMBDA {
      constexpr int to = Cell::hidden_preact[g], from = Cell::input_preact[g];
      const int64_t place = g * H + unit;
      Vec<Accum> h = load(hidden + place, n) * load(v.norm_hh + place, n);
      if (v.bias_hh) h += load(v.bias_hh + place, n);
      preacts[to] += h;
      preacts[from] += load(x + place, n);
    });
    const Vec<Accum> before = load(m.state + j * m.state_size + unit);
    Vec<Accum> state = before, saved[Cell::kSaved];
    const Vec<Accum> out =
        Cell::forward(preacts, state, saved, candidate_of(v, token * H + unit, n));
    if constexpr (Cell::kHasCellState) {
      unroll<Cell::kSaved>(
          [&](auto a) FUSEDRNN_LAMBDA { store(m.cell + a * m.state_size + unit, saved[a]); });
      store(m.cell + Cell::kSaved * m.state_size + unit, state);
    } else {
      finish_units<Cell>(s, m, i, t, j, unit, before, state, out, saved);
    }
  }
  if constexpr (Cell::kHasCellState) {
    Accum* const c = m.cell + Cell::kSavedState * m.state_size;
    const Accum rstd_c = normalise(c, H);
    if (saved_row) {
      copy_row(saved_row + at.norm_c, static_cast<const Accum*>(c), H, H);
      saved_row[at.rstd + 2] = rstd_c;
    }
    for (int64_t unit = 0; unit < H; unit += L) {
      const int64_t n = H - unit;
      Vec<Accum> saved[Cell::kSaved];
      unroll<Cell::kSaved>(
          [&](auto a) FUSEDRNN_LAMBDA { saved[a] = load(m.cell + a * m.state_size + unit); });
      saved[Cell::kSavedState] =
          saved[Cell::kSavedState] * load(v.norm_c + unit, n) + load(v.norm_c_bias + unit, n);
      const Vec<Accum> before = load(m.state + j * m.state_size + unit);
      const Vec<Accum> state = load(m.cell + Cell::kSaved * m.state_size + unit);
      finish_units<Cell>(s, m, i, t, j, unit, before, state, Cell::output(saved), saved);
    }
  }
}

template <class Cell, int R, int B, class Accum>
FUSEDRNN_INLINE void variant_tile(const Forward<Accum>& s,
                                  const VariantForwardState<Cell, Accum>& m, int64_t i, int64_t t,
                                  int64_t block, int64_t first) {
  constexpr int L = kLanes<Accum>, S = Cell::kPreacts;
  const int64_t H = s.hidden_size;
  Tile<Accum, R, B * S> tile;
  accumulate_preacts<Cell, R, B, Accum, Accum>(s, m, i, t, block, first, tile);
  Vec<Accum> preacts[R][B][S];
  unroll<R>([&](auto r) FUSEDRNN_LAMBDA {
    unroll<B * S>([&](auto c) FUSEDRNN_LAMBDA { preacts[r][c / S][c % S] = tile[r][c]; });
  });
#pragma GCC unroll 1
  for (int part = 0; part < R * B; ++part) {
    const int r = part / B, b = part % B;
    const int64_t j = first + r, unit = (block + b) * L;
    if (!s.variant->has_norms) {
      variant_units<Cell>(s, m, i, t, j, unit, preacts[r][b]);
      continue;
    }
    for (int g = 0; g < Cell::kGates; ++g) {
      store(m.sums + j * m.sums_size + g * H + unit, preacts[r][b][Cell::hidden_preact[g]],
            H - unit);
    }
  }
}

template <class Cell, class Accum>
void variant_forward_begin(const Forward<Accum>& s) {
  const VariantForwardState<Cell, Accum> m(s);
  const Variant<Accum>& v = *s.variant;
  const int64_t H = s.hidden_size, P = s.output_size;
  for (int64_t j = 0; j < s.rows; ++j) {
    int64_t first = s.reverse ? s.steps - 1 : 0;
    while (first >= 0 && j >= s.active[first]) first = s.reverse ? first - 1 : -1;
    const bool to_zero = first >= 0 && resets(s, first, j) && !v.reset_to_initial;
    const Accum* const h0 = to_zero ? nullptr : row_of(s.h0, s.row[j], s.h0_stride);
    for (int64_t u = 0; u < m.h_size; u += kLanes<Accum>) {
      const Vec<Accum> h = h0 ? load(h0 + u, P - u) : Vec<Accum>{};
      store(m.kept + j * m.h_size + u, h);
      for (Accum* const operands : {m.h[0], m.h[1]}) {
        store(operands + j * m.h_size + u,
              u < P ? masked_operand(v, s.row[j] * P + u, P - u, h) : h);
      }
    }
    copy_row(m.state + j * m.state_size, to_zero ? nullptr : initial_state<Cell>(s, s.row[j]), H,
             m.state_size);
  }
  // Rows of length zero.
  finish_rows<Cell, Accum>(s, m, -1, s.active[0], s.rows, 0, blocks_of<Accum>(H));
}

template <class Cell, class Accum>
void variant_forward_step(const Forward<Accum>& run, int64_t i, int64_t block_begin,
                          int64_t block_end) {
  const VariantForwardState<Cell, Accum> m(run);
  const Variant<Accum>& v = *run.variant;
  const int64_t P = run.output_size, H = run.hidden_size;
  const int64_t t = run.reverse ? run.steps - 1 - i : i, rows = run.active[t];
  Forward<Accum> s = run;
  if (v.has_norms) {  // the input's part is added behind the norm
    s.x_product = nullptr;
    s.input_size = 0;
  }
  for_block_tiles<Cell>(
      s.panels, i % 2, block_begin, block_end, [&](auto B, int64_t block) FUSEDRNN_LAMBDA {
        for_tiles<kRowsOf<Accum, Accum>>(rows, [&](auto R, int64_t first) FUSEDRNN_LAMBDA {
          variant_tile<Cell, R, B>(s, m, i, t, block, first);
        });
      });
  if (v.has_norms) {
    for (int64_t j = 0; j < rows; ++j) variant_row<Cell>(run, m, i, t, j);
  }
  if (m.raw) {
    Accum* const h = m.h[(i + 1) % 2];
    gemm<Accum>(rows, H, P, s.projection_panels, 0, m.raw, m.state_size, h, m.h_size, false);
    const SavedVariant& at = v.saved_at;
    for (int64_t j = 0; j < rows; ++j) {
      const int64_t token = s.step_offset[t] + s.row[j];
      const bool begins_again = resets_after(s, t, j);
      for (int64_t u = 0; u < P; u += kLanes<Accum>) {
        const Vec<Accum> after = zoneout_h(v).state(
            token * P + u, P - u, load(m.kept + j * m.h_size + u), load(h + j * m.h_size + u));
        store(s.y + token * s.y_stride + u, after, P - u);
        if (s.saved) store(s.saved + token * v.saved_size + at.h + u, after, P - u);
        store_next_h(s, m, i, j, u, begins_again, after);
      }
    }
  }
  const int64_t next = step_after(s, t);
  finish_rows<Cell, Accum>(run, m, t, next < 0 ? 0 : s.active[next], rows, block_begin, block_end);
}

// ---- backward -----------------------------------------------------------------------------------

template <class Cell, class Accum>
struct VariantBackwardState : BackwardState<Accum> {
  explicit VariantBackwardState(const Backward<Accum>& s)
      : BackwardState<Accum>(s), kept(s.workspace + backward_workspace<Accum>(s)) {}
  Accum* kept;  ///< [rows, dh_size] gradient of h that zoneout kept
};

template <class Cell, class Accum>
int64_t variant_backward_workspace(const Sequence<Accum>& s) {
  return backward_workspace<Accum>(s) + s.rows * padded<Accum>(s.output_size);
}

template <class Cell, class Accum>
void variant_backward_begin(const Backward<Accum>& s) {
  const VariantBackwardState<Cell, Accum> m(s);
  backward_begin<Cell, Accum>(s);
  for (int64_t j = 0; j < s.rows; ++j) {
    copy_row<Accum>(m.kept + j * m.dh_size, nullptr, 0, m.dh_size);
    const Variant<Accum>& v = *s.variant;
    if (v.dnorms) copy_row<Accum>(v.dnorms + s.row[j] * v.dnorms_size, nullptr, v.dnorms_size, 0);
    // The parts of resets come first.
    copy_row<Accum>(s.dh0 + s.row[j] * s.output_size, nullptr, s.output_size, 0);
    if constexpr (Cell::kHasCellState) {
      copy_row<Accum>(s.dc0 + s.row[j] * s.hidden_size, nullptr, s.hidden_size, 0);
    }
  }
}

/// Gradients of the states before the step at t, from the operands': through the mask and what
/// zoneout kept, or to the initial state where the row begins again.
template <class Cell, class Accum>
FUSEDRNN_INLINE void states_before(const Backward<Accum>& s,
                                   const VariantBackwardState<Cell, Accum>& m, int64_t t,
                                   int64_t begin, int64_t output_end, int64_t unit_end) {
  constexpr int L = kLanes<Accum>;
  const Variant<Accum>& v = *s.variant;
  const int64_t P = s.output_size, H = s.hidden_size;
  for (int64_t j = 0; j < s.active[t]; ++j) {
    const int64_t row = s.row[j];
    const bool begins_again = resets(s, t, j);
    Accum* const dh0 = s.dh0 + row * P;
    for (int64_t u = begin; u < output_end; u += L) {
      Accum* const at = m.dh + j * m.dh_size + u;
      Accum* const kept = m.kept + j * m.dh_size + u;
      Vec<Accum> d = masked_operand(v, row * P + u, P - u, load(at)) + load(kept);
      store(kept, Vec<Accum>{});
      if (begins_again) {
        if (v.reset_to_initial) store(dh0 + u, load(dh0 + u, P - u) + d, P - u);
        d = Vec<Accum>{};
      }
      store(at, d);
    }
    if (!begins_again) continue;
    Accum* const dstate0 = Cell::kHasCellState ? s.dc0 + row * H : dh0;
    for (int64_t u = begin; u < unit_end; u += L) {
      Accum* const at = m.dstate + j * m.state_size + u;
      if (v.reset_to_initial) store(dstate0 + u, load(dstate0 + u, H - u) + load(at), H - u);
      store(at, Vec<Accum>{});
    }
  }
}

/// Row j's values at time t that the units share.
template <class Cell, class Accum>
struct BackwardRow {
  BackwardRow(const Backward<Accum>& s, int64_t t, int64_t j)
      : row(s.row[j]),
        token(s.step_offset[t] + row),
        compact(s.compact_offset[t] + s.sorted_index[j]),
        at(s.variant->saved_at),
        saved(s.saved + token * at.size) {
    const int64_t before = step_before(s, t);
    const bool begins_again = resets(s, t, j);
    if (!begins_again && before >= 0 && j < s.active[before]) {
      saved_before = s.saved + (s.step_offset[before] + row) * at.size;
    } else if (!begins_again || s.variant->reset_to_initial) {
      h0 = row_of(s.h0, row, s.h0_stride);
      state0 = initial_state<Cell>(s, row);
    }
  }
  /// h before the step; P: its size.
  FUSEDRNN_INLINE Vec<Accum> h_before(int64_t H, int64_t P, int64_t u) const {
    if (!saved_before) return h0 ? load(h0 + u, P - u) : Vec<Accum>{};
    if (at.keeps_h) return load(saved_before + at.h + u, P - u);
    Vec<Accum> values[Cell::kSaved];
    unroll<Cell::kSaved>(
        [&](auto a) FUSEDRNN_LAMBDA { values[a] = load(saved_before + a * H + u, H - u); });
    return Cell::output(values);
  }
  /// The cell's state before the step.
  FUSEDRNN_INLINE Vec<Accum> state_before(int64_t H, int64_t u) const {
    if (!saved_before) return state0 ? load(state0 + u, H - u) : Vec<Accum>{};
    const bool keeps = Cell::kHasCellState ? at.keeps_c : at.keeps_h;
    const int64_t place = !keeps ? Cell::kSavedState * H : Cell::kHasCellState ? at.c : at.h;
    return load(saved_before + place + u, H - u);
  }

  int64_t row, token, compact;
  const SavedVariant& at;
  const Accum* saved;
  const Accum* saved_before = nullptr;           ///< of the step before; null: the initial states
  const Accum *h0 = nullptr, *state0 = nullptr;  ///< null: zeros
};

/// The operand of row j's step at t, for weight_hh's gradient.
template <class Cell, class Accum>
FUSEDRNN_INLINE void store_operand_before(const Backward<Accum>& s,
                                          const BackwardRow<Cell, Accum>& r, int64_t u) {
  const int64_t P = s.output_size;
  const Vec<Accum> h = r.h_before(s.hidden_size, P, u);
  store(s.h_previous + r.compact * P + u, masked_operand(*s.variant, r.row * P + u, P - u, h),
        P - u);
}

/// Gradients at the end of a step, for a vector of units. On return dh is the cell's, before
/// zoneout; so is dc where there is a cell state. `kept`: the part of the state's gradient that
/// bypasses the cell.
template <class Cell, class Accum>
FUSEDRNN_INLINE void end_of_step(const Backward<Accum>& s,
                                 const VariantBackwardState<Cell, Accum>& m,
                                 const BackwardRow<Cell, Accum>& r, int64_t j, int64_t u,
                                 Vec<Accum>& dh, Vec<Accum>& dc, Vec<Accum>& kept) {
  const Variant<Accum>& v = *s.variant;
  const int64_t H = s.hidden_size, n = H - u, place = r.token * H + u;
  const Vec<Accum> dstate = load(m.dstate + j * m.state_size + u);
  if constexpr (Cell::kHasCellState) {
    dc = dstate;
    if (v.dcells) dc += load(v.dcells + r.token * v.cells_stride + u, n);
    dc = zoneout_c(v).gradient(place, n, dc, kept);
    if (!s.projection_panels) {
      Vec<Accum> kept_h;
      dh = zoneout_h(v).gradient(place, n, dh, kept_h);
      store(m.kept + j * m.dh_size + u, kept_h);
    }
  } else {
    dc = Vec<Accum>{};
    dh = zoneout_h(v).gradient(place, n, dh + dstate, kept);
  }
}

template <class Cell, class Accum>
FUSEDRNN_NOINLINE void variant_backward_units(const Backward<Accum>& s,
                                              const VariantBackwardState<Cell, Accum>& m, int64_t t,
                                              int64_t begin, int64_t end, const Accum* dout,
                                              int64_t dout_size) {
  constexpr int L = kLanes<Accum>, S = Cell::kPreacts;
  const int64_t H = s.hidden_size;
  for (int64_t j = 0; j < s.active[t]; ++j) {
    const BackwardRow<Cell, Accum> r(s, t, j);
    Accum* const dgates = s.dgates + r.compact * S * H;
    for (int64_t u = begin; u < end; u += L) {
      const int64_t n = H - u;
      Vec<Accum> saved[Cell::kSaved], prepared[Cell::kPrepared], dgate[S], dc, kept;
      Vec<Accum> dh = load(dout + j * dout_size + u);
      unroll<Cell::kSaved>([&](auto a)
                               FUSEDRNN_LAMBDA { saved[a] = load(r.saved + a * H + u, n); });
      const Vec<Accum> before = r.state_before(H, u);
      end_of_step<Cell>(s, m, r, j, u, dh, dc, kept);
      Cell::prepare(saved, before, prepared, candidate_of(*s.variant, r.token * H + u, n));
      Cell::backward(prepared, dh, dc, dgate);
      store(m.dstate + j * m.state_size + u, dc + kept);
      unroll<S>([&](auto c) FUSEDRNN_LAMBDA { store(dgates + c * H + u, dgate[c], n); });
      if (s.projection_panels) {
        store(s.h_raw + r.compact * H + u, Cell::output(saved), n);
      } else {
        store_operand_before<Cell>(s, r, u);
      }
    }
  }
}

/// The same with layer norms, for all units.
template <class Cell, class Accum>
FUSEDRNN_NOINLINE void variant_backward_rows(const Backward<Accum>& s,
                                             const VariantBackwardState<Cell, Accum>& m, int64_t t,
                                             const Accum* dout, int64_t dout_size) {
  constexpr int L = kLanes<Accum>, S = Cell::kPreacts, G = Cell::kGates;
  const Variant<Accum>& v = *s.variant;
  const int64_t H = s.hidden_size;
  for (int64_t j = 0; j < s.active[t]; ++j) {
    const BackwardRow<Cell, Accum> r(s, t, j);
    Accum* const dgates = s.dgates + r.compact * S * H;
    const Accum* const rstd = r.saved + r.at.rstd;
    Accum* const dstate = m.dstate + j * m.state_size;
    const auto load_saved = [&](Vec<Accum>(&saved)[Cell::kSaved], int64_t u) FUSEDRNN_LAMBDA {
      unroll<Cell::kSaved>([&](auto a)
                               FUSEDRNN_LAMBDA { saved[a] = load(r.saved + a * H + u, H - u); });
    };
    // The gradient of the normalised c, and c's. The part that bypasses the cell waits in dinput,
    // and h's gradient in dhidden.
    Accum* const dinput = v.dinput + r.compact * G * H;
    Accum* const dhidden = v.dhidden + r.compact * G * H;
    if constexpr (Cell::kHasCellState) {
      Accum* const dnorm_c = v.dnorm_c + r.compact * H;
      for (int64_t u = 0; u < H; u += L) {
        Vec<Accum> saved[Cell::kSaved], prepared[Cell::kPrepared], dc, kept;
        Vec<Accum> dh = load(dout + j * dout_size + u);
        load_saved(saved, u);
        end_of_step<Cell>(s, m, r, j, u, dh, dc, kept);
        Cell::prepare(saved, Vec<Accum>{}, prepared);
        store(dnorm_c + u, dh * prepared[Cell::kPreparedOutput], H - u);
        store(dstate + u, dc);
        store(dinput + u, kept, H - u);
        store(dhidden + u, dh, H - u);
      }
      // dgates is still free for c's part.
      normalise_backward(
          H, r.saved + r.at.norm_c, v.norm_c, rstd[2],
          [&](int64_t u, int64_t left) FUSEDRNN_LAMBDA { return load(dnorm_c + u, left); }, dgates);
    }
    for (int64_t u = 0; u < H; u += L) {
      const int64_t n = H - u;
      Vec<Accum> saved[Cell::kSaved], prepared[Cell::kPrepared], dgate[S], dc, kept, dh;
      load_saved(saved, u);
      const Vec<Accum> before = r.state_before(H, u);
      Cell::prepare(saved, before, prepared, candidate_of(v, r.token * H + u, n));
      if constexpr (Cell::kHasCellState) {
        dc = load(dstate + u) + load(dgates + u, n);
        kept = load(dinput + u, n);
        dh = load(dhidden + u, n);
        prepared[Cell::kPreparedOutput] = Vec<Accum>{};  // it went through the norm
      } else {
        dh = load(dout + j * dout_size + u);
        end_of_step<Cell>(s, m, r, j, u, dh, dc, kept);
      }
      Cell::backward(prepared, dh, dc, dgate);
      store(dstate + u, dc + kept);
      unroll<S>([&](auto c) FUSEDRNN_LAMBDA { store(dgates + c * H + u, dgate[c], n); });
      if (s.projection_panels) {
        store(s.h_raw + r.compact * H + u, Cell::output(saved), n);
      } else {
        store_operand_before<Cell>(s, r, u);
      }
    }
    // The input's pre-activations come first, gate by gate. The hidden ones may lie elsewhere.
    Accum* const dnorms = v.dnorms + r.row * v.dnorms_size;
    add_products(G * H, dgates, r.saved + r.at.input, dnorms);
    normalise_backward(
        G * H, r.saved + r.at.input, v.norm_ih, rstd[0],
        [&](int64_t k, int64_t left) FUSEDRNN_LAMBDA { return load(dgates + k, left); }, dinput);
    const Accum* of_hidden = dgates;
    if constexpr (G != S) {
      for (int g = 0; g < G; ++g) {
        copy_row(dhidden + g * H, static_cast<const Accum*>(dgates) + Cell::hidden_preact[g] * H, H,
                 0);
      }
      of_hidden = dhidden;
    }
    add_products(G * H, of_hidden, r.saved + r.at.hidden, dnorms + G * H);
    if constexpr (Cell::kHasCellState) {
      const Accum* const dnorm_c = v.dnorm_c + r.compact * H;
      add_products(H, dnorm_c, r.saved + r.at.norm_c, dnorms + 2 * G * H);
      add_products<Accum>(H, dnorm_c, nullptr, dnorms + (2 * G + 1) * H);
    }
    normalise_backward(
        G * H, r.saved + r.at.hidden, v.norm_hh, rstd[1],
        [&](int64_t k, int64_t left) FUSEDRNN_LAMBDA { return load(of_hidden + k, left); },
        dhidden);
  }
}

template <class Cell, class Accum>
void variant_backward_step(const Backward<Accum>& s, int64_t i, int64_t block_begin,
                           int64_t block_end) {
  constexpr int L = kLanes<Accum>;
  constexpr int64_t width = kPanelVectors * L;
  const VariantBackwardState<Cell, Accum> m(s);
  const Variant<Accum>& v = *s.variant;
  const int64_t H = s.hidden_size, P = s.output_size;
  const auto time = [&](int64_t step) { return s.reverse ? step : s.steps - 1 - step; };
  const int64_t begin = block_begin * width;
  const int64_t output_end = smaller(block_end * width, P),
                unit_end = smaller(block_end * width, H);
  if (i > 0) {
    const int64_t after = time(i - 1), gemm_end = smaller(block_end, divide_up(P, width));
    if (v.has_norms) {
      const int64_t K = Cell::kGates * H;
      const Rows<const Accum> dhidden{v.dhidden, K, s.sorted_index, s.compact_offset[after]};
      gemm_blocks<InOrder<1>, Accum>(s.active[after], K, P, block_begin, gemm_end, s.panels,
                                     s.matrix_stride, dhidden, Rows<Accum>{m.dh, m.dh_size}, false);
    } else {
      backward_gemm<Cell>(s, m, after, block_begin, gemm_end);
    }
    states_before<Cell>(s, m, after, begin, output_end, unit_end);
  }
  if (i == s.steps) {
    for (int64_t j = 0; j < s.rows; ++j) {
      Accum* const dh0 = s.dh0 + s.row[j] * P;
      const Accum* const dstate = m.dstate + j * m.state_size;
      for (int64_t u = begin; u < output_end; u += L) {
        Vec<Accum> d = load(dh0 + u, P - u) + load(m.dh + j * m.dh_size + u);
        if constexpr (!Cell::kHasCellState) d += load(dstate + u);
        store(dh0 + u, d, P - u);
      }
      if constexpr (Cell::kHasCellState) {
        Accum* const dc0 = s.dc0 + s.row[j] * H;
        for (int64_t u = begin; u < unit_end; u += L) {
          store(dc0 + u, load(dc0 + u, H - u) + load(dstate + u), H - u);
        }
      }
    }
    return;
  }
  const int64_t t = time(i), rows = s.active[t];
  if (s.dy) {
    for (int64_t j = 0; j < rows; ++j) {
      const Accum* dy = s.dy + (s.step_offset[t] + s.row[j]) * s.dy_stride;
      Accum* dh = m.dh + j * m.dh_size;
      for (int64_t u = begin; u < output_end; u += L) {
        store(dh + u, load(dh + u) + load(dy + u, P - u));
      }
    }
  }
  const Accum* dout = m.dh;
  int64_t dout_size = m.dh_size;
  if (s.projection_panels) {
    for (int64_t j = 0; j < rows; ++j) {
      const BackwardRow<Cell, Accum> r(s, t, j);
      for (int64_t u = 0; u < P; u += L) {
        Vec<Accum> kept;
        Accum* const dh = m.dh + j * m.dh_size + u;
        const Vec<Accum> d = zoneout_h(v).gradient(r.token * P + u, P - u, load(dh), kept);
        store(m.kept + j * m.dh_size + u, kept);
        store(dh, d);
        store(s.dr + r.compact * P + u, d, P - u);
        store_operand_before<Cell>(s, r, u);
      }
    }
    gemm<Accum>(rows, P, H, s.projection_panels, 0, m.dh, m.dh_size, m.dh_raw, m.state_size, false);
    dout = m.dh_raw;
    dout_size = m.state_size;
  }
  if (v.has_norms) return variant_backward_rows<Cell>(s, m, t, dout, dout_size);
  variant_backward_units<Cell>(s, m, t, s.projection_panels ? 0 : begin,
                               s.projection_panels ? H : unit_end, dout, dout_size);
}

}  // namespace fusedrnn::FUSEDRNN_TARGET
