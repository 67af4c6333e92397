#include "variant.h"

#include <algorithm>
#include <optional>

#include "kernel_table.h"

namespace fusedrnn::cuda {
namespace {

/// The steps of one direction. Step -1 is the launch before the first step, step T the one behind
/// the last; both have no rows.
class Steps {
 public:
  Steps(const Layer& layer, const TokenMap& tokens, int64_t d)
      : layer_(layer), tokens_(tokens), reverse_(d == 1) {}

  bool exists(int64_t i) const { return i >= 0 && i < layer_.T; }
  int64_t time(int64_t i) const { return exists(i) ? tokens_.time(i, reverse_) : -1; }
  int64_t rows(int64_t i) const { return tokens_.rows(time(i)); }
  int64_t token(int64_t i) const { return tokens_.token(time(i)); }

  /// For a kernel that has the rows of the i-th step and of the next.
  VariantStepRows step_rows(int64_t i) const {
    VariantStepRows p;
    static_cast<StepRows&>(p) = tokens_.step_rows(time(i));
    p.token = token(i);
    p.after = time(i + 1);
    p.after_rows = rows(i + 1);
    p.after_token = token(i + 1);
    p.all_rows = std::max(p.rows, p.after_rows);
    return p;
  }

 private:
  const Layer& layer_;
  const TokenMap& tokens_;
  const bool reverse_;
};

template <class Element>
class ForwardSteps {
 public:
  using Accum = Accumulator<Element>;

  ForwardSteps(const Layer& layer, const LayerVariant& variant, const TokenMap& tokens,
               const LaunchContext& context, VariantOutput& out, const Tensor& x, int64_t d)
      : layer_(layer),
        context_(context),
        steps_(layer, tokens, d),
        weights_(layer.weights[size_t(d)]),
        x_product_(input_product<Element>(layer, x, d, context)),
        h_(new_tensor<Accum>(layer, {layer.B, layer.P})),
        operand_(new_tensor<Element>(layer, {layer.B, layer.P})),
        h_product_(new_tensor<Accum>(layer, {layer.B, layer.cell.gates * layer.H})),
        gemm_hh_(context, weights_.hh.t(), h_product_.scalar_type()) {
    const int64_t B = layer.B, D = layer.D, H = layer.H, P = layer.P;
    const CellInfo& cell = layer.cell;
    p_.output_size = P;
    p_.hidden_size = H;
    p_.variant = variant.of_direction<Accum>(layer, d);
    p_.saved_at = variant.saved;
    if (out.saved.numel() > 0) {
      p_.saved = data_of<Accum>(out.saved, d * layer.N * variant.saved.size);
    }
    p_.h0 = initial_state<Element>(layer.h0, d);
    p_.h0_stride = row_stride(layer.h0);
    p_.h = data_of<Accum>(h_);
    p_.operand = data_of<Element>(operand_);
    p_.y = data_of<Element>(out.output, d * P);
    p_.y_stride = D * P;
    h_n_ = data_of<Element>(out.h_n, d * B * P);
    p_.x_product = const_data_of<Accum>(x_product_);
    p_.bias_hh = const_data_of<Element>(weights_.bias_hh);
    if (variant.has_norms()) {
      normalise_input();
    } else {
      p_.bias_ih = const_data_of<Element>(weights_.bias_ih);
    }
    if (cell.has_cell_state) {
      c_ = new_tensor<Accum>(layer, {B, H});
      p_.c0 = initial_state<Element>(layer.c0, d);
      p_.c0_stride = row_stride(layer.c0);
      p_.c = data_of<Accum>(c_);
      p_.cells = data_of<Element>(out.cells, d * H);
      c_n_ = data_of<Element>(out.c_n, d * B * H);
      if (variant.has_norms()) {
        scratch_ = new_tensor<Accum>(layer, {B, cell.saved + 1, H});
        p_.scratch = data_of<Accum>(scratch_);
      }
    }
    if (!layer.has_projection) return;
    raw_ = new_tensor<Element>(layer, {B, H});
    projected_ = new_tensor<Accum>(layer, {B, P});
    p_.raw = data_of<Element>(raw_);
    p_.projected = const_data_of<Accum>(projected_);
    gemm_hr_.emplace(context, weights_.hr.t(), projected_.scalar_type());
  }

  void run() {
    for (int64_t i = -1; i < layer_.T; ++i) step(i);
  }

 private:
  void normalise_input() {
    VariantInputParams<Element> p;
    p.tokens = layer_.N;
    p.batch = layer_.B;
    p.size = layer_.cell.gates * layer_.H;
    p.lengths = const_data_of<int64_t>(layer_.lengths);
    p.x_product = data_of<Accum>(x_product_);
    p.norm = p_.variant.norm_ih;
    p.bias = const_data_of<Element>(weights_.bias_ih);
    p.saved = p_.saved;
    p.saved_size = p_.variant.saved_size;
    p.saved_at = p_.saved_at;
    check(variant_input(p, context_.stream));
  }

