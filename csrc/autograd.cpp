// The ops' derivatives: registers for the Autograd key.
//
// The forward ops save the inputs of their backward op if any argument needs a gradient. The
// backward ops are differentiable too: with create_graph=True they are the ops
// _*_backward_differentiable, which fusedrnn/_ops.py makes from torch's own ops.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops.h"

namespace fusedrnn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
Tensor value(const OptionalTensor& t) { return t ? *t : Tensor(); }

template <class Cell, class Op, class Args>
auto call_below_autograd(const Op& op, const Args& args) {
  at::AutoDispatchBelowADInplaceOrView below;
  return call<Cell>(op, args);
}

/// Places among the tensors saved for the backward pass; the weights come last.
enum Saved : size_t { kBatchSizes, kLengths, kOutput, kSaved, kInput, kH0, kC0, kWeights };

/// One layer with its gradient.
template <class Cell>
struct LayerFunction : torch::autograd::Function<LayerFunction<Cell>> {
  /// Items: a layer's arguments as a flat list.
  template <class... Items>
  static variable_list forward(AutogradContext* ctx, const Items&... items) {
    const LayerArgs args = structured<Cell, LayerArgs>(items...);
    LayerOutput out = call_below_autograd<Cell>(forward_op<Cell>(), ForwardArgs{args, true});
    ctx->mark_non_differentiable({out.saved});
    ctx->set_materialize_grads(false);
    // A projection's backward pass needs the output, which the caller may change in place.
    const bool is_projected = args.weights.size() / (args.bidirectional ? 2 : 1) % 2 == 1;
    variable_list tensors(kWeights);
    tensors[kBatchSizes] = value(args.batch_sizes);
    tensors[kLengths] = value(args.lengths);
    if (is_projected) tensors[kOutput] = out.output.clone();
    tensors[kSaved] = out.saved;
    tensors[kInput] = args.input;
    tensors[kH0] = value(args.h0);
    tensors[kC0] = value(args.c0);
    tensors.insert(tensors.end(), args.weights.begin(), args.weights.end());
    ctx->save_for_backward(std::move(tensors));
    ctx->saved_data["bidirectional"] = args.bidirectional;
    return std::apply([](auto&&... results) { return variable_list{std::move(results)...}; },
                      flat<Cell>(std::move(out)));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list tensors = ctx->get_saved_variables();
    const OptionalTensor h0 = optional(tensors[kH0]), c0 = optional(tensors[kC0]);
    const OptionalTensor batch_sizes = optional(tensors[kBatchSizes]);
    const OptionalTensor lengths = optional(tensors[kLengths]);
    const OptionalTensor output = optional(tensors[kOutput]);
    const at::TensorList weights = at::TensorList(tensors).slice(kWeights);

    // There is an edge for each argument that is present.
    c10::List<bool> needed;
    size_t edge = 0;
    const auto need = [&](bool is_present) {
      needed.push_back(is_present && ctx->needs_input_grad(edge));
      edge += is_present;
    };
    need(true);
    need(h0.has_value());
    if (Cell::kHasCellState) need(c0.has_value());
    for (size_t i = 0; i < weights.size(); ++i) need(true);

    const OptionalTensor dy = optional(grads[0]), dh_n = optional(grads[1]);
    const OptionalTensor dc_n = Cell::kHasCellState ? optional(grads[2]) : std::nullopt;
    const LayerArgs layer{
        tensors[kInput], h0,     c0, weights, ctx->saved_data["bidirectional"].toBool(),
        batch_sizes,     lengths};
    LayerGradients found =
        call<Cell>(backward_op<Cell>(),
                   BackwardArgs{{dy, dh_n, dc_n}, layer, output, tensors[kSaved], needed});

    // In the arguments' order; arguments behind the weights have no gradient.
    variable_list result;
    const auto give = [&](Tensor& gradient) {
      result.push_back(needed[result.size()] ? std::move(gradient) : Tensor());
    };
    give(found.input);
    give(found.h0);
    if (Cell::kHasCellState) give(found.c0);
    for (Tensor& gradient : found.weights) give(gradient);
    constexpr size_t arguments = std::tuple_size_v<decltype(flat<Cell>(layer))>;
    result.resize(arguments - 1 + weights.size());
    return result;
  }
};

