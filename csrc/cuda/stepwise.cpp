#include "stepwise.h"

#include "kernel_table.h"

namespace fusedrnn::cuda {
namespace {

void copy_or_zero(const Tensor& to, const Tensor& from, int64_t d) {
  from.defined() ? to.copy_(from[d]) : to.zero_();
}
Tensor first_rows(const Tensor& t, int64_t rows) { return t.narrow(0, 0, rows); }

/// One direction's forward steps.
template <class Element>
class ForwardSteps {
 public:
  using Accum = Accumulator<Element>;

  ForwardSteps(const Layer& layer, const TokenMap& tokens, const LaunchContext& context,
               LayerOutput& out, const Tensor& x, int64_t d)
      : layer_(layer),
        tokens_(tokens),
        context_(context),
        out_(out),
        d_(d),
        weight_hh_(layer.weights[size_t(d)].hh.t()),
        h_(out.h_n[d]),
        state_(new_tensor<Accum>(layer, {layer.B, layer.H})),
        x_product_(input_product<Element>(layer, x, d, context.precision)),
        h_product_(new_tensor<Accum>(layer, {layer.B, layer.cell.gates * layer.H})) {
    copy_or_zero(h_, layer.h0, d);
    copy_or_zero(state_, layer.cell.has_cell_state ? layer.c0 : layer.h0, d);
    if (!layer.has_projection) return;
    weight_hr_ = weights().hr.t();
    raw_ = new_tensor<Element>(layer, {layer.B, layer.H});
    projected_ = new_tensor<Accum>(layer, {layer.B, layer.P});
  }

  void run() {
    for (int64_t i = 0; i < layer_.T; ++i) {
      const int64_t t = tokens_.time(i, d_ == 1);
      step(t, i == 0 && !layer_.h0.defined());
      if (layer_.has_projection) project(t);
    }
    if (layer_.cell.has_cell_state) out_.c_n[d_].copy_(state_);
  }

 private:
  Element* y(int64_t t) const {
    return data_of<Element>(out_.output, (tokens_.token(t) * layer_.D + d_) * layer_.P);
  }

  void step(int64_t t, bool h_is_zero) {
    const DirectionWeights& w = weights();
    const int64_t H = layer_.H, token = tokens_.token(t);
    ForwardStepParams<Element> p;
    static_cast<StepRows&>(p) = tokens_.step_rows(t);
    if (!h_is_zero) {
      multiply(first_rows(h_product_, p.rows), first_rows(h_, p.rows), weight_hh_, false,
               context_.precision);
      p.h_product = const_data_of<Accum>(h_product_);
    }
    p.hidden_size = H;
    p.x_product = const_data_of<Accum>(x_product_, token * layer_.cell.gates * H);
    p.bias_ih = const_data_of<Element>(w.bias_ih);
    p.bias_hh = const_data_of<Element>(w.bias_hh);
    p.state = data_of<Accum>(state_);
    p.h = data_of<Element>(layer_.has_projection ? raw_ : h_);
    p.y = layer_.has_projection ? nullptr : y(t);
    p.y_stride = layer_.D * layer_.P;
    if (out_.saved.numel() > 0) {
      p.saved = data_of<Accum>(out_.saved, (d_ * layer_.N + token) * layer_.cell.saved * H);
    }
    check(step_kernels<Element>(layer_.cell.index).forward(p, context_.stream));
  }

  void project(int64_t t) {
    ProjectionStepParams<Element> p;
    static_cast<StepRows&>(p) = tokens_.step_rows(t);
    multiply(first_rows(projected_, p.rows), first_rows(raw_, p.rows), weight_hr_, false,
             context_.precision);
    p.output_size = layer_.P;
    p.r = const_data_of<Accum>(projected_);
    p.h = data_of<Element>(h_);
    p.y = y(t);
    p.y_stride = layer_.D * layer_.P;
    check(projection_step(p, context_.stream));
  }

