// The ops on CUDA: allocate, plan, run. Nothing here waits for the device.
#include "ops_cuda.h"

#include <torch/library.h>

#include <algorithm>

#include "kernel_table.h"
#include "persistent.h"
#include "stepwise.h"
#include "variant.h"

namespace fusedrnn::cuda {
namespace {

thread_local const char* last_name = "none";

PlanProblem plan_problem(const Layer& layer, const LaunchContext& context, bool saves) {
  PlanProblem problem;
  problem.steps = layer.T;
  problem.rows = layer.B;
  problem.hidden_size = layer.H;
  problem.directions = layer.D;
  problem.gates = layer.cell.gates;
  problem.preacts = layer.cell.preacts;
  problem.saved = layer.cell.saved;
  problem.saves = saves;
  problem.has_projection = layer.has_projection;
  problem.is_bounded = layer.cell.is_bounded && !layer.h0.defined();
  problem.precision = context.precision;
  problem.multiprocessors = context.multiprocessors;
  problem.capability = context.capability;
  problem.shared_limit = context.shared_limit;
  problem.requested = requested_algorithm();
  return problem;
}

template <class Element>
LayerOutput allocate_output(const Layer& layer, bool save) {
  using Accum = Accumulator<Element>;
  const int64_t D = layer.D, B = layer.B;
  LayerOutput out;
  out.output = new_tensor<Element>(layer, layer.shape(D * layer.P));
  out.h_n = new_tensor<Element>(layer, {D, B, layer.P});
  if (layer.cell.has_cell_state) out.c_n = new_tensor<Element>(layer, {D, B, layer.H});
  out.saved = save ? new_tensor<Accum>(layer, {D, layer.N, layer.cell.saved, layer.H})
                   : new_tensor<Accum>(layer, {0});
  return out;
}

template <class Element>
LayerOutput forward(const Layer& layer, bool save) {
  const LaunchContext context(layer.input);
  LayerOutput out = allocate_output<Element>(layer, save);
  const PlanProblem problem = plan_problem(layer, context, save);
  const LaunchPlan plan = plan_forward(problem, persistent_kernels_for<Element>(layer));
  last_name = name_of(plan.algorithm);
  if (!run_forward_persistent<Element>(layer, plan, context, out)) {
    check_fallback<Element>(plan, problem);
    last_name = name_of(Algorithm::stepwise);
    run_forward_stepwise<Element>(layer, context, out);
  }
  return out;
}

template <class Element>
StepGradients allocate_gradients(const Layer& layer) {
  const int64_t D = layer.D, B = layer.B, N = layer.N, H = layer.H, P = layer.P;
  const auto tokens = [&](int64_t features) {
    return new_tensor<Element>(layer, {D, N, features});
  };
  StepGradients out;
  out.gates.dgates = tokens(layer.cell.preacts * H);
  out.gates.h_previous = tokens(P);
  if (layer.has_projection) {
    out.gates.dr = tokens(P);
    out.gates.h_raw = tokens(H);
  }
  out.dh0 = new_tensor<Element>(layer, {D, B, P});
  if (layer.cell.has_cell_state) out.dc0 = new_tensor<Element>(layer, {D, B, H});
  return out;
}

/// The GEMMs for layer_gradients().
template <class Element>
struct DeviceGemms : Gemms {
  explicit DeviceGemms(const LaunchContext& context) : context(context) {}
  void multiply(const Tensor& a, const Tensor& b, const Tensor& out, bool add) const override {
    cuda::multiply(context, out, a, b, add);
  }
  void multiply_transposed(const Tensor& a, const Tensor& b, const Tensor& out) const override {
    cuda::multiply(context, out, a.t(), b, false);
  }
  void bias_gradients(const Layer& layer, const Tensor& dgates, const Tensor& bias_ih,
                      const Tensor& bias_hh) const override {
    BiasGradientParams<Element> p;
    p.tokens = dgates.size(0);
    p.hidden_size = layer.H;
    p.preacts = layer.cell.preacts;
    p.gates = layer.cell.gates;
    std::copy(layer.cell.hidden_preact.begin(), layer.cell.hidden_preact.end(), p.hidden_preact);
    p.dgates = const_data_of<Element>(dgates);
    p.bias_ih = data_of<Element>(bias_ih);
    p.bias_hh = data_of<Element>(bias_hh);
    check(cuda::bias_gradients(p, context.stream));
  }
  const LaunchContext& context;
};

/// The input as the weight-gradient GEMM's operand [N, I]. A zero gradient times NaN or infinity in
/// the padding would not be zero.
template <class Element>
Tensor masked_input(const Layer& layer, const LaunchContext& context) {
  const Tensor x = input_tokens(layer);
  if (!layer.lengths.defined() || x.numel() == 0) return x;
  const Tensor masked = new_tensor<Element>(layer, x.sizes());
  MaskPaddingParams<Element> p;
  p.steps = layer.T;
  p.rows = layer.B;
  p.features = layer.I;
  p.x = const_data_of<Element>(x);
  p.x_stride = x.stride(0);
  p.lengths = const_data_of<int64_t>(layer.lengths);
  p.out = data_of<Element>(masked);
  check(mask_padding(p, context.stream));
  return masked;
}

template <class Element>
LayerGradients backward(const Layer& layer, const OutputGradients& gradients) {
  const LaunchContext context(layer.input);
  StepGradients steps = allocate_gradients<Element>(layer);
  const PlanProblem problem = plan_problem(layer, context, true);
  const LaunchPlan plan = plan_backward(problem, persistent_kernels_for<Element>(layer));
  last_name = name_of(plan.algorithm);
  if (!run_backward_persistent<Element>(layer, gradients, plan, context, steps)) {
    check_fallback<Element>(plan, problem);
    last_name = name_of(Algorithm::stepwise);
    run_backward_stepwise<Element>(layer, gradients, context, steps);
  }
  return layer_gradients(layer, gradients, steps.gates, steps.dh0, steps.dc0,
                         masked_input<Element>(layer, context), DeviceGemms<Element>(context));
}

template <class Element>
VariantOutput forward_variant(const Layer& layer, const LayerVariant& variant, bool save) {
  const LaunchContext context(layer.input);
  VariantOutput out;
  static_cast<LayerOutput&>(out) = allocate_output<Element>(layer, false);
  if (save) {
    out.saved = new_tensor<Accumulator<Element>>(layer, {layer.D, layer.N, variant.saved.size});
  }
  out.cells = layer.cell.has_cell_state ? new_tensor<Element>(layer, layer.shape(layer.D * layer.H))
                                        : new_tensor<Element>(layer, {0});
  last_name = name_of(Algorithm::stepwise);
  run_forward_variant<Element>(layer, variant, context, out);
  return out;
}

template <class Element>
LayerGradients backward_variant(const Layer& layer, const LayerVariant& variant,
                                const OutputGradients& gradients) {
  const LaunchContext context(layer.input);
  StepGradients steps = allocate_gradients<Element>(layer);
  Tensor dnorm_c;
  if (variant.has_norms()) {
    const int64_t D = layer.D, N = layer.N, H = layer.H;
    steps.gates.dinput = new_tensor<Element>(layer, {D, N, layer.cell.gates * H});
    steps.gates.dhidden = new_tensor<Element>(layer, {D, N, layer.cell.gates * H});
    if (layer.cell.has_cell_state) {
      dnorm_c = new_tensor<Accumulator<Element>>(layer, {D, N, H});
    }
  }
  last_name = name_of(Algorithm::stepwise);
  run_backward_variant<Element>(layer, variant, gradients, context, steps, dnorm_c);
  LayerGradients found =
      layer_gradients(layer, gradients, steps.gates, steps.dh0, steps.dc0,
                      masked_input<Element>(layer, context), DeviceGemms<Element>(context));
  if (variant.has_norms()) {
    append_norm_gradients(layer, gradients, variant, steps.gates, dnorm_c, found.weights);
  }
  return found;
}

/// The seed stays on the device: a captured graph replays with other seeds.
Tensor make_random_mask(const Tensor& seed, c10::IntArrayRef size, double p) {
  TORCH_CHECK(seed.scalar_type() == at::kLong && seed.numel() == 1,
              "_random_mask: seed must be one int64");
  TORCH_CHECK(p >= 0 && p <= 1, "_random_mask: p must be from 0 to 1, got ", p);
  const LaunchContext context(seed);
  const Tensor mask = at::empty(size, seed.options().dtype(at::kBool));
  const double scaled = p * 4294967296.0;
  RandomMaskParams params;
  params.seed = const_data_of<int64_t>(seed);
  params.count = mask.numel();
  params.all = scaled > 4294967295.0;
  if (!params.all) params.threshold = uint32_t(scaled);
  params.out = data_of<bool>(mask);
  check(random_mask(params, context.stream));
  return mask;
}

template <class T>
struct TypeTag {
  using type = T;
};

/// Calls f(TypeTag<Element>) for the layer's operand type.
template <class F>
auto dispatch_element(const Layer& layer, const F& f) {
  switch (layer.type) {
    case at::kDouble:
      return f(TypeTag<double>{});
    case at::kBFloat16:
      return f(TypeTag<BFloat16>{});
    case at::kHalf:
      return f(TypeTag<Float16>{});
    default:
      return f(TypeTag<float>{});
  }
}

}  // namespace

template <class Cell>
LayerOutput Cuda::forward(const ForwardArgs& args) {
  const Layer layer(cell_info(scalar::Cells::index_of<Cell>()), args, KeepType::all);
  return dispatch_element(layer, [&](auto tag) {
    return cuda::forward<typename decltype(tag)::type>(layer, args.save);
  });
}
template <class Cell>
LayerGradients Cuda::backward(const BackwardArgs& args) {
  const Layer layer(cell_info(scalar::Cells::index_of<Cell>()), args, KeepType::all);
  const OutputGradients gradients(layer, args);
  return dispatch_element(layer, [&](auto tag) {
    return cuda::backward<typename decltype(tag)::type>(layer, gradients);
  });
}

template <class Cell>
VariantOutput Cuda::forward_variant(const VariantForwardArgs& args) {
  const Layer layer(cell_info(scalar::Cells::index_of<Cell>()), args, KeepType::all);
  const LayerVariant variant(layer, args, true);
  return dispatch_element(layer, [&](auto tag) {
    return cuda::forward_variant<typename decltype(tag)::type>(layer, variant, args.save);
  });
}
template <class Cell>
LayerGradients Cuda::backward_variant(const VariantBackwardArgs& args) {
  const Layer layer(cell_info(scalar::Cells::index_of<Cell>()), args, KeepType::all);
  const LayerVariant variant(layer, args, true);
  const OutputGradients gradients(layer, variant, args);
  return dispatch_element(layer, [&](auto tag) {
    return cuda::backward_variant<typename decltype(tag)::type>(layer, variant, gradients);
  });
}

void register_cuda_ops(torch::Library& m) {
  register_ops<Cuda>(m);
  register_variant_ops<Cuda>(m);
  m.impl("_random_mask", &make_random_mask);
}

std::string last_algorithm() { return last_name; }

}  // namespace fusedrnn::cuda
