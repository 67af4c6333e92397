// The ops on CUDA: allocates, multiplies, launches. Nothing here waits for the device.
//
// A layer runs in one launch where its weights fit into the registers of the device and that pays
// (regime_of), else step by step: a product and a kernel a step, for any size and type.
#include "layer_cuda.h"

#include <torch/library.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cstdlib>
#include <string_view>

#include "../layer.h"
#include "device.h"

namespace fusedrnn::cuda {
namespace {

template <class S>
using ScalarOf = std::conditional_t<std::is_same_v<S, BFloat16>, at::BFloat16,
                                    std::conditional_t<std::is_same_v<S, Float16>, at::Half, S>>;

template <class S>
at::TensorOptions options_of(const Layer& layer) {
  return layer.options().dtype(c10::CppTypeToScalarType<ScalarOf<S>>::value);
}
template <class S>
Tensor new_tensor(const Layer& layer, c10::IntArrayRef shape) {
  return at::empty(shape, options_of<S>(layer));
}
template <class S>
Tensor new_zeros(const Layer& layer, c10::IntArrayRef shape) {
  return at::zeros(shape, options_of<S>(layer));
}

/// Zeros where lengths may leave positions out.
template <class S>
Tensor new_at_positions(const Layer& layer, c10::IntArrayRef shape) {
  return layer.lengths.defined() ? new_zeros<S>(layer, shape) : new_tensor<S>(layer, shape);
}

/// The data of a tensor, `offset` elements on; null if it is undefined.
template <class S>
S* data_of(const Tensor& t, int64_t offset = 0) {
  return t.defined() ? static_cast<S*>(t.mutable_data_ptr()) + offset : nullptr;
}
template <class S>
const S* const_data_of(const Tensor& t, int64_t offset = 0) {
  return t.defined() ? static_cast<const S*>(t.const_data_ptr()) + offset : nullptr;
}

/// Where the steps of a layer have their rows, and who takes part.
class Steps {
 public:
  explicit Steps(const Layer& layer) : layer_(layer), steps_(layer.T), rows_(layer.B) {
    if (!layer.packed) return;
    position_.reserve(layer.T + 1);
    position_.push_back(0);
    for (const int64_t size : layer.batch_sizes) position_.push_back(position_.back() + size);
  }
  /// The time of the i-th step of a direction; -1 before its first.
  int64_t time(int64_t i, bool reverse) const { return i < 0 || !reverse ? i : steps_ - 1 - i; }
  int64_t position(int64_t t) const { return layer_.packed ? position_[t] : t * rows_; }
  int64_t rows(int64_t t) const { return layer_.packed ? layer_.batch_sizes[t] : rows_; }
  void set(StepRows& s, int64_t t) const {
    s.rows = rows(t);
    s.t = t;
    s.lengths = const_data_of<int64_t>(layer_.lengths);
  }
  /// For the i-th step of a direction.
  template <class T>
  void set(StepBack<T>& s, int64_t i, bool reverse) const {
    set(static_cast<StepRows&>(s), time(i, reverse));
    s.before = time(i - 1, reverse);
    s.rows_before = s.before < 0 ? 0 : rows(s.before);
  }
  /// [T + 1] on the device; undefined unless packed.
  Tensor upload(const Device& device) const {
    if (!layer_.packed) return {};
    const Tensor t = at::empty({steps_ + 1}, layer_.options().dtype(at::kLong));
    check(cuda::upload(position_.data(), steps_ + 1, t.mutable_data_ptr<int64_t>(), device.stream));
    return t;
  }