  void step(int64_t i) {
    VariantForwardStepParams<Element> p = p_;
    static_cast<VariantStepRows&>(p) = steps_.step_rows(i);
    p.is_first = i < 0;
    const bool is_last = i + 1 == layer_.T;
    if (p.is_first || is_last) p.all_rows = layer_.B;
    if (is_last) {
      p.h_n = h_n_;
      p.c_n = c_n_;
    }
    const bool operand_is_zero = i == 0 && !p.h0;
    if (i >= 0 && !operand_is_zero) {
      gemm_hh_.run(h_product_.mutable_data_ptr(), p.operand, layer_.P, p.rows);
      p.h_product = const_data_of<Accum>(h_product_);
    }
    check(variant_kernels<Element>(layer_.cell.index).forward(p, context_.stream));
    if (!layer_.has_projection) return;
    if (i >= 0) gemm_hr_->run(projected_.mutable_data_ptr(), p.raw, layer_.H, p.rows);
    check(variant_projection<Element>(p, context_.stream));
  }

  const Layer& layer_;
  const LaunchContext& context_;
  const Steps steps_;
  const DirectionWeights& weights_;
  const Tensor x_product_;               ///< [N, G*H]
  const Tensor h_, operand_;             ///< [B, P] carried from step to step
  const Tensor h_product_;               ///< [B, G*H]
  Tensor c_, scratch_;                   ///< [B, H], [B, A+1, H]
  Tensor raw_, projected_;               ///< [B, H], [B, P]; projected only
  VariantForwardStepParams<Element> p_;  ///< what all steps share
  Element *h_n_, *c_n_ = nullptr;
  PreparedGemm gemm_hh_;
  std::optional<PreparedGemm> gemm_hr_;
};

template <class Element>
class BackwardSteps {
 public:
  using Accum = Accumulator<Element>;

  BackwardSteps(const Layer& layer, const LayerVariant& variant, const TokenMap& tokens,
                const OutputGradients& gradients, const LaunchContext& context, StepGradients& out,
                const Tensor& dnorm_c, int64_t d)
      : layer_(layer),
        gradients_(gradients),
        context_(context),
        steps_(layer, tokens, d),
        weights_(layer.weights[size_t(d)]),
        dh_(new_tensor<Accum>(layer, {layer.B, layer.P})),
        product_(new_tensor<Accum>(layer, {layer.B, layer.P})),
        gemm_hh_(context, weights_.hh, product_.scalar_type()) {
    const int64_t B = layer.B, H = layer.H, P = layer.P;
    const CellInfo& cell = layer.cell;
    const bool has_norms = variant.has_norms();
    const auto of_batch = [&](const Tensor& t, int64_t features) {
      return const_data_of<Element>(t, d * B * features);
    };
    const auto of_tokens = [&](const Tensor& t, int64_t features) {
      return data_of<Element>(t, d * layer.N * features);
    };
    const auto buffer = [&](Tensor& t, c10::IntArrayRef shape) {
      t = new_tensor<Accum>(layer, shape);
      return data_of<Accum>(t);
    };
    p_.output_size = P;
    p_.hidden_size = H;
    p_.variant = variant.of_direction<Accum>(layer, d);
    p_.saved_at = variant.saved;
    p_.saved = const_data_of<Accum>(gradients.saved, d * layer.N * variant.saved.size);
    p_.h0 = initial_state<Element>(layer.h0, d);
    p_.h0_stride = row_stride(layer.h0);
    p_.dh_n = of_batch(gradients.dh_n, P);
    p_.dh = data_of<Accum>(dh_);
    p_.product = const_data_of<Accum>(product_);
    p_.dy = const_data_of<Element>(gradients.dy, d * P);
    p_.dy_stride = layer.D * P;
    p_.h_previous = of_tokens(out.gates.h_previous, P);
    p_.dgates = of_tokens(out.gates.dgates, cell.preacts * H);
    p_.dinput = of_tokens(out.gates.dinput, cell.gates * H);
    const bool resets_to_initial = p_.variant.reset_mask && p_.variant.reset_to_initial;
    if (resets_to_initial) p_.reset_dh0 = buffer(reset_dh0_, {B, P});
    if (has_norms) {
      dhidden_ = out.gates.dhidden[d];
      p_.scratch = buffer(scratch_, {B, cell.preacts + 2, H});
    } else if (cell.preacts > cell.gates) {
      dhidden_ = new_tensor<Element>(layer, {B, cell.gates * H});
    }
    has_step_dhidden_ = has_norms;
    if (cell.has_cell_state) {
      p_.c0 = initial_state<Element>(layer.c0, d);
      p_.c0_stride = row_stride(layer.c0);
      p_.dc_n = of_batch(gradients.dc_n, H);
      p_.dc = buffer(dc_, {B, H});
      if (resets_to_initial) p_.reset_dc0 = buffer(reset_dc0_, {B, H});
      p_.dcells = const_data_of<Element>(gradients.dcells, d * H);
      p_.dnorm_c = data_of<Accum>(dnorm_c, d * layer.N * H);
    }
    p_.wants_dh0 = wants(0);
    if (wants(0)) dh0_ = data_of<Element>(out.dh0, d * B * P);
    if (wants(1)) dc0_ = data_of<Element>(out.dc0, d * B * H);
    if (!layer.has_projection) return;
    p_.dr = of_tokens(out.gates.dr, P);
    p_.h_raw = of_tokens(out.gates.h_raw, H);
    p_.dh_raw = buffer(dh_raw_, {B, H});
    gemm_hr_.emplace(context, weights_.hr, dh_raw_.scalar_type());
  }