  const DirectionWeights& weights() const { return layer_.weights[size_t(d_)]; }

  const Layer& layer_;
  const TokenMap& tokens_;
  const LaunchContext& context_;
  LayerOutput& out_;
  const int64_t d_;
  Tensor weight_hh_, weight_hr_;  ///< [P, G*H], [H, P] transposed for the GEMMs
  Tensor h_, state_;              ///< [B, P], [B, H] carried from step to step
  Tensor x_product_;              ///< [N, G*H]
  Tensor h_product_;              ///< [B, G*H]
  Tensor raw_, projected_;        ///< [B, H], [B, P]; projected only
};

/// One direction's backward steps.
template <class Element>
class BackwardSteps {
 public:
  using Accum = Accumulator<Element>;

  BackwardSteps(const Layer& layer, const TokenMap& tokens, const OutputGradients& gradients,
                const LaunchContext& context, StepGradients& out, int64_t d)
      : layer_(layer),
        tokens_(tokens),
        gradients_(gradients),
        context_(context),
        out_(out),
        gates_(out.gates),
        d_(d),
        dh_(new_tensor<Accum>(layer, {layer.B, layer.P})),
        dstate_(new_tensor<Accum>(layer, {layer.B, layer.H})),
        // Zero for rows whose last step is still to come.
        product_(new_zeros<Accum>(layer, {layer.B, layer.P})) {
    copy_or_zero(dh_, gradients.dh_n, d);
    copy_or_zero(dstate_, gradients.dc_n, d);
    if (layer.cell.preacts > layer.cell.gates) {
      dhidden_ = new_tensor<Element>(layer, {layer.B, layer.cell.gates * layer.H});
    }
    if (layer.has_projection) dh_raw_ = new_tensor<Accum>(layer, {layer.B, layer.H});
  }

  void run() {
    for (int64_t i = layer_.T - 1; i >= 0; --i) {
      if (layer_.has_projection) project(i);
      step(i);
    }
    dh_.add_(product_);
    if (!layer_.cell.has_cell_state) dh_.add_(dstate_);
    out_.dh0[d_].copy_(dh_);
    if (layer_.cell.has_cell_state) out_.dc0[d_].copy_(dstate_);
  }

 private:
  /// For the i-th step.
  OutputGradientParams<Element> output_gradient(int64_t i) const {
    const int64_t t = tokens_.time(i, d_ == 1), P = layer_.P;
    OutputGradientParams<Element> p;
    static_cast<StepRows&>(p) = tokens_.step_rows(t);
    p.previous = tokens_.time(i - 1, d_ == 1);
    p.previous_rows = tokens_.rows(p.previous);
    p.dy = const_data_of<Element>(gradients_.dy, (tokens_.token(t) * layer_.D + d_) * P);
    p.dy_stride = layer_.D * P;
    p.product = const_data_of<Accum>(product_);
    p.dh = data_of<Accum>(dh_);
    return p;
  }
  /// Row 0's token at time t, in tensors of all directions.
  int64_t token(int64_t t) const { return d_ * layer_.N + tokens_.token(t); }
  /// A step's rows in a tensor [D, N, features].
  Tensor step_of(const Tensor& t, const StepRows& step) const {
    return t[d_].narrow(0, tokens_.token(step.t), step.rows);
  }

  void project(int64_t i) {
    const int64_t D = layer_.D, P = layer_.P;
    ProjectionBackwardStepParams<Element> p;
    static_cast<OutputGradientParams<Element>&>(p) = output_gradient(i);
    p.output_size = P;
    p.previous_y =
        const_data_of<Element>(gradients_.output, (tokens_.token(p.previous) * D + d_) * P);
    p.y_stride = D * P;
    p.h0 = initial_state<Element>(layer_.h0, d_);
    p.h0_stride = row_stride(layer_.h0);
    p.dr = data_of<Element>(gates_.dr, token(p.t) * P);
    p.h_previous = data_of<Element>(gates_.h_previous, token(p.t) * P);
    check(projection_backward_step(p, context_.stream));
    multiply(first_rows(dh_raw_, p.rows), step_of(gates_.dr, p), weights().hr, false,
             context_.precision);
  }