/// A variant with its gradient. Tensors saved: those of its arguments that are there, in their
/// order, then `saved`.
template <class Cell>
struct VariantFunction : torch::autograd::Function<VariantFunction<Cell>> {
  template <class... Items>
  static variable_list forward(AutogradContext* ctx, const Items&... items) {
    const VariantArgs args = structured<Cell, VariantArgs>(items...);
    VariantOutput out;
    {
      at::AutoDispatchBelowADInplaceOrView below;
      out = call_variant<Cell>(VariantForwardArgs{args, true});
    }
    ctx->mark_non_differentiable({out.saved});
    if (!Cell::kHasCellState) ctx->mark_non_differentiable({out.saved, out.cells});
    ctx->set_materialize_grads(false);
    variable_list tensors{args.input,
                          value(args.h0),
                          value(args.c0),
                          value(args.batch_sizes),
                          value(args.lengths),
                          value(args.reset_mask),
                          value(args.hidden_mask),
                          value(args.candidate_mask),
                          value(args.zoneout_h_mask),
                          value(args.zoneout_c_mask),
                          out.saved};
    tensors.insert(tensors.end(), args.weights.begin(), args.weights.end());
    tensors.insert(tensors.end(), args.norms.begin(), args.norms.end());
    ctx->save_for_backward(std::move(tensors));
    ctx->saved_data["weights"] = int64_t(args.weights.size());
    ctx->saved_data["bidirectional"] = args.bidirectional;
    ctx->saved_data["reset_to_initial"] = args.reset_to_initial;
    ctx->saved_data["scales"] =
        std::vector<double>{args.candidate_scale, args.zoneout_h, args.zoneout_c};
    return std::apply([](auto&&... results) { return variable_list{std::move(results)...}; },
                      flat<Cell>(std::move(out)));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list all = ctx->get_saved_variables();
    const size_t first_weight = 11, count = size_t(ctx->saved_data["weights"].toInt());
    const at::TensorList weights = at::TensorList(all).slice(first_weight, count);
    const at::TensorList norms = at::TensorList(all).slice(first_weight + count);
    const std::vector<double> scales = ctx->saved_data["scales"].toDoubleVector();
    const OptionalTensor h0 = optional(all[1]), c0 = optional(all[2]);
    const OptionalTensor batch_sizes = optional(all[3]), lengths = optional(all[4]);
    const OptionalTensor reset = optional(all[5]), hidden = optional(all[6]);
    const OptionalTensor candidate = optional(all[7]), of_h = optional(all[8]);
    const OptionalTensor of_c = optional(all[9]);
    const VariantArgs args{
        {all[0], h0, c0, weights, ctx->saved_data["bidirectional"].toBool(), batch_sizes, lengths},
        reset,
        ctx->saved_data["reset_to_initial"].toBool(),
        hidden,
        candidate,
        scales[0],
        of_h,
        of_c,
        scales[1],
        scales[2],
        norms};

    // There is an edge for each tensor that is present, in the arguments' order.
    c10::List<bool> needed;
    size_t edge = 0;
    const auto need = [&](bool is_present) {
      needed.push_back(is_present && ctx->needs_input_grad(edge));
      edge += is_present;
    };
    need(true);
    need(h0.has_value());
    if (Cell::kHasCellState) need(c0.has_value());
    for (size_t i = 0; i < weights.size(); ++i) need(true);
    for (const OptionalTensor* t :
         {&batch_sizes, &lengths, &reset, &hidden, &candidate, &of_h, &of_c}) {
      edge += t->has_value();
    }
    for (size_t i = 0; i < norms.size(); ++i) need(true);

    const OptionalTensor dy = optional(grads[0]), dh_n = optional(grads[1]);
    const OptionalTensor dc_n = Cell::kHasCellState ? optional(grads[2]) : std::nullopt;
    const OptionalTensor dcells = Cell::kHasCellState ? optional(grads[3]) : std::nullopt;
    LayerGradients found =
        call_variant<Cell>(VariantBackwardArgs{{dy, dh_n, dc_n}, args, dcells, all[10], needed});

    variable_list result;
    size_t place = 0;
    const auto give = [&](Tensor& gradient) {
      result.push_back(needed[place++] ? std::move(gradient) : Tensor());
    };
    give(found.input);
    give(found.h0);
    if (Cell::kHasCellState) give(found.c0);
    for (size_t i = 0; i < weights.size(); ++i) give(found.weights[i]);
    // The flags and masks between the weights and the norms have no gradient.
    constexpr size_t arguments = std::tuple_size_v<decltype(flat<Cell>(args))>;
    constexpr size_t before_weights = Cell::kHasCellState ? 3 : 2;
    result.resize(result.size() + arguments - before_weights - 2);
    for (size_t i = 0; i < norms.size(); ++i) give(found.weights[weights.size() + i]);
    return result;
  }
};

