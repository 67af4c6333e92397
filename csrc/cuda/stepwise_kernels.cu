// The kernels between a step's GEMMs. A thread has a few neighbouring features in one row.
#include "kernel_table.h"
#include "rows.cuh"

namespace fusedrnn::cuda {
namespace {

/// A row's saved values for units u, u + 1, ...
template <class Cell, int V, class Accum>
FUSEDRNN_DEVICE void load_saved(Vector<Accum, V> (&to)[Cell::kSaved], const Accum* saved,
                                int64_t row, int64_t H, int64_t u) {
  unroll<Cell::kSaved>([&](auto a) { to[a] = load<V>(saved + (row * Cell::kSaved + a) * H + u); });
}

template <class Element>
FUSEDRNN_DEVICE bool has_previous(const OutputGradientParams<Element>& p, int64_t row) {
  return p.previous >= 0 && row < p.previous_rows && (!p.lengths || p.lengths[row] > p.previous);
}

/// Consumes an active row's output gradient; an inactive row's dh keeps it.
template <int V, class Element, class Accum = Accumulator<Element>>
FUSEDRNN_DEVICE Vector<Accum, V> take_gradient(const OutputGradientParams<Element>& p, int64_t row,
                                               int64_t feature, int64_t features, bool active) {
  const int64_t at = row * features + feature;
  Vector<Accum, V> dh =
      p.is_first ? load_values<V>(offset_or_null(p.dh_n, at)) : load<V>(p.dh + at);
  if (row < p.product_rows) {
    const Vector<Accum, V> product = load<V>(p.product + at);
    unroll<V>([&](auto v) { dh.value[v] += product.value[v]; });
  }
  store(p.dh + at, active ? Vector<Accum, V>{} : dh);
  if (active && p.dy) {
    const Vector<Accum, V> dy = load_values<V>(p.dy + row * p.dy_stride + feature);
    unroll<V>([&](auto v) { dh.value[v] += dy.value[v]; });
  }
  return dh;
}

template <class Cell, class Element, int V>
struct ForwardStepKernel : RowKernel<V> {
  ForwardStepParams<Element> p;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const auto position = this->position(p.all_rows, p.hidden_size);
    if (position.row < 0) return;
    ForwardUnits<Cell, Element, V>(p, position.row, position.feature).finish();
  }
};

template <class Element, int V>
struct ProjectionStepKernel : RowKernel<V> {
  ProjectionStepParams<Element> p;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const int64_t P = p.output_size;
    const auto position = this->position(p.all_rows, P);
    const int64_t row = position.row, u = position.feature;
    if (row < 0) return;
    const bool active = is_active(p, row);
    if (active || p.is_first) {
      const Element* const h0 = offset_or_null(p.h0, row * p.h0_stride + u);
      store(p.h + row * P + u,
            active ? rounded<V, Element>(load<V>(p.r + row * P + u)) : load_or_zeros<V>(h0));
    }
    if (has_token(p, row)) {  // the padding gets zeros
      store(p.y + row * p.y_stride + u,
            active ? rounded<V, Element>(load<V>(p.r + row * P + u)) : Vector<Element, V>{});
    }
  }
};

template <class Cell, class Element, int V>
struct BackwardStepKernel : RowKernel<V> {
  using Accum = Accumulator<Element>;
  using Elements = Vector<Element, V>;
  BackwardStepParams<Element> p;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const int64_t H = p.hidden_size;
    const auto position = this->position(p.all_rows, H);
    const int64_t row = position.row, u = position.feature;
    if (row < 0) return;
    const bool active = is_active(p, row);
    Vector<Accum, V> dh = {};
    if (!p.dh_raw) {
      dh = take_gradient<V>(p, row, u, H, active);
    } else if (active) {
      dh = load<V>(p.dh_raw + row * H + u);
    }
    Vector<Accum, V> dstate = p.is_first ? load_values<V>(offset_or_null(p.dc_n, row * H + u))
                                         : load<V>(p.dstate + row * H + u);
    if (!active) {
      if (p.is_first) store(p.dstate + row * H + u, dstate);
      const Elements zeros[Cell::kPreacts] = {};
      if (has_token(p, row)) store_operands(row, u, zeros, {}, {});
      return;
    }
    Vector<Accum, V> state = {}, saved[Cell::kSaved];
    Elements h = {};
    const Element* const h0 = offset_or_null(p.h0, row * p.h0_stride + u);
    if (has_previous(p, row)) {
      Vector<Accum, V> output;
      load_saved<Cell>(saved, p.previous_saved, row, H, u);
      unroll<V>([&](auto v) {
        Accum of_unit[Cell::kSaved];
        unroll<Cell::kSaved>([&](auto a) { of_unit[a] = saved[a].value[v]; });
        state.value[v] = of_unit[Cell::kSavedState];
        output.value[v] = Cell::output(of_unit);
      });
      h = rounded<V, Element>(output);
    } else {
      state =
          load_values<V>(!Cell::kHasCellState ? h0 : offset_or_null(p.c0, row * p.c0_stride + u));
      if (p.h_previous) h = load_or_zeros<V>(h0);
    }

