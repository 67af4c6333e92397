// What is between the products of a step, one thread for a few neighbouring units of a row.
#include <algorithm>

#include "kernels.h"
#include "primitives.cuh"

namespace fusedrnn::cuda {
namespace {

using scalar::unroll;

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];
};

template <int V, class T>
FUSEDRNN_DEVICE Pack<T, V> load(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}
template <int V, class T>
FUSEDRNN_DEVICE Pack<T, V> load_or_zeros(const T* p) {
  return p ? load<V>(p) : Pack<T, V>{};
}
template <int V, class T>
FUSEDRNN_DEVICE void store(T* p, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}
template <int V, class S, class T>
FUSEDRNN_DEVICE Pack<S, V> rounded(const Pack<T, V>& pack) {
  Pack<S, V> to;
  unroll<V>([&](auto v) { round_to(to.value[v], pack.value[v]); });
  return to;
}
template <class T>
FUSEDRNN_DEVICE const T* row_of(const T* p, int64_t row, int64_t stride) {
  return p ? p + row * stride : nullptr;
}

FUSEDRNN_DEVICE bool is_active(const StepRows& s, int64_t row) {
  return !s.lengths || s.lengths[row] > s.t;
}
template <class T>
FUSEDRNN_DEVICE bool has_before(const StepBack<T>& s, int64_t row) {
  return s.before >= 0 && row < s.rows_before && (!s.lengths || s.lengths[row] > s.before);
}

/// The gradient of the output, where the row takes part; dh keeps it where not.
template <int V, class T>
FUSEDRNN_DEVICE Pack<T, V> take_gradient(const StepBack<T>& s, int64_t row, int64_t feature,
                                         int64_t features, bool part) {
  const int64_t at = row * features + feature;
  Pack<T, V> dh = load<V>(s.dh + at);
  const Pack<T, V> product = load<V>(s.product + at);
  unroll<V>([&](auto v) { dh.value[v] += product.value[v]; });
  store(s.dh + at, part ? Pack<T, V>{} : dh);
  if (part && s.dy) {
    const Pack<T, V> dy = load<V>(s.dy + row * s.dy_stride + feature);
    unroll<V>([&](auto v) { dh.value[v] += dy.value[v]; });
  }
  return dh;
}

/// One thread for V neighbouring features of a row.
template <int V>
struct RowKernel {
  static constexpr int kThreads = 256;
  struct Place {
    int64_t row, feature;
  };
  /// row < 0: nothing to do.
  static FUSEDRNN_DEVICE Place place(int64_t rows, int64_t features) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, per_row = features / V;
    if (i >= rows * per_row) return {-1, 0};
    if (rows * per_row <= UINT32_MAX) {  // a division of 64 bits takes several times as long
      const uint32_t row = uint32_t(i) / uint32_t(per_row);
      return {row, int64_t(uint32_t(i) - row * uint32_t(per_row)) * V};
    }
    return {i / per_row, i % per_row * V};
  }
};

template <class Cell, class S, int V>
struct ForwardStepKernel : RowKernel<V> {
  using T = Accumulator<S>;
  ForwardStep<S> s;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const int64_t H = s.hidden_size;
    const auto place = this->place(s.rows, H);
    const int64_t row = place.row, u = place.feature;
    if (row < 0 || !is_active(s, row)) return;
    Pack<T, V> sum[Cell::kPreacts] = {};
    unroll<Cell::kGates>([&](auto g) {
      constexpr int in = Cell::input_preact[g], hidden = Cell::hidden_preact[g];
      const int64_t at = g * H + u, row_at = row * Cell::kGates * H + at;
      const Pack<T, V> x = load<V>(s.x_product + row_at);
      const Pack<T, V> h = load_or_zeros<V>(row_of(s.h_product, 1, row_at));
      const Pack<S, V> b_ih = load_or_zeros<V>(row_of(s.bias_ih, 1, at));
      const Pack<S, V> b_hh = load_or_zeros<V>(row_of(s.bias_hh, 1, at));
      unroll<V>([&](auto v) {
        sum[in].value[v] += x.value[v] + value_of(b_ih.value[v]);
        sum[hidden].value[v] += h.value[v] + value_of(b_hh.value[v]);
      });
    });
    Pack<T, V> state = load<V>(s.state + row * H + u), out, saved[Cell::kSaved];
    unroll<V>([&](auto v) {
      T sums[Cell::kPreacts], kept[Cell::kSaved];
      unroll<Cell::kPreacts>([&](auto k) { sums[k] = sum[k].value[v]; });
      out.value[v] = Cell::forward(sums, state.value[v], kept);
      unroll<Cell::kSaved>([&](auto a) { saved[a].value[v] = kept[a]; });
    });
    store(s.state + row * H + u, state);
    const Pack<S, V> h = rounded<V, S>(out);
    store(s.h + row * H + u, h);
    if (s.y) store(s.y + row * s.y_stride + u, h);
    if (s.saved) {
      unroll<Cell::kSaved>(
          [&](auto a) { store(s.saved + (row * Cell::kSaved + a) * H + u, saved[a]); });
    }
  }
};

