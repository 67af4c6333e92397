#include "stepwise.h"

#include "kernel_table.h"

namespace fusedrnn::cuda {
namespace {

/// A matrix whose rows a GEMM can read: a copy if they overlap.
Tensor separate_rows(const Tensor& t) {
  return t.size(0) > 1 && t.stride(0) < t.size(1) ? t.contiguous() : t;
}

/// One direction's forward steps. The time loop has pointers alone: tensors take the host longer
/// than the launches.
template <class Element>
class ForwardSteps {
 public:
  using Accum = Accumulator<Element>;

  ForwardSteps(const Layer& layer, const TokenMap& tokens, const LaunchContext& context,
               LayerOutput& out, const Tensor& x, int64_t d)
      : layer_(layer),
        tokens_(tokens),
        context_(context),
        d_(d),
        is_fused_(plan_fused_step(layer.B, layer.has_projection)),
        h_n_(data_of<Element>(out.h_n, d * layer.B * layer.P)),
        y_(data_of<Element>(out.output, d * layer.P)),
        c_n_(data_of<Element>(out.c_n, d * layer.B * layer.H)) {
    if (out.saved.numel() > 0) {
      saved_ = data_of<Accum>(out.saved, d * layer.N * layer.cell.saved * layer.H);
    }
    set_operands(x);
    p_.hidden_size = layer.H;
    p_.bias_ih = const_data_of<Element>(weights().bias_ih);
    p_.bias_hh = const_data_of<Element>(weights().bias_hh);
    p_.c0 = initial_state<Element>(layer.c0, d);
    p_.c0_stride = row_stride(layer.c0);
    p_.state = data_of<Accum>(state_);
    p_.y_stride = layer.D * layer.P;
  }

  void run() {
    for (int64_t i = 0; i < layer_.T; ++i) {
      step(i);
      if (layer_.has_projection) project(i);
    }
  }

 private:
  /// The tensors that the loop reads or writes.
  void set_operands(const Tensor& x) {
    const int64_t B = layer_.B, H = layer_.H, P = layer_.P, products = layer_.cell.gates * H;
    const bool is_one_step = layer_.T == 1;
    if (!is_one_step) state_ = new_tensor<Accum>(layer_, {B, H});
    if (layer_.h0.defined()) h0_ = is_fused_ ? layer_.h0[d_] : separate_rows(layer_.h0[d_]);
    if (is_fused_ && is_one_step) {
      p_.x = const_data_of<Element>(x);
      p_.x_stride = x.stride(0);
      p_.input_size = layer_.I;
      p_.weight_ih = const_data_of<Element>(weights().ih);
    } else {
      x_product_ = input_product<Element>(layer_, x, d_, context_);
    }
    if (is_fused_) {
      p_.weight_hh = const_data_of<Element>(weights().hh);
      if (!is_one_step) h_ = new_tensor<Element>(layer_, {2, B, H});
      return;
    }
    gemm_hh_.emplace(context_, weights().hh.t(), x_product_.scalar_type());
    h_product_ = new_tensor<Accum>(layer_, {B, products});
    if (!layer_.has_projection) return;
    gemm_hr_.emplace(context_, weights().hr.t(), x_product_.scalar_type());
    raw_ = new_tensor<Element>(layer_, {B, H});
    projected_ = new_tensor<Accum>(layer_, {B, P});
  }

  bool is_last(int64_t i) const { return i + 1 == layer_.T; }

  /// The i-th step's rows. A fused step's inactive rows hand h on to the other buffer.
  StepRows rows(int64_t i) const {
    StepRows rows = tokens_.step_rows(tokens_.time(i, d_ == 1));
    rows.is_first = i == 0;
    if (i == 0 || is_last(i) || is_fused_) rows.all_rows = layer_.B;
    return rows;
  }
  /// Where the i-th step's h goes: a fused step must not write the buffer that it reads.
  Element* h_after(int64_t i) const {
    return !is_fused_ || is_last(i) ? h_n_ : data_of<Element>(h_, i % 2 * layer_.B * layer_.H);
  }

  int64_t h0_stride() const { return h0_.defined() ? h0_.stride(0) : 0; }

  void step(int64_t i) {
    const int64_t H = layer_.H;
    FusedStepParams<Element> p = p_;
    static_cast<StepRows&>(p) = rows(i);
    const int64_t token = tokens_.token(p.t);
    const Element* const h_before = i == 0 ? const_data_of<Element>(h0_) : h_after(i - 1);
    const int64_t h_stride = i == 0 ? h0_stride() : layer_.P;
    if (x_product_.defined()) {
      p.x_product = const_data_of<Accum>(x_product_, token * layer_.cell.gates * H);
    }
    if (layer_.has_projection) {
      p.h_before = p.h = data_of<Element>(raw_);
    } else {
      p.h_before = h_before;
      p.h_before_stride = h_stride;
      p.h = h_after(i);
      p.y = y_ + token * p.y_stride;
    }
    if (is_last(i)) p.c_n = c_n_;
    if (saved_) p.saved = saved_ + token * layer_.cell.saved * H;
    if (is_fused_) {
      check(fused_step<Element>(layer_.cell.index)(p, context_.stream));
      return;
    }
    if (h_before) {
      gemm_hh_->run(h_product_.mutable_data_ptr(), h_before, h_stride, p.rows);
      p.h_product = const_data_of<Accum>(h_product_);
    }
    check(step_kernels<Element>(layer_.cell.index).forward(p, context_.stream));
  }