    load_saved<Cell>(saved, p.saved, row, H, u);
    Vector<Accum, V> raw, dgates[Cell::kPreacts];
    unroll<V>([&](auto v) {
      Accum of_unit[Cell::kSaved], dgate[Cell::kPreacts];
      unroll<Cell::kSaved>([&](auto a) { of_unit[a] = saved[a].value[v]; });
      scalar::cell_backward<Cell>(of_unit, state.value[v], dh.value[v], dstate.value[v], dgate);
      unroll<Cell::kPreacts>([&](auto k) { dgates[k].value[v] = dgate[k]; });
      raw.value[v] = Cell::output(of_unit);
    });
    store(p.dstate + row * H + u, dstate);
    Elements operands[Cell::kPreacts];
    unroll<Cell::kPreacts>([&](auto k) { operands[k] = rounded<V, Element>(dgates[k]); });
    store_operands(row, u, operands, h, rounded<V, Element>(raw));
  }

 private:
  /// For the GEMMs. The padding gets zeros.
  FUSEDRNN_DEVICE void store_operands(int64_t row, int64_t u,
                                      const Elements (&dgates)[Cell::kPreacts], const Elements& h,
                                      const Elements& raw) const {
    const int64_t H = p.hidden_size;
    unroll<Cell::kPreacts>(
        [&](auto k) { store(p.dgates + (row * Cell::kPreacts + k) * H + u, dgates[k]); });
    if (p.dhidden) {
      unroll<Cell::kGates>([&](auto g) {
        constexpr int hidden = Cell::hidden_preact[g];
        store(p.dhidden + (row * Cell::kGates + g) * H + u, dgates[hidden]);
      });
    }
    if (p.h_previous) store(p.h_previous + row * H + u, h);
    if (p.h_raw) store(p.h_raw + row * H + u, raw);
  }
};

template <class Element, int V>
struct ProjectionBackwardStepKernel : RowKernel<V> {
  using Accum = Accumulator<Element>;
  ProjectionBackwardStepParams<Element> p;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const int64_t P = p.output_size;
    const auto position = this->position(p.all_rows, P);
    const int64_t row = position.row, u = position.feature;
    if (row < 0) return;
    const bool active = is_active(p, row);
    const Vector<Accum, V> dh = take_gradient<V>(p, row, u, P, active);
    if (!has_token(p, row)) return;
    Vector<Element, V> h = {}, dr = {};  // the padding's
    if (active) {
      const Element* const previous = has_previous(p, row)
                                          ? p.previous_y + row * p.y_stride
                                          : offset_or_null(p.h0, row * p.h0_stride);
      h = load_or_zeros<V>(offset_or_null(previous, u));
      dr = rounded<V, Element>(dh);
    }
    store(p.h_previous + row * P + u, h);
    store(p.dr + row * P + u, dr);
  }
};

/// A thread has the features of h0 and, where there are as many, of c0.
template <class Element, int V>
struct InitialGradientsKernel : RowKernel<V> {
  using Accum = Accumulator<Element>;
  InitialGradientParams<Element> p;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const auto position = this->position(p.rows, features(p));
    const int64_t row = position.row, u = position.feature;
    if (row < 0) return;
    if (p.dc0 && u < p.hidden_size) {
      const int64_t at = row * p.hidden_size + u;
      store(p.dc0 + at, rounded<V, Element>(load<V>(p.dstate + at)));
    }
    if (!p.dh0 || u >= p.output_size) return;
    const int64_t at = row * p.output_size + u;
    Vector<Accum, V> dh = load<V>(p.dh + at);
    const Vector<Accum, V> product = load<V>(p.product + at);
    unroll<V>([&](auto v) { dh.value[v] += product.value[v]; });
    if (p.state_is_h) {
      const Vector<Accum, V> direct = load<V>(p.dstate + at);
      unroll<V>([&](auto v) { dh.value[v] += direct.value[v]; });
    }
    store(p.dh0 + at, rounded<V, Element>(dh));
  }
  static FUSEDRNN_INLINE int64_t features(const InitialGradientParams<Element>& p) {
    return p.hidden_size > p.output_size ? p.hidden_size : p.output_size;
  }
};