template <class S, int V>
struct ProjectedStepKernel : RowKernel<V> {
  ProjectedStep<S> s;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const int64_t P = s.output_size;
    const auto place = this->place(s.rows, P);
    const int64_t row = place.row, u = place.feature;
    if (row < 0 || !is_active(s, row)) return;
    const Pack<S, V> h = rounded<V, S>(load<V>(s.r + row * P + u));
    store(s.h + row * P + u, h);
    store(s.y + row * s.y_stride + u, h);
  }
};

template <class Cell, class S, int V>
struct BackwardStepKernel : RowKernel<V> {
  using T = Accumulator<S>;
  BackwardStep<S> s;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const int64_t H = s.hidden_size;
    const auto place = this->place(s.rows, H);
    const int64_t row = place.row, u = place.feature;
    if (row < 0) return;
    const bool part = is_active(s, row);
    const Pack<T, V> dh =
        s.dh_raw ? load<V>(s.dh_raw + row * H + u) : take_gradient<V>(s, row, u, H, part);
    if (!part) {
      if (s.dhidden) {  // used again each step
        unroll<Cell::kGates>(
            [&](auto g) { store(s.dhidden + (row * Cell::kGates + g) * H + u, Pack<S, V>{}); });
      }
      return;
    }
    const auto load_saved = [&](Pack<T, V>(&to)[Cell::kSaved], const T* from) {
      unroll<Cell::kSaved>(
          [&](auto a) { to[a] = load<V>(from + (row * Cell::kSaved + a) * H + u); });
    };
    Pack<T, V> state = {}, h = {}, saved[Cell::kSaved];
    const T* const h0 = row_of(s.h0, row, s.h0_stride);
    if (has_before(s, row)) {
      load_saved(saved, s.saved_before);
      unroll<V>([&](auto v) {
        T kept[Cell::kSaved];
        unroll<Cell::kSaved>([&](auto a) { kept[a] = saved[a].value[v]; });
        state.value[v] = kept[Cell::kSavedState];
        h.value[v] = Cell::output(kept);
      });
    } else {
      const T* const state0 = !Cell::kHasCellState ? h0 : row_of(s.c0, row, s.c0_stride);
      if (state0) state = load<V>(state0 + u);
      if (h0 && s.h_previous) h = load<V>(h0 + u);
    }
    if (s.h_previous) store(s.h_previous + row * H + u, rounded<V, S>(h));

    load_saved(saved, s.saved);
    Pack<T, V> dstate = load<V>(s.dstate + row * H + u), raw, dgates[Cell::kPreacts];
    unroll<V>([&](auto v) {
      T kept[Cell::kSaved], dgate[Cell::kPreacts];
      unroll<Cell::kSaved>([&](auto a) { kept[a] = saved[a].value[v]; });
      Cell::backward(kept, state.value[v], dh.value[v], dstate.value[v], dgate);
      unroll<Cell::kPreacts>([&](auto k) { dgates[k].value[v] = dgate[k]; });
      raw.value[v] = Cell::output(kept);
    });
    store(s.dstate + row * H + u, dstate);
    unroll<Cell::kPreacts>(
        [&](auto k) { store(s.dgates + (row * Cell::kPreacts + k) * H + u, rounded<V, S>(dgates[k])); });
    if (s.dhidden) {
      unroll<Cell::kGates>([&](auto g) {
        constexpr int hidden = Cell::hidden_preact[g];
        store(s.dhidden + (row * Cell::kGates + g) * H + u, rounded<V, S>(dgates[hidden]));
      });
    }
    if (s.h_raw) store(s.h_raw + row * H + u, rounded<V, S>(raw));
  }
};

template <class S, int V>
struct ProjectedStepBackKernel : RowKernel<V> {
  using T = Accumulator<S>;
  ProjectedStepBack<S> s;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const int64_t P = s.output_size;
    const auto place = this->place(s.rows, P);
    const int64_t row = place.row, u = place.feature;
    if (row < 0) return;
    const bool part = is_active(s, row);
    const Pack<T, V> dh = take_gradient<V>(s, row, u, P, part);
    if (!part) return;
    const T* const before =
        has_before(s, row) ? s.y_before + row * s.y_stride : row_of(s.h0, row, s.h0_stride);
    const Pack<T, V> h = load_or_zeros<V>(row_of(before, 1, u));
    store(s.h_previous + row * P + u, rounded<V, S>(h));
    store(s.dr + row * P + u, rounded<V, S>(dh));
  }
};

