// The derivatives of the ops: registers for the Autograd key.
//
// The forward ops save what their backward op wants if anything needs a gradient. The backward ops
// are differentiable too, where a graph of the backward pass is asked for (create_graph=True): then
// they are the ops _*_backward_differentiable, which fusedrnn/_ops.py makes of torch's own.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops.h"

namespace fusedrnn {
namespace {

using torch::autograd::variable_list;

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
Tensor value(const OptionalTensor& t) { return t ? *t : Tensor(); }

template <class Op, class... Args>
auto call_below(const Op& op, const Args&... args) {
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(args...);
}

/// One layer with its gradient, of the cell that has c or of the one that has not.
struct LayerFunction : torch::autograd::Function<LayerFunction> {
  static variable_list forward(torch::autograd::AutogradContext* ctx, bool has_c,
                               const Tensor& input, const OptionalTensor& h0,
                               const OptionalTensor& c0, at::TensorList weights, bool bidirectional,
                               const OptionalTensor& batch_sizes, const OptionalTensor& lengths) {
    variable_list out;
    if (has_c) {
      auto [y, h_n, c_n, saved] =
          call_below(lstm_op(), input, h0, c0, weights, bidirectional, batch_sizes, lengths, true);
      out = {std::move(y), std::move(h_n), std::move(c_n), std::move(saved)};
    } else {
      auto [y, h_n, saved] =
          call_below(gru_op(), input, h0, weights, bidirectional, batch_sizes, lengths, true);
      out = {std::move(y), std::move(h_n), std::move(saved)};
    }
    ctx->mark_non_differentiable({out.back()});
    ctx->set_materialize_grads(false);
    // With a projection the backward pass needs the output, which its owner may change in place.
    const bool projected = weights.size() / (bidirectional ? 2 : 1) % 2 == 1;
    variable_list kept{value(batch_sizes), value(lengths), projected ? out[0].clone() : Tensor(),
                       out.back(),         input,          value(h0),
                       value(c0)};
    kept.insert(kept.end(), weights.begin(), weights.end());
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data["has_c"] = has_c;
    ctx->saved_data["bidirectional"] = bidirectional;
    return out;
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grads) {
    const variable_list kept = ctx->get_saved_variables();
    const OptionalTensor batch_sizes = optional(kept[0]), lengths = optional(kept[1]);
    const OptionalTensor output = optional(kept[2]), h0 = optional(kept[5]), c0 = optional(kept[6]);
    const Tensor &saved = kept[3], &input = kept[4];
    const at::TensorList weights = at::TensorList(kept).slice(7);
    const bool has_c = ctx->saved_data["has_c"].toBool();
    const bool bidirectional = ctx->saved_data["bidirectional"].toBool();

    // The edges are those of the arguments that are there.
    c10::List<bool> needed;
    size_t edge = 0;
    const auto need = [&](bool present) {
      needed.push_back(present && ctx->needs_input_grad(edge));
      edge += present;
    };
    need(true);
    need(h0.has_value());
    if (has_c) need(c0.has_value());
    for (size_t i = 0; i < weights.size(); ++i) need(true);

    Tensor dinput, dh0, dc0;
    std::vector<Tensor> dweights;
    if (has_c) {
      std::tie(dinput, dh0, dc0, dweights) = lstm_backward_op().call(
          optional(grads[0]), optional(grads[1]), optional(grads[2]), input, h0, c0, weights,
          bidirectional, batch_sizes, lengths, output, saved, needed);
    } else {
      std::tie(dinput, dh0, dweights) =
          gru_backward_op().call(optional(grads[0]), optional(grads[1]), input, h0, weights,
                                 bidirectional, batch_sizes, lengths, output, saved, needed);
    }
    variable_list result(7 + weights.size());
    size_t i = 0;
    const auto give = [&](size_t at, const Tensor& gradient) {
      if (needed[i++]) result[at] = gradient;
    };
    // In the order of forward's arguments; the first is has_c.
    give(1, dinput);
    give(2, dh0);
    if (has_c) give(3, dc0);
    for (size_t w = 0; w < weights.size(); ++w) give(4 + w, dweights[w]);
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm(const Tensor& input, const OptionalTensor& h0,
                                                const OptionalTensor& c0, at::TensorList weights,
                                                bool bidirectional,
                                                const OptionalTensor& batch_sizes,
                                                const OptionalTensor& lengths, bool save) {
  if (!any_needs_gradient(input, h0, c0, weights)) {
    return call_below(lstm_op(), input, h0, c0, weights, bidirectional, batch_sizes, lengths, save);
  }
  const auto out =
      LayerFunction::apply(true, input, h0, c0, weights, bidirectional, batch_sizes, lengths);
  return {out[0], out[1], out[2], out[3]};
}

std::tuple<Tensor, Tensor, Tensor> gru(const Tensor& input, const OptionalTensor& h0,
                                       at::TensorList weights, bool bidirectional,
                                       const OptionalTensor& batch_sizes,
                                       const OptionalTensor& lengths, bool save) {
  if (!any_needs_gradient(input, h0, weights)) {
    return call_below(gru_op(), input, h0, weights, bidirectional, batch_sizes, lengths, save);
  }
  const auto out = LayerFunction::apply(false, input, h0, OptionalTensor(), weights, bidirectional,
                                        batch_sizes, lengths);
  return {out[0], out[1], out[2]};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> lstm_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
    const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
    bool bidirectional, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
    const OptionalTensor& output, const Tensor& saved, const c10::List<bool>& output_mask) {
  static const auto differentiable =
      find_op<LstmBackwardOp>("fusedrnn::_lstm_backward_differentiable");
  if (any_needs_gradient(dy, dh_n, dc_n, input, h0, c0, weights)) {
    return differentiable.call(dy, dh_n, dc_n, input, h0, c0, weights, bidirectional, batch_sizes,
                               lengths, output, saved, output_mask);
  }
  return call_below(lstm_backward_op(), dy, dh_n, dc_n, input, h0, c0, weights, bidirectional,
                    batch_sizes, lengths, output, saved, output_mask);
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> gru_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const Tensor& input,
    const OptionalTensor& h0, at::TensorList weights, bool bidirectional,
    const OptionalTensor& batch_sizes, const OptionalTensor& lengths, const OptionalTensor& output,
    const Tensor& saved, const c10::List<bool>& output_mask) {
  static const auto differentiable =
      find_op<GruBackwardOp>("fusedrnn::_gru_backward_differentiable");
  if (any_needs_gradient(dy, dh_n, input, h0, weights)) {
    return differentiable.call(dy, dh_n, input, h0, weights, bidirectional, batch_sizes, lengths,
                               output, saved, output_mask);
  }
  return call_below(gru_backward_op(), dy, dh_n, input, h0, weights, bidirectional, batch_sizes,
                    lengths, output, saved, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(fusedrnn, Autograd, m) {
  m.impl("lstm", &lstm);
  m.impl("lstm_backward", &lstm_backward);
  m.impl("gru", &gru);
  m.impl("gru_backward", &gru_backward);
}

}  // namespace fusedrnn
