// The kernels between a step's GEMMs. A thread has a few neighbouring features in one row.
#include <algorithm>

#include "../cells.h"
#include "kernel_table.h"
#include "ptx.cuh"

namespace fusedrnn::cuda {
namespace {

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
FUSEDRNN_DEVICE const T* offset_or_null(const T* p, int64_t offset) {
  return p ? p + offset : nullptr;
}
/// A row's saved values for units u, u + 1, ...
template <class Cell, int V, class Accum>
FUSEDRNN_DEVICE void load_saved(Vector<Accum, V> (&to)[Cell::kSaved], const Accum* saved,
                                int64_t row, int64_t H, int64_t u) {
  unroll<Cell::kSaved>([&](auto a) { to[a] = load<V>(saved + (row * Cell::kSaved + a) * H + u); });
}

FUSEDRNN_DEVICE bool is_active(const StepRows& p, int64_t row) {
  return !p.lengths || p.lengths[row] > p.t;
}
template <class Accum>
FUSEDRNN_DEVICE bool has_previous(const OutputGradientParams<Accum>& p, int64_t row) {
  return p.previous >= 0 && row < p.previous_rows && (!p.lengths || p.lengths[row] > p.previous);
}

/// Consumes an active row's output gradient; an inactive row's dh keeps it.
template <int V, class Accum>
FUSEDRNN_DEVICE Vector<Accum, V> take_gradient(const OutputGradientParams<Accum>& p, int64_t row,
                                               int64_t feature, int64_t features, bool active) {
  const int64_t at = row * features + feature;
  Vector<Accum, V> dh = load<V>(p.dh + at);
  const Vector<Accum, V> product = load<V>(p.product + at);
  unroll<V>([&](auto v) { dh.value[v] += product.value[v]; });
  store(p.dh + at, active ? Vector<Accum, V>{} : dh);
  if (active && p.dy) {
    const Vector<Accum, V> dy = load<V>(p.dy + row * p.dy_stride + feature);
    unroll<V>([&](auto v) { dh.value[v] += dy.value[v]; });
  }
  return dh;
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

template <class Cell, class Element, int V>
struct ForwardStepKernel : RowKernel<V> {
  using Accum = Accumulator<Element>;
  ForwardStepParams<Element> p;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const int64_t H = p.hidden_size;
    const auto position = this->position(p.rows, H);
    const int64_t row = position.row, u = position.feature;
    if (row < 0 || !is_active(p, row)) return;
    Vector<Accum, V> preacts[Cell::kPreacts] = {};
    unroll<Cell::kGates>([&](auto g) {
      constexpr int input = Cell::input_preact[g], hidden = Cell::hidden_preact[g];
      const int64_t bias_at = g * H + u, at = row * Cell::kGates * H + bias_at;
      const Vector<Accum, V> x = load<V>(p.x_product + at);
      const Vector<Accum, V> h = load_or_zeros<V>(offset_or_null(p.h_product, at));
      const Vector<Element, V> b_ih = load_or_zeros<V>(offset_or_null(p.bias_ih, bias_at));
      const Vector<Element, V> b_hh = load_or_zeros<V>(offset_or_null(p.bias_hh, bias_at));
      unroll<V>([&](auto v) {
        preacts[input].value[v] += x.value[v] + value_of(b_ih.value[v]);
        preacts[hidden].value[v] += h.value[v] + value_of(b_hh.value[v]);
      });
    });
    Vector<Accum, V> state = load<V>(p.state + row * H + u), out, saved[Cell::kSaved];
    unroll<V>([&](auto v) {
      Accum preact[Cell::kPreacts], of_unit[Cell::kSaved];
      unroll<Cell::kPreacts>([&](auto k) { preact[k] = preacts[k].value[v]; });
      out.value[v] = Cell::forward(preact, state.value[v], of_unit);
      unroll<Cell::kSaved>([&](auto a) { saved[a].value[v] = of_unit[a]; });
    });
    store(p.state + row * H + u, state);
    const Vector<Element, V> h = rounded<V, Element>(out);
    store(p.h + row * H + u, h);
    if (p.y) store(p.y + row * p.y_stride + u, h);
    if (p.saved) {
      unroll<Cell::kSaved>(
          [&](auto a) { store(p.saved + (row * Cell::kSaved + a) * H + u, saved[a]); });
    }
  }
};

template <class Element, int V>
struct ProjectionStepKernel : RowKernel<V> {
  ProjectionStepParams<Element> p;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const int64_t P = p.output_size;
    const auto position = this->position(p.rows, P);
    const int64_t row = position.row, u = position.feature;
    if (row < 0 || !is_active(p, row)) return;
    const Vector<Element, V> h = rounded<V, Element>(load<V>(p.r + row * P + u));
    store(p.h + row * P + u, h);
    store(p.y + row * p.y_stride + u, h);
  }
};

template <class Cell, class Element, int V>
struct BackwardStepKernel : RowKernel<V> {
  using Accum = Accumulator<Element>;
  BackwardStepParams<Element> p;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const int64_t H = p.hidden_size;
    const auto position = this->position(p.rows, H);
    const int64_t row = position.row, u = position.feature;
    if (row < 0) return;
    const bool active = is_active(p, row);
    const Vector<Accum, V> dh =
        p.dh_raw ? load<V>(p.dh_raw + row * H + u) : take_gradient<V>(p, row, u, H, active);
    if (!active) {
      if (p.dhidden) {  // it still holds the following step's
        unroll<Cell::kGates>([&](auto g) {
          store(p.dhidden + (row * Cell::kGates + g) * H + u, Vector<Element, V>{});
        });
      }
      return;
    }
    Vector<Accum, V> state = {}, h = {}, saved[Cell::kSaved];
    const Accum* const h0 = offset_or_null(p.h0, row * p.h0_stride);
    if (has_previous(p, row)) {
      load_saved<Cell>(saved, p.previous_saved, row, H, u);
      unroll<V>([&](auto v) {
        Accum of_unit[Cell::kSaved];
        unroll<Cell::kSaved>([&](auto a) { of_unit[a] = saved[a].value[v]; });
        state.value[v] = of_unit[Cell::kSavedState];
        h.value[v] = Cell::output(of_unit);
      });
    } else {
      const Accum* const state0 =
          !Cell::kHasCellState ? h0 : offset_or_null(p.c0, row * p.c0_stride);
      if (state0) state = load<V>(state0 + u);
      if (h0 && p.h_previous) h = load<V>(h0 + u);
    }
    if (p.h_previous) store(p.h_previous + row * H + u, rounded<V, Element>(h));