  void run() {
    for (int64_t i = layer_.T - 1; i >= 0; --i) step(i);
    if (dh0_ || dc0_) initial_gradients();
  }

 private:
  /// Whether the caller wants dh0 (0) or dc0 (1).
  bool wants(size_t state) const {
    return state < size_t(layer_.cell.states()) && gradients_.output_mask[1 + state];
  }

  VariantBackwardStepParams<Element> params(int64_t i) const {
    VariantBackwardStepParams<Element> p = p_;
    static_cast<VariantStepRows&>(p) = steps_.step_rows(i);
    p.is_first = i + 1 == layer_.T;
    if (p.is_first || i < 0) p.all_rows = layer_.B;
    p.previous = steps_.time(i - 1);
    p.previous_rows = steps_.rows(i - 1);
    p.previous_token = steps_.token(i - 1);
    return p;
  }

  void step(int64_t i) {
    const int64_t H = layer_.H, gates = layer_.cell.gates * H, preacts = layer_.cell.preacts * H;
    VariantBackwardStepParams<Element> p = params(i);
    if (layer_.has_projection) {
      check(variant_projection_backward<Element>(p, context_.stream));
      gemm_hr_->run(dh_raw_.mutable_data_ptr(), p.dr + p.token * layer_.P, layer_.P, p.rows);
    }
    p.dhidden = data_of<Element>(dhidden_, has_step_dhidden_ ? p.token * gates : 0);
    check(variant_kernels<Element>(layer_.cell.index).backward(p, context_.stream));
    if (i == 0 && !dh0_) return;
    gemm_hh_.run(product_.mutable_data_ptr(), p.dhidden ? p.dhidden : p.dgates + p.token * preacts,
                 p.dhidden ? gates : preacts, p.rows);
  }

  void initial_gradients() {
    VariantBackwardStepParams<Element> p = params(-1);
    p.dh0 = dh0_;
    p.dc0 = dc0_;
    check(variant_initial_gradients<Element>(p, context_.stream));
  }

  const Layer& layer_;
  const OutputGradients& gradients_;
  const LaunchContext& context_;
  const Steps steps_;
  const DirectionWeights& weights_;
  const Tensor dh_, product_;     ///< [B, P]
  Tensor dc_;                     ///< [B, H] carried from step to step, as dh_
  Tensor reset_dh0_, reset_dc0_;  ///< [B, P], [B, H]
  /// [N, G*H] with layer norms. [B, G*H] for cells whose weight_hh feeds only some pre-activations.
  /// Else undefined.
  Tensor dhidden_;
  bool has_step_dhidden_;                 ///< whether it has all steps
  Tensor scratch_;                        ///< [B, S+2, H]; layer norms only
  Tensor dh_raw_;                         ///< [B, H]; projected only
  VariantBackwardStepParams<Element> p_;  ///< what all steps share
  Element *dh0_ = nullptr, *dc0_ = nullptr;
  PreparedGemm gemm_hh_;
  std::optional<PreparedGemm> gemm_hr_;
};

}  // namespace

template <class Element>
void run_forward_variant(const Layer& layer, const LayerVariant& variant,
                         const LaunchContext& context, VariantOutput& out) {
  if (layer.B == 0) return;
  const TokenMap tokens(layer);
  const Tensor x = input_tokens(layer);
  for (int64_t d = 0; d < layer.D; ++d) {
    ForwardSteps<Element>(layer, variant, tokens, context, out, x, d).run();
  }
}

template <class Element>
void run_backward_variant(const Layer& layer, const LayerVariant& variant,
                          const OutputGradients& gradients, const LaunchContext& context,
                          StepGradients& out, const Tensor& dnorm_c) {
  if (layer.B == 0) return;
  const TokenMap tokens(layer);
  for (int64_t d = 0; d < layer.D; ++d) {
    BackwardSteps<Element>(layer, variant, tokens, gradients, context, out, dnorm_c, d).run();
  }
}

#define FUSEDRNN_VARIANTS_OF(Element)                                                       \
  template void run_forward_variant<Element>(const Layer&, const LayerVariant&,             \
                                             const LaunchContext&, VariantOutput&);         \
  template void run_backward_variant<Element>(const Layer&, const LayerVariant&,            \
                                              const OutputGradients&, const LaunchContext&, \
                                              StepGradients&, const Tensor&);
FUSEDRNN_VARIANTS_OF(float)
FUSEDRNN_VARIANTS_OF(double)
FUSEDRNN_VARIANTS_OF(BFloat16)
FUSEDRNN_VARIANTS_OF(Float16)

}  // namespace fusedrnn::cuda