  void step(int64_t i) {
    const int64_t H = layer_.H, saved = layer_.cell.saved * H;
    BackwardStepParams<Element> p;
    static_cast<OutputGradientParams<Element>&>(p) = output_gradient(i);
    if (layer_.has_projection) p.dy = nullptr;
    p.hidden_size = H;
    p.saved = const_data_of<Accum>(gradients_.saved, token(p.t) * saved);
    p.previous_saved = const_data_of<Accum>(gradients_.saved, token(p.previous) * saved);
    p.h0 = initial_state<Element>(layer_.h0, d_);
    p.c0 = initial_state<Element>(layer_.c0, d_);
    p.h0_stride = row_stride(layer_.h0);
    p.c0_stride = row_stride(layer_.c0);
    p.dh_raw = const_data_of<Accum>(dh_raw_);
    p.dstate = data_of<Accum>(dstate_);
    p.dgates = data_of<Element>(gates_.dgates, token(p.t) * layer_.cell.preacts * H);
    p.dhidden = data_of<Element>(dhidden_);
    if (!layer_.has_projection) {
      p.h_previous = data_of<Element>(gates_.h_previous, token(p.t) * H);
    }
    p.h_raw = data_of<Element>(gates_.h_raw, token(p.t) * H);
    check(step_kernels<Element>(layer_.cell.index).backward(p, context_.stream));
    const Tensor dhidden =
        dhidden_.defined() ? first_rows(dhidden_, p.rows) : step_of(gates_.dgates, p);
    multiply(first_rows(product_, p.rows), dhidden, weights().hh, false, context_.precision);
  }

  const DirectionWeights& weights() const { return layer_.weights[size_t(d_)]; }

  const Layer& layer_;
  const TokenMap& tokens_;
  const OutputGradients& gradients_;
  const LaunchContext& context_;
  StepGradients& out_;
  const GateGradients& gates_;
  const int64_t d_;
  Tensor dh_, dstate_;  ///< [B, P], [B, H] carried from step to step
  Tensor product_;      ///< [B, P] the previous output's gradient through weight_hh
  /// [B, G*H] for cells whose weight_hh feeds only some pre-activations; else undefined.
  Tensor dhidden_;
  Tensor dh_raw_;  ///< [B, H]; projected only
};

}  // namespace

template <class Element>
void run_forward_stepwise(const Layer& layer, const LaunchContext& context, LayerOutput& out) {
  const TokenMap tokens(layer);
  const Tensor x = layer.flat_input();
  for (int64_t d = 0; d < layer.D; ++d) {
    ForwardSteps<Element>(layer, tokens, context, out, x, d).run();
  }
}

template <class Element>
void run_backward_stepwise(const Layer& layer, const OutputGradients& gradients,
                           const LaunchContext& context, StepGradients& out) {
  const TokenMap tokens(layer);
  for (int64_t d = 0; d < layer.D; ++d) {
    BackwardSteps<Element>(layer, tokens, gradients, context, out, d).run();
  }
}

#define FUSEDRNN_STEPWISE_OF(Element)                                                            \
  template void run_forward_stepwise<Element>(const Layer&, const LaunchContext&, LayerOutput&); \
  template void run_backward_stepwise<Element>(const Layer&, const OutputGradients&,             \
                                               const LaunchContext&, StepGradients&);
FUSEDRNN_STEPWISE_OF(float)
FUSEDRNN_STEPWISE_OF(double)
FUSEDRNN_STEPWISE_OF(BFloat16)
FUSEDRNN_STEPWISE_OF(Float16)

}  // namespace fusedrnn::cuda