    load_saved<Cell>(saved, p.saved, row, H, u);
    Vector<Accum, V> dstate = load<V>(p.dstate + row * H + u), raw, dgates[Cell::kPreacts];
    unroll<V>([&](auto v) {
      Accum of_unit[Cell::kSaved], dgate[Cell::kPreacts];
      unroll<Cell::kSaved>([&](auto a) { of_unit[a] = saved[a].value[v]; });
      scalar::cell_backward<Cell>(of_unit, state.value[v], dh.value[v], dstate.value[v], dgate);
      unroll<Cell::kPreacts>([&](auto k) { dgates[k].value[v] = dgate[k]; });
      raw.value[v] = Cell::output(of_unit);
    });
    store(p.dstate + row * H + u, dstate);
    unroll<Cell::kPreacts>([&](auto k) {
      store(p.dgates + (row * Cell::kPreacts + k) * H + u, rounded<V, Element>(dgates[k]));
    });
    if (p.dhidden) {
      unroll<Cell::kGates>([&](auto g) {
        constexpr int hidden = Cell::hidden_preact[g];
        store(p.dhidden + (row * Cell::kGates + g) * H + u, rounded<V, Element>(dgates[hidden]));
      });
    }
    if (p.h_raw) store(p.h_raw + row * H + u, rounded<V, Element>(raw));
  }
};