/// The kernels as templates of V alone.
template <class Cell, class Element>
struct CellKernels {
  template <int V>
  using Forward = ForwardStepKernel<Cell, Element, V>;
  template <int V>
  using Backward = BackwardStepKernel<Cell, Element, V>;
};
template <class Element>
struct ElementKernels {
  template <int V>
  using Projection = ProjectionStepKernel<Element, V>;
  template <int V>
  using ProjectionBackward = ProjectionBackwardStepKernel<Element, V>;
  template <int V>
  using InitialGradients = InitialGradientsKernel<Element, V>;
};

template <class Cell, class Element>
int forward_step(const ForwardStepParams<Element>& p, void* stream) {
  constexpr int V = kVector<Element>;
  using Accum = Accumulator<Element>;
  const bool fit = fits<V, Accum>({p.x_product, p.h_product, p.state, p.saved}, {p.hidden_size}) &&
                   fits<V, Element>({p.bias_ih, p.bias_hh, p.h_before, p.c0, p.h, p.y, p.c_n},
                                    {p.h_before_stride, p.c0_stride, p.y_stride});
  return launch_rows<CellKernels<Cell, Element>::template Forward, V>(p, p.all_rows, p.hidden_size,
                                                                      fit, stream);
}

template <class Cell, class Element>
int backward_step(const BackwardStepParams<Element>& p, void* stream) {
  constexpr int V = kVector<Element>;
  const bool fit =
      fits<V, Accumulator<Element>>(
          {p.saved, p.previous_saved, p.product, p.dh, p.dh_raw, p.dstate}, {p.hidden_size}) &&
      fits<V, Element>(
          {p.h0, p.c0, p.dy, p.dh_n, p.dc_n, p.dgates, p.dhidden, p.h_previous, p.h_raw},
          {p.h0_stride, p.c0_stride, p.dy_stride});
  return launch_rows<CellKernels<Cell, Element>::template Backward, V>(p, p.all_rows, p.hidden_size,
                                                                       fit, stream);
}

template <class Element, class... Cell>
const StepKernels<Element>& step_kernels_of(int cell, scalar::CellList<Cell...>) {
  static constexpr StepKernels<Element> table[] = {
      {&forward_step<Cell, Element>, &backward_step<Cell, Element>}...};
  return table[cell];
}

}  // namespace

template <class Element>
const StepKernels<Element>& step_kernels(int cell) {
  return step_kernels_of<Element>(cell, scalar::Cells());
}

template <class Element>
int projection_step(const ProjectionStepParams<Element>& p, void* stream) {
  constexpr int V = kVector<Element>;
  const bool fit = fits<V, Accumulator<Element>>({p.r}, {p.output_size}) &&
                   fits<V, Element>({p.h0, p.h, p.y}, {p.h0_stride, p.y_stride});
  return launch_rows<ElementKernels<Element>::template Projection, V>(p, p.all_rows, p.output_size,
                                                                      fit, stream);
}

template <class Element>
int projection_backward_step(const ProjectionBackwardStepParams<Element>& p, void* stream) {
  constexpr int V = kVector<Element>;
  const bool fit = fits<V, Accumulator<Element>>({p.product, p.dh}, {p.output_size}) &&
                   fits<V, Element>({p.previous_y, p.h0, p.dy, p.dh_n, p.dr, p.h_previous},
                                    {p.y_stride, p.h0_stride, p.dy_stride});
  return launch_rows<ElementKernels<Element>::template ProjectionBackward, V>(
      p, p.all_rows, p.output_size, fit, stream);
}

template <class Element>
int initial_gradients(const InitialGradientParams<Element>& p, void* stream) {
  constexpr int V = kVector<Element>;
  const bool fit =
      fits<V, Accumulator<Element>>({p.dh, p.product, p.dstate}, {p.hidden_size, p.output_size}) &&
      fits<V, Element>({p.dh0, p.dc0}, {});
  using Kernel = InitialGradientsKernel<Element, V>;
  return launch_rows<ElementKernels<Element>::template InitialGradients, V>(
      p, p.rows, Kernel::features(p), fit, stream);
}

#define FUSEDRNN_STEPS_OF(Element)                                                            \
  template const StepKernels<Element>& step_kernels(int);                                     \
  template int projection_step(const ProjectionStepParams<Element>&, void*);                  \
  template int projection_backward_step(const ProjectionBackwardStepParams<Element>&, void*); \
  template int initial_gradients(const InitialGradientParams<Element>&, void*);
FUSEDRNN_STEPS_OF(float)
FUSEDRNN_STEPS_OF(double)
FUSEDRNN_STEPS_OF(BFloat16)
FUSEDRNN_STEPS_OF(Float16)

}  // namespace fusedrnn::cuda