 private:
  const Layer& layer_;
  int64_t steps_, rows_;
  std::vector<int64_t> position_;
};

/// Few steps are not worth the launch that loads all weights first. [G]
constexpr int64_t kFewSteps = 4;

/// FUSEDRNN_CUDA_REGIME=step, alone, cluster or grid asks for a regime by name, for tests; empty:
/// for the best.
std::string_view asked_regime() {
  const char* asked = std::getenv("FUSEDRNN_CUDA_REGIME");
  const std::string_view regime = asked ? asked : "";
  TORCH_CHECK(regime.empty() || regime == "step" || regime == "alone" || regime == "cluster" ||
                  regime == "grid",
              "FUSEDRNN_CUDA_REGIME=", regime, " is none of step, alone, cluster and grid");
  return regime;
}

/// The cut of a layer for a regime of one launch, empty for any; no groups: it can't run so.
template <class Cell, class S>
Cut cut_for(std::string_view regime, const Layer& layer, const Device& device, bool backward,
            Precision precision) {
  const int64_t bytes = layer.input.element_size();
  if (layer.has_projection || bytes == 8) return {};
  if constexpr (sizeof(S) <= 4) {
    if (regime == "cluster") {
      const Cut cut = cluster_cut_of(layer.T, layer.B, layer.H, bytes);
      if (cut.groups == 0) return {};
      const int clusters = recurrent_clusters<Cell, S>(cut, backward, precision);
      return clusters > 0 ? spread(cut, layer.B, layer.D, clusters) : Cut{};
    }
  }
  const Cut cut =
      cut_of(layer.T, layer.B, layer.H, layer.D, bytes, device.multiprocessors, regime == "grid");
  return regime == "alone" && cut.reach != Reach::cta ? Cut{} : cut;
}

/// A regime that was asked for by name runs, or ends the call: nothing else takes its place.
void check_regime(bool runs, const Layer& layer, Precision precision) {
  TORCH_CHECK(runs || asked_regime().empty(), "FUSEDRNN_CUDA_REGIME=", asked_regime(),
              ": this device can't run a layer so that has ", layer.H, " hidden units, ", layer.B,
              " rows and ", layer.D, layer.D == 1 ? " direction" : " directions", " in ",
              layer.type,
              layer.type != at::kFloat       ? ""
              : precision == Precision::tf32 ? " (TF32)"
                                             : " (IEEE)",
              layer.has_projection ? " with a projection" : "");
}

/// The cut of a layer that runs in one launch; no groups: it goes step by step.
///
/// Clusters run only where they are asked for, until a GPU has shown what they gain over the grid
/// (`python -m benchmarks checks`).
template <class Cell, class S>
Cut regime_of(const Layer& layer, const Device& device, bool backward, Precision precision) {
  const std::string_view regime = asked_regime();
  if (regime == "step" || layer.B == 0 || (regime.empty() && layer.T <= kFewSteps)) return {};
  const Cut cut = cut_for<Cell, S>(regime, layer, device, backward, precision);
  check_regime(cut.groups > 0, layer, precision);
  return cut;
}

void set(Recurrence& r, const Layer& layer, const Cut& cut, const Tensor& position,
         const Tensor& arrivals) {
  r.steps = int(layer.T);
  r.rows = int(layer.B);
  r.hidden_size = int(layer.H);
  r.directions = int(layer.D);
  r.tile_rows = int(cut.tile_rows);
  r.lengths = const_data_of<int64_t>(layer.lengths);
  r.position = const_data_of<int64_t>(position);
  r.arrivals = reinterpret_cast<uint32_t*>(data_of<int32_t>(arrivals));
}

/// Counts of arrivals and room for what CTAs tell each other: two halves of `parts` values of each
/// unit. They are there for a grid alone.
template <class S>
struct Exchange {
  Exchange(const Layer& layer, const Cut& cut, int64_t parts) {
    if (cut.reach != Reach::grid) return;
    arrivals = at::zeros({layer.D, cut.groups}, layer.options().dtype(at::kInt));
    operands = new_zeros<S>(layer, {layer.D, 2, cut.groups * cut.tile_rows, parts * cut.depth});
  }
  S* direction(int64_t d) const {
    return operands.defined() ? data_of<S>(operands, d * operands.stride(0)) : nullptr;
  }
  Tensor arrivals, operands;
};

void check_lengths(const Layer& layer) {
  if (!layer.lengths.defined()) return;
  check_later(layer.lengths.lt(0).logical_or(layer.lengths.gt(layer.T)),
              "lengths must be from 0 to the sequence length");
}

template <class Cell, class S>
LayerOutput forward(const Layer& layer, bool save) {
  using T = Accumulator<S>;
  constexpr int64_t G = Cell::kGates, A = Cell::kSaved;
  const Device device(layer.input);
  const Precision precision = rnn_precision();
  const Steps steps(layer);
  const int64_t D = layer.D, B = layer.B, N = layer.N, H = layer.H, P = layer.P;
  check_lengths(layer);

  LayerOutput out;
  out.output = new_at_positions<S>(layer, layer.shape(D * P));
  out.h_n = new_tensor<S>(layer, {D, B, P});
  Tensor c_n;
  if (layer.cell.has_cell_state) c_n = new_tensor<T>(layer, {D, B, H});
  out.saved = save ? new_at_positions<T>(layer, {D, N, A, H}) : new_tensor<T>(layer, {0});
  const auto saved_of = [&](int64_t d, int64_t position) {
    return save ? data_of<T>(out.saved, (d * N + position) * A * H) : nullptr;
  };
  const Tensor x = layer.flat_input();
  const auto multiply_input = [&](int64_t d) {
    const Tensor product = new_tensor<T>(layer, {N, G * H});
    multiply(product, x, layer.weights[d].ih.t(), false, precision);
    return product;
  };

  bool done = false;
  if (const Cut cut = regime_of<Cell, S>(layer, device, false, precision); cut.groups > 0) {
    if constexpr (!std::is_same_v<S, double>) {
      const Tensor position = steps.upload(device);
      const Exchange<S> exchange(layer, cut, 1);
      RecurrentForward<S> run;
      set(run, layer, cut, position, exchange.arrivals);
      std::vector<Tensor> products;
      for (int64_t d = 0; d < D; ++d) {
        const DirectionWeights& w = layer.weights[d];
        auto& of = run.direction[d];
        of.weight_hh = const_data_of<S>(w.hh);
        of.bias_ih = const_data_of<S>(w.bias_ih);
        of.bias_hh = const_data_of<S>(w.bias_hh);
        products.push_back(multiply_input(d));
        of.x_product = const_data_of<T>(products.back());
        if (layer.h0.defined()) of.h0 = const_data_of<T>(layer.h0, d * layer.h0.stride(0));
        if (layer.c0.defined()) of.c0 = const_data_of<T>(layer.c0, d * layer.c0.stride(0));
        of.y = data_of<S>(out.output, d * H);
        of.h_n = data_of<S>(out.h_n, d * B * H);
        of.c_n = data_of<T>(c_n, d * B * H);
        of.saved = saved_of(d, 0);
        of.exchange = exchange.direction(d);
      }
      run.h0_stride = layer.h0.defined() ? layer.h0.stride(1) : 0;
      run.c0_stride = layer.c0.defined() ? layer.c0.stride(1) : 0;
      run.y_stride = D * H;
      done = launched(recurrent_forward<Cell>(run, cut, precision, device.stream));
      check_regime(done, layer, precision);
    }
  }
  if (!done) {
    const Tensor h_product = new_tensor<T>(layer, {B, G * H});
    Tensor raw, projected;
    if (layer.has_projection) {
      raw = new_tensor<S>(layer, {B, H});
      projected = new_tensor<T>(layer, {B, P});
    }
    for (int64_t d = 0; d < D; ++d) {
      const DirectionWeights& w = layer.weights[d];
      const Tensor x_product = multiply_input(d), h = out.h_n[d];
      const Tensor state = !Cell::kHasCellState ? new_tensor<T>(layer, {B, H}) : c_n[d];
      const auto start = [d](const Tensor& to, const Tensor& from) {
        from.defined() ? to.copy_(from[d]) : to.zero_();
      };
      start(h, layer.h0);
      start(state, !Cell::kHasCellState ? layer.h0 : layer.c0);
      const Tensor hh = w.hh.t(), hr = layer.has_projection ? w.hr.t() : Tensor();
      for (int64_t i = 0; i < layer.T; ++i) {
        const int64_t t = steps.time(i, d == 1), position = steps.position(t);
        ForwardStep<S> s;
        steps.set(s, t);
        const bool zero = i == 0 && !layer.h0.defined();
        if (!zero)
          multiply(h_product.narrow(0, 0, s.rows), h.narrow(0, 0, s.rows), hh, false, precision);
        s.hidden_size = H;
        s.x_product = const_data_of<T>(x_product, position * G * H);
        s.h_product = zero ? nullptr : const_data_of<T>(h_product);
        s.bias_ih = const_data_of<S>(w.bias_ih);
        s.bias_hh = const_data_of<S>(w.bias_hh);
        s.state = data_of<T>(state);
        S* const y = data_of<S>(out.output, position * D * P + d * P);
        s.h = data_of<S>(layer.has_projection ? raw : h);
        s.y = layer.has_projection ? nullptr : y;
        s.y_stride = D * P;
        s.saved = saved_of(d, position);
        check(forward_step<Cell>(s, device.stream));
        if (layer.has_projection) {
          multiply(projected.narrow(0, 0, s.rows), raw.narrow(0, 0, s.rows), hr, false, precision);
          ProjectedStep<S> p;
          steps.set(p, t);
          p.output_size = P;
          p.r = const_data_of<T>(projected);
          p.h = data_of<S>(h);
          p.y = y;
          p.y_stride = D * P;
          check(projected_step(p, device.stream));
        }
      }
    }
  }
  if (c_n.defined()) out.c_n = in_type(c_n, layer.type);
  return out;
}

/// The products of weight_gradients.
struct DeviceGemms : Gemms {
  explicit DeviceGemms(Precision p) : precision(p) {}
  void multiply(const Tensor& a, const Tensor& b, const Tensor& out, bool add) const override {
    cuda::multiply(out, a, b, add, precision);
  }
  void multiply_transposed(const Tensor& a, const Tensor& b, const Tensor& out) const override {
    cuda::multiply(out, a.t(), b, false, precision);
  }
  Precision precision;
};

template <class Cell, class S>
LayerGradients backward(const Layer& layer, const OutputGradients& g) {
  using T = Accumulator<S>;
  constexpr int64_t G = Cell::kGates, A = Cell::kSaved, preacts = Cell::kPreacts;
  const Device device(layer.input);
  const Precision precision = rnn_precision();
  const Steps steps(layer);
  const int64_t D = layer.D, B = layer.B, N = layer.N, H = layer.H, P = layer.P;
  const auto positions = [&](int64_t features) {  // padding must not reach the products
    return new_at_positions<S>(layer, {D, N, features});
  };
  const Tensor dgates = positions(preacts * H), h_previous = positions(P);
  Tensor dr, h_raw;
  if (layer.has_projection) {
    dr = positions(P);
    h_raw = positions(H);
  }
  Tensor dh0 = new_tensor<T>(layer, {D, B, P}), dc0;
  if (layer.cell.has_cell_state) dc0 = new_tensor<T>(layer, {D, B, H});
  const auto saved_of = [&](int64_t d, int64_t position) {
    return const_data_of<T>(g.saved, (d * N + position) * A * H);
  };
  const auto initial = [](const Tensor& t, int64_t d) {
    return t.defined() ? const_data_of<T>(t, d * t.stride(0)) : nullptr;
  };
  const int64_t h0_stride = layer.h0.defined() ? layer.h0.stride(1) : 0;
  const int64_t c0_stride = layer.c0.defined() ? layer.c0.stride(1) : 0;

  bool done = false;
  if (const Cut cut = regime_of<Cell, S>(layer, device, true, precision); cut.groups > 0) {
    if constexpr (!std::is_same_v<S, double>) {
      const Tensor position = steps.upload(device);
      const Exchange<S> exchange(layer, cut, G);
      RecurrentBackward<S> run;
      set(run, layer, cut, position, exchange.arrivals);
      for (int64_t d = 0; d < D; ++d) {
        auto& of = run.direction[d];
        of.weight_hh = const_data_of<S>(layer.weights[d].hh);
        of.saved = saved_of(d, 0);
        of.h0 = initial(layer.h0, d);
        of.c0 = initial(layer.c0, d);
        of.dy = const_data_of<T>(g.dy, d * H);
        of.dh_n = const_data_of<T>(g.dh_n, d * B * H);
        of.dc_n = const_data_of<T>(g.dc_n, d * B * H);
        of.dgates = data_of<S>(dgates, d * N * preacts * H);
        of.h_previous = data_of<S>(h_previous, d * N * H);
        of.dh0 = data_of<T>(dh0, d * B * H);
        of.dc0 = data_of<T>(dc0, d * B * H);
        of.exchange = exchange.direction(d);
      }
      run.h0_stride = h0_stride;
      run.c0_stride = c0_stride;
      run.dy_stride = D * H;
      done = launched(recurrent_backward<Cell>(run, cut, precision, device.stream));
      check_regime(done, layer, precision);
    }
  }
  if (!done) {
    // Where the sums that weight_hh feeds are not all of them, they have a copy of their own.
    const Tensor dhidden = preacts > G ? new_tensor<S>(layer, {B, G * H}) : Tensor();
    const Tensor dh_raw = layer.has_projection ? new_tensor<T>(layer, {B, H}) : Tensor();
    for (int64_t d = 0; d < D; ++d) {
      const DirectionWeights& w = layer.weights[d];
      const Tensor dh = dh0[d];
      const Tensor dstate = !Cell::kHasCellState ? new_tensor<T>(layer, {B, H}) : dc0[d];
      const auto start = [d](const Tensor& to, const Tensor& from) {
        from.defined() ? to.copy_(from[d]) : to.zero_();
      };
      start(dh, g.dh_n);
      // Rows that no step has come back to yet are zero.
      const Tensor product = new_zeros<T>(layer, {B, P});
      start(dstate, g.dc_n);
      for (int64_t i = layer.T - 1; i >= 0; --i) {
        const int64_t t = steps.time(i, d == 1), position = steps.position(t);
        const int64_t at = d * N + position, before = steps.time(i - 1, d == 1);
        const int64_t from = before < 0 ? 0 : steps.position(before), rows = steps.rows(t);
        const T* const dy = const_data_of<T>(g.dy, position * D * P + d * P);
        if (layer.has_projection) {
          ProjectedStepBack<S> p;
          steps.set(p, i, d == 1);
          p.output_size = P;
          p.y_before = const_data_of<T>(g.output, from * D * P + d * P);
          p.y_stride = D * P;
          p.h0 = initial(layer.h0, d);
          p.h0_stride = h0_stride;
          p.dy = dy;
          p.dy_stride = D * P;
          p.product = const_data_of<T>(product);
          p.dh = data_of<T>(dh);
          p.dr = data_of<S>(dr, at * P);
          p.h_previous = data_of<S>(h_previous, at * P);
          check(projected_step_back(p, device.stream));
          multiply(dh_raw.narrow(0, 0, rows), dr[d].narrow(0, position, rows), w.hr, false,
                   precision);
        }
        BackwardStep<S> s;
        steps.set(s, i, d == 1);
        s.hidden_size = H;
        s.saved = saved_of(d, position);
        s.saved_before = saved_of(d, from);
        s.h0 = initial(layer.h0, d);
        s.c0 = initial(layer.c0, d);
        s.h0_stride = h0_stride;
        s.c0_stride = c0_stride;
        s.dy = layer.has_projection ? nullptr : dy;
        s.dy_stride = D * P;
        s.product = const_data_of<T>(product);
        s.dh = data_of<T>(dh);
        s.dh_raw = const_data_of<T>(dh_raw);
        s.dstate = data_of<T>(dstate);
        s.dgates = data_of<S>(dgates, at * preacts * H);
        s.dhidden = data_of<S>(dhidden);
        s.h_previous = layer.has_projection ? nullptr : data_of<S>(h_previous, at * H);
        s.h_raw = data_of<S>(h_raw, at * H);
        check(backward_step<Cell>(s, device.stream));
        const Tensor fed =
            dhidden.defined() ? dhidden.narrow(0, 0, rows) : dgates[d].narrow(0, position, rows);
        multiply(product.narrow(0, 0, rows), fed, w.hh, false, precision);
      }
      dh.add_(product);
      if (!Cell::kHasCellState) dh.add_(dstate);
    }
  }

  return layer_gradients(layer, g, {dgates, h_previous, dr, h_raw}, dh0, dc0,
                         DeviceGemms(precision));
}

/// Calls call(S{}) for the type of the layer's operands.
template <class F>
auto with_type(const Layer& layer, const F& call) {
  switch (layer.type) {
    case at::kDouble:
      return call(double{});
    case at::kBFloat16:
      return call(BFloat16{});
    case at::kHalf:
      return call(Float16{});
    default:
      return call(float{});
  }
}

}  // namespace

template <class Cell>
LayerOutput Cuda::forward(const ForwardArgs& args) {
  const Layer layer(cell_info(scalar::Cells::index_of<Cell>()), args, true);
  return with_type(layer,
                   [&](auto s) { return cuda::forward<Cell, decltype(s)>(layer, args.save); });
}
template <class Cell>
LayerGradients Cuda::backward(const BackwardArgs& args) {
  const Layer layer(cell_info(scalar::Cells::index_of<Cell>()), args, true);
  const OutputGradients g(layer, args);
  return with_type(layer, [&](auto s) { return cuda::backward<Cell, decltype(s)>(layer, g); });
}

void register_cuda_ops(torch::Library& m) { register_ops<Cuda>(m); }

}  // namespace fusedrnn::cuda