  void project(int64_t i) {
    ProjectionStepParams<Element> p;
    static_cast<StepRows&>(p) = rows(i);
    gemm_hr_->run(projected_.mutable_data_ptr(), raw_.const_data_ptr(), layer_.H, p.rows);
    p.output_size = layer_.P;
    p.r = const_data_of<Accum>(projected_);
    p.h0 = const_data_of<Element>(h0_);
    p.h0_stride = h0_stride();
    p.h = h_n_;
    p.y_stride = p_.y_stride;
    p.y = y_ + tokens_.token(p.t) * p.y_stride;
    check(projection_step(p, context_.stream));
  }

  const DirectionWeights& weights() const { return layer_.weights[size_t(d_)]; }

  const Layer& layer_;
  const TokenMap& tokens_;
  const LaunchContext& context_;
  const int64_t d_;
  const bool is_fused_;
  Element *h_n_, *y_, *c_n_;
  Accum* saved_ = nullptr;
  FusedStepParams<Element> p_;  ///< what all steps share
  Tensor h0_;                   ///< [B, P]
  Tensor state_;                ///< [B, H] carried from step to step; undefined for one step
  Tensor h_;                    ///< [2, B, H] likewise, double-buffered; fused only
  Tensor x_product_;            ///< [N, G*H]; undefined if the fused step has its GEMM
  Tensor h_product_;            ///< [B, G*H]; not fused
  Tensor raw_, projected_;      ///< [B, H], [B, P]; projected only
  std::optional<PreparedGemm> gemm_hh_, gemm_hr_;
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
        d_(d),
        dh_(new_tensor<Accum>(layer, {layer.B, layer.P})),
        dstate_(new_tensor<Accum>(layer, {layer.B, layer.H})),
        product_(new_tensor<Accum>(layer, {layer.B, layer.P})),
        gemm_hh_(context, weights().hh, product_.scalar_type()) {
    if (layer.cell.preacts > layer.cell.gates) {
      dhidden_ = new_tensor<Element>(layer, {layer.B, layer.cell.gates * layer.H});
    }
    set_params();
    if (!layer.has_projection) return;
    dh_raw_ = new_tensor<Accum>(layer, {layer.B, layer.H});
    p_.dh_raw = const_data_of<Accum>(dh_raw_);
    gemm_hr_.emplace(context, weights().hr, dh_raw_.scalar_type());
  }

  void run() {
    for (int64_t i = layer_.T - 1; i >= 0; --i) {
      if (layer_.has_projection) project(i);
      step(i);
    }
    if (wants(0) || wants(1)) initial_gradients();
  }

 private:
  /// Whether the caller wants dh0 (0) or dc0 (1).
  bool wants(size_t state) const {
    return state < size_t(layer_.cell.states()) && gradients_.output_mask[1 + state];
  }

  /// Sets what all steps share.
  void set_params() {
    const int64_t B = layer_.B, D = layer_.D, H = layer_.H, P = layer_.P, first = d_ * layer_.N;
    const auto of_direction = [&](const Tensor& t, int64_t features) {
      return const_data_of<Element>(t, d_ * B * features);
    };
    const auto of_tokens = [&](const Tensor& t, int64_t features) {
      return data_of<Element>(t, first * features);
    };
    p_.dy = const_data_of<Element>(gradients_.dy, d_ * P);
    p_.dy_stride = D * P;
    p_.product = const_data_of<Accum>(product_);
    p_.dh_n = of_direction(gradients_.dh_n, P);
    p_.dh = data_of<Accum>(dh_);
    p_.hidden_size = H;
    p_.saved = const_data_of<Accum>(gradients_.saved, first * layer_.cell.saved * H);
    p_.h0 = initial_state<Element>(layer_.h0, d_);
    p_.c0 = initial_state<Element>(layer_.c0, d_);
    p_.h0_stride = row_stride(layer_.h0);
    p_.c0_stride = row_stride(layer_.c0);
    p_.dc_n = of_direction(gradients_.dc_n, H);
    p_.dstate = data_of<Accum>(dstate_);
    p_.dgates = of_tokens(out_.gates.dgates, layer_.cell.preacts * H);
    p_.dhidden = data_of<Element>(dhidden_);
    p_.h_previous = of_tokens(out_.gates.h_previous, P);
    p_.h_raw = of_tokens(out_.gates.h_raw, H);
    previous_y_ = const_data_of<Element>(gradients_.output, d_ * P);
    dr_ = of_tokens(out_.gates.dr, P);
  }