struct Autograd {
  template <class Cell>
  static VariantOutput forward_variant(const VariantForwardArgs& args) {
    if (!any_needs_gradient<VariantArgs>(args)) {
      at::AutoDispatchBelowADInplaceOrView below;
      return call_variant<Cell>(args);
    }
    variable_list out =
        std::apply([](const auto&... items) { return VariantFunction<Cell>::apply(items...); },
                   flat<Cell>(static_cast<const VariantArgs&>(args)));
    VariantOutput results;
    results.output = out[0];
    results.h_n = out[1];
    if (Cell::kHasCellState) results.c_n = out[2];
    results.cells = out[out.size() - 2];
    results.saved = out.back();
    return results;
  }
  template <class Cell>
  static LayerGradients backward_variant(const VariantBackwardArgs& args) {
    if (any_needs_gradient<OutputGradientArgs, VariantArgs>(args, args) ||
        any_needs_gradient(args.grad_cells)) {
      return call_variant<Cell, true>(args);
    }
    at::AutoDispatchBelowADInplaceOrView below;
    return call_variant<Cell>(args);
  }
  template <class Cell>
  static LayerOutput forward(const ForwardArgs& args) {
    if (!any_needs_gradient<LayerArgs>(args)) {
      return call_below_autograd<Cell>(forward_op<Cell>(), args);
    }
    variable_list out =
        std::apply([](const auto&... items) { return LayerFunction<Cell>::apply(items...); },
                   flat<Cell>(static_cast<const LayerArgs&>(args)));
    return {out[0], out[1], Cell::kHasCellState ? out[2] : Tensor(), out.back()};
  }
  template <class Cell>
  static LayerGradients backward(const BackwardArgs& args) {
    if (any_needs_gradient<OutputGradientArgs, LayerArgs>(args, args)) {
      return call<Cell>(differentiable_backward_op<Cell>(), args);
    }
    return call_below_autograd<Cell>(backward_op<Cell>(), args);
  }
  template <class Cell>
  static LayerOutput frozen(const FrozenArgs& args) {
    const auto has_tangent = [](const OptionalTensor& t) {
      return t && t->_fw_grad(/*level=*/0).defined();
    };
    TORCH_CHECK(!any_needs_gradient(args.input, args.h0, args.c0) && !has_tangent(args.input) &&
                    !has_tangent(args.h0) && !has_tangent(args.c0),
                "fusedrnn::", Cell::kName,
                "_frozen: a frozen layer has no gradient. Call it under torch.no_grad() or "
                "torch.inference_mode(), or use the model from before freeze()");
    return call_below_autograd<Cell>(frozen_op<Cell>(), args);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fusedrnn, Autograd, m) {
  register_ops<Autograd>(m);
  register_frozen_ops<Autograd>(m);
  register_variant_ops<Autograd>(m);
}

}  // namespace fusedrnn