/// Whether pointers and strides of T allow accesses of V elements. Null is a multiple of anything.
template <int V, class T>
bool fits(std::initializer_list<const T*> pointers, std::initializer_list<int64_t> strides) {
  bool fit = true;
  for (const T* p : pointers) fit &= reinterpret_cast<uintptr_t>(p) % (V * sizeof(T)) == 0;
  for (int64_t stride : strides) fit &= stride % V == 0;
  return fit;
}

/// Launches the kernel K<V> on `s` for the largest V that `fit` says.
template <template <int> class Kernel, int V, class Step>
int launch_rows(const Step& s, int64_t features, bool fit, void* stream) {
  const auto run = [&](auto v) {
    Kernel<v> kernel;
    kernel.s = s;
    const int64_t work = s.rows * (features / v), threads = Kernel<v>::kThreads;
    return work == 0 ? 0 : launch(kernel, {unsigned((work + threads - 1) / threads)}, stream);
  };
  return fit ? run(std::integral_constant<int, V>{}) : run(std::integral_constant<int, 1>{});
}

/// Elements of the type of sums in an access of 16 bytes.
template <class S>
constexpr int kVector = 16 / sizeof(Accumulator<S>);

constexpr int kUploaded = 440;  // that many fill the 4 KB that a kernel's arguments may take

struct UploadKernel {
  static constexpr int kThreads = kUploaded;
  int64_t numbers[kUploaded];
  int count;
  int64_t* to;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    if (int(threadIdx.x) < count) to[threadIdx.x] = numbers[threadIdx.x];
  }
};

template <class Cell, class S>
struct Kernels {
  template <int V>
  using Forward = ForwardStepKernel<Cell, S, V>;
  template <int V>
  using Projected = ProjectedStepKernel<S, V>;
  template <int V>
  using Backward = BackwardStepKernel<Cell, S, V>;
  template <int V>
  using ProjectedBack = ProjectedStepBackKernel<S, V>;
};

}  // namespace

template <class Cell, class S>
int forward_step(const ForwardStep<S>& s, void* stream) {
  constexpr int V = kVector<S>;
  using T = Accumulator<S>;
  const bool fit = fits<V, T>({s.x_product, s.h_product, s.state, s.saved}, {s.hidden_size}) &&
                   fits<V, S>({s.bias_ih, s.bias_hh, s.h, s.y}, {s.y_stride});
  return launch_rows<Kernels<Cell, S>::template Forward, V>(s, s.hidden_size, fit, stream);
}

template <class S>
int projected_step(const ProjectedStep<S>& s, void* stream) {
  constexpr int V = kVector<S>;
  const bool fit =
      fits<V, Accumulator<S>>({s.r}, {s.output_size}) && fits<V, S>({s.h, s.y}, {s.y_stride});
  return launch_rows<Kernels<Lstm, S>::template Projected, V>(s, s.output_size, fit, stream);
}

template <class Cell, class S>
int backward_step(const BackwardStep<S>& s, void* stream) {
  constexpr int V = kVector<S>;
  using T = Accumulator<S>;
  const bool fit =
      fits<V, T>({s.saved, s.saved_before, s.h0, s.c0, s.dy, s.product, s.dh, s.dh_raw, s.dstate},
                 {s.hidden_size, s.h0_stride, s.c0_stride, s.dy_stride}) &&
      fits<V, S>({s.dgates, s.dhidden, s.h_previous, s.h_raw}, {});
  return launch_rows<Kernels<Cell, S>::template Backward, V>(s, s.hidden_size, fit, stream);
}

template <class S>
int projected_step_back(const ProjectedStepBack<S>& s, void* stream) {
  constexpr int V = kVector<S>;
  const bool fit = fits<V, Accumulator<S>>({s.y_before, s.h0, s.dy, s.product, s.dh},
                                     {s.output_size, s.y_stride, s.h0_stride, s.dy_stride}) &&
                   fits<V, S>({s.dr, s.h_previous}, {});
  return launch_rows<Kernels<Lstm, S>::template ProjectedBack, V>(s, s.output_size, fit, stream);
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

#define FUSEDRNN_STEPS_OF(S)                                          \
  template int forward_step<Lstm, S>(const ForwardStep<S>&, void*);   \
  template int forward_step<Gru, S>(const ForwardStep<S>&, void*);    \
  template int backward_step<Lstm, S>(const BackwardStep<S>&, void*); \
  template int backward_step<Gru, S>(const BackwardStep<S>&, void*);  \
  template int projected_step<S>(const ProjectedStep<S>&, void*);     \
  template int projected_step_back<S>(const ProjectedStepBack<S>&, void*);
FUSEDRNN_STEPS_OF(float)
FUSEDRNN_STEPS_OF(double)
FUSEDRNN_STEPS_OF(BFloat16)
FUSEDRNN_STEPS_OF(Float16)

}  // namespace fusedrnn::cuda