  /// The output gradient of the i-th step: p_'s, at the step's tokens.
  OutputGradientParams<Element> output_gradient(int64_t i) const {
    OutputGradientParams<Element> p = p_;
    const bool reverse = d_ == 1;
    static_cast<StepRows&>(p) = tokens_.step_rows(tokens_.time(i, reverse));
    p.is_first = i + 1 == layer_.T;
    if (p.is_first) p.all_rows = layer_.B;
    p.previous = tokens_.time(i - 1, reverse);
    p.previous_rows = tokens_.rows(p.previous);
    p.product_rows = p.is_first ? 0 : tokens_.rows(tokens_.time(i + 1, reverse));
    if (p.dy) p.dy += tokens_.token(p.t) * p.dy_stride;
    return p;
  }

  void project(int64_t i) {
    const int64_t P = layer_.P;
    ProjectionBackwardStepParams<Element> p;
    static_cast<OutputGradientParams<Element>&>(p) = output_gradient(i);
    const int64_t token = tokens_.token(p.t);
    p.output_size = P;
    p.y_stride = p_.dy_stride;
    p.previous_y = previous_y_ + tokens_.token(p.previous) * p.y_stride;
    p.h0 = p_.h0;
    p.h0_stride = p_.h0_stride;
    p.dr = dr_ + token * P;
    p.h_previous = p_.h_previous + token * P;
    check(projection_backward_step(p, context_.stream));
    gemm_hr_->run(dh_raw_.mutable_data_ptr(), p.dr, P, p.rows);
  }

  void step(int64_t i) {
    const int64_t H = layer_.H, saved = layer_.cell.saved * H;
    const int64_t preacts = layer_.cell.preacts * H;
    BackwardStepParams<Element> p = p_;
    static_cast<OutputGradientParams<Element>&>(p) = output_gradient(i);
    const int64_t token = tokens_.token(p.t);
    p.previous_saved = p_.saved + tokens_.token(p.previous) * saved;
    p.saved += token * saved;
    p.dgates += token * preacts;
    if (layer_.has_projection) {
      p.h_previous = nullptr;
      p.h_raw += token * H;
    } else {
      p.h_previous += token * H;
    }
    check(step_kernels<Element>(layer_.cell.index).backward(p, context_.stream));
    if (i == 0 && !wants(0)) return;
    gemm_hh_.run(product_.mutable_data_ptr(), p.dhidden ? p.dhidden : p.dgates,
                 p.dhidden ? layer_.cell.gates * H : preacts, p.rows);
  }

  /// Each row's product is from its first step: later steps of other rows left it alone.
  void initial_gradients() {
    InitialGradientParams<Element> p;
    p.rows = layer_.B;
    p.hidden_size = layer_.H;
    p.output_size = layer_.P;
    p.dh = const_data_of<Accum>(dh_);
    p.product = p_.product;
    p.dstate = p_.dstate;
    p.state_is_h = !layer_.cell.has_cell_state;
    if (wants(0)) p.dh0 = data_of<Element>(out_.dh0, d_ * layer_.B * layer_.P);
    if (wants(1)) p.dc0 = data_of<Element>(out_.dc0, d_ * layer_.B * layer_.H);
    check(cuda::initial_gradients(p, context_.stream));
  }

  const DirectionWeights& weights() const { return layer_.weights[size_t(d_)]; }

  const Layer& layer_;
  const TokenMap& tokens_;
  const OutputGradients& gradients_;
  const LaunchContext& context_;
  StepGradients& out_;
  const int64_t d_;
  Tensor dh_, dstate_;  ///< [B, P], [B, H] carried from step to step
  Tensor product_;      ///< [B, P] the previous output's gradient through weight_hh
  /// [B, G*H] for cells whose weight_hh feeds only some pre-activations; else undefined.
  Tensor dhidden_;
  Tensor dh_raw_;                        ///< [B, H]; projected only
  BackwardStepParams<Element> p_;        ///< what all steps share, at token 0
  const Element* previous_y_ = nullptr;  ///< at token 0; projected only
  Element* dr_ = nullptr;                ///< likewise
  PreparedGemm gemm_hh_;
  std::optional<PreparedGemm> gemm_hr_;
};

}  // namespace

template <class Element>
void run_forward_stepwise(const Layer& layer, const LaunchContext& context, LayerOutput& out) {
  if (layer.B == 0) return;
  const TokenMap tokens(layer);
  const Tensor x = input_tokens(layer);
  for (int64_t d = 0; d < layer.D; ++d) {
    ForwardSteps<Element>(layer, tokens, context, out, x, d).run();
  }
}

template <class Element>
void run_backward_stepwise(const Layer& layer, const OutputGradients& gradients,
                           const LaunchContext& context, StepGradients& out) {
  if (layer.B == 0) return;
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