template <class Element, int V>
struct ProjectionBackwardStepKernel : RowKernel<V> {
  using Accum = Accumulator<Element>;
  ProjectionBackwardStepParams<Element> p;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const int64_t P = p.output_size;
    const auto position = this->position(p.rows, P);
    const int64_t row = position.row, u = position.feature;
    if (row < 0) return;
    const bool active = is_active(p, row);
    const Vector<Accum, V> dh = take_gradient<V>(p, row, u, P, active);
    if (!active) return;
    const Accum* const previous = has_previous(p, row) ? p.previous_y + row * p.y_stride
                                                       : offset_or_null(p.h0, row * p.h0_stride);
    const Vector<Accum, V> h = load_or_zeros<V>(offset_or_null(previous, u));
    store(p.h_previous + row * P + u, rounded<V, Element>(h));
    store(p.dr + row * P + u, rounded<V, Element>(dh));
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
int launch_rows(const Params& params, int64_t features, bool fit, void* stream) {
  const auto run = [&](auto v) {
    Kernel<v> kernel;
    kernel.p = params;
    const int64_t threads = params.rows * (features / v);
    if (threads == 0) return 0;
    return launch(kernel, {unsigned(scalar::divide_up(threads, Kernel<v>::kThreads))}, stream);
  };
  return fit ? run(std::integral_constant<int, V>{}) : run(std::integral_constant<int, 1>{});
}

/// Accumulators in a 16-byte access.
template <class Element>
constexpr int kVector = 16 / sizeof(Accumulator<Element>);

/// The kernels as templates of V alone.
template <class Cell, class Element>
struct CellKernels {
  template <int V>
  using Forward = ForwardStepKernel<Cell, Element, V>;
  template <int V>
  using Backward = BackwardStepKernel<Cell, Element, V>;
};
template <class Element>
struct ProjectionKernels {
  template <int V>
  using Forward = ProjectionStepKernel<Element, V>;
  template <int V>
  using Backward = ProjectionBackwardStepKernel<Element, V>;
};

template <class Cell, class Element>
int forward_step(const ForwardStepParams<Element>& p, void* stream) {
  constexpr int V = kVector<Element>;
  using Accum = Accumulator<Element>;
  const bool fit = fits<V, Accum>({p.x_product, p.h_product, p.state, p.saved}, {p.hidden_size}) &&
                   fits<V, Element>({p.bias_ih, p.bias_hh, p.h, p.y}, {p.y_stride});
  return launch_rows<CellKernels<Cell, Element>::template Forward, V>(p, p.hidden_size, fit,
                                                                      stream);
}

template <class Cell, class Element>
int backward_step(const BackwardStepParams<Element>& p, void* stream) {
  constexpr int V = kVector<Element>;
  const bool fit =
      fits<V, Accumulator<Element>>(
          {p.saved, p.previous_saved, p.h0, p.c0, p.dy, p.product, p.dh, p.dh_raw, p.dstate},
          {p.hidden_size, p.h0_stride, p.c0_stride, p.dy_stride}) &&
      fits<V, Element>({p.dgates, p.dhidden, p.h_previous, p.h_raw}, {});
  return launch_rows<CellKernels<Cell, Element>::template Backward, V>(p, p.hidden_size, fit,
                                                                       stream);
}

template <class Element, class... Cell>
const StepKernels<Element>& step_kernels_of(int cell, scalar::CellList<Cell...>) {
  static constexpr StepKernels<Element> table[] = {
      {&forward_step<Cell, Element>, &backward_step<Cell, Element>}...};
  return table[cell];
}

constexpr int kUploaded = 440;  ///< numbers that fill a kernel's 4 KB of arguments

struct UploadKernel {
  static constexpr int kThreads = kUploaded;
  int64_t numbers[kUploaded];
  int count;
  int64_t* to;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    if (int(threadIdx.x) < count) to[threadIdx.x] = numbers[threadIdx.x];
  }
};

}  // namespace

template <class Element>
const StepKernels<Element>& step_kernels(int cell) {
  return step_kernels_of<Element>(cell, scalar::Cells());
}

template <class Element>
int projection_step(const ProjectionStepParams<Element>& p, void* stream) {
  constexpr int V = kVector<Element>;
  const bool fit = fits<V, Accumulator<Element>>({p.r}, {p.output_size}) &&
                   fits<V, Element>({p.h, p.y}, {p.y_stride});
  return launch_rows<ProjectionKernels<Element>::template Forward, V>(p, p.output_size, fit,
                                                                      stream);
}

template <class Element>
int projection_backward_step(const ProjectionBackwardStepParams<Element>& p, void* stream) {
  constexpr int V = kVector<Element>;
  const bool fit =
      fits<V, Accumulator<Element>>({p.previous_y, p.h0, p.dy, p.product, p.dh},
                                    {p.output_size, p.y_stride, p.h0_stride, p.dy_stride}) &&
      fits<V, Element>({p.dr, p.h_previous}, {});
  return launch_rows<ProjectionKernels<Element>::template Backward, V>(p, p.output_size, fit,
                                                                       stream);
}

int upload(const int64_t* numbers, int64_t count, int64_t* to, void* stream) {
  for (int64_t begin = 0; begin < count; begin += kUploaded) {
    UploadKernel kernel;
    kernel.count = int(std::min<int64_t>(kUploaded, count - begin));
    std::copy_n(numbers + begin, kernel.count, kernel.numbers);
    kernel.to = to + begin;
    if (const int status = launch(kernel, {1}, stream)) return status;
  }
  return 0;
}

#define FUSEDRNN_STEPS_OF(Element)                                           \
  template const StepKernels<Element>& step_kernels(int);                    \
  template int projection_step(const ProjectionStepParams<Element>&, void*); \
  template int projection_backward_step(const ProjectionBackwardStepParams<Element>&, void*);
FUSEDRNN_STEPS_OF(float)
FUSEDRNN_STEPS_OF(double)
FUSEDRNN_STEPS_OF(BFloat16)
FUSEDRNN_STEPS_OF(Float16)

}  // namespace fusedrnn::cuda
