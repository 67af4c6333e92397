#include "persistent.h"

namespace fusedrnn::cuda {
namespace {

/// The packed batch's step offsets [T + 1] on the device; undefined if padded.
Tensor upload_step_offset(const Layer& layer, const LaunchContext& context) {
  if (!layer.packed) return {};
  const std::vector<int64_t> numbers = TokenMap(layer).step_offset();
  const int64_t count = int64_t(numbers.size());
  const Tensor t = at::empty({count}, layer.options().dtype(at::kLong));
  check(upload(numbers.data(), count, t.mutable_data_ptr<int64_t>(), context.stream));
  return t;
}

/// Global memory through which a grid's CTAs exchange operands, all bits set; empty for other
/// plans.
class GridMemory {
 public:
  /// `values`: operands per hidden unit, 1 for h or G for the gate gradients.
  GridMemory(const Layer& layer, const LaunchPlan& plan, const LaunchContext& context,
             int64_t element_bytes, int64_t values) {
    if (plan.algorithm != Algorithm::persistent_grid) return;
    const int64_t bytes = plan.half_operands ? 2 : element_bytes;
    direction_bytes_ =
        kExchangeSlots * plan.groups * plan.tile_rows * values * plan.max_units * bytes;
    memory_ = new_tensor<uint8_t>(layer, {layer.D * direction_bytes_});
    fill(memory_.mutable_data_ptr(), 0xff, memory_.numel(), context);
  }
  uint32_t* of_direction(int64_t d) const {
    return reinterpret_cast<uint32_t*>(data_of<uint8_t>(memory_, d * direction_bytes_));
  }

 private:
  int64_t direction_bytes_ = 0;
  Tensor memory_;  ///< [D, kExchangeSlots, groups * tile_rows, values * max_units] operands
};

PersistentParams common_params(const Layer& layer, const LaunchPlan& plan,
                               const Tensor& step_offset, const GridMemory& memory) {
  PersistentParams params;
  params.steps = int(layer.T);
  params.rows = int(layer.B);
  params.hidden_size = int(layer.H);
  params.directions = int(layer.D);
  params.tile_rows = int(plan.tile_rows);
  params.lengths = const_data_of<int64_t>(layer.lengths);
  params.step_offset = const_data_of<int64_t>(step_offset);
  params.prefetches = plan.prefetches;
  return params;
}

}  // namespace

template <class Element>
bool run_forward_persistent(const Layer& layer, const LaunchPlan& plan,
                            const LaunchContext& context, LayerOutput& out) {
  using Accum = Accumulator<Element>;
  const PersistentKernels<Element>* const kernels = persistent_kernels_for<Element>(layer);
  if (plan.algorithm == Algorithm::stepwise || !kernels) return false;
  const int64_t B = layer.B, N = layer.N, H = layer.H;
  const Tensor step_offset = upload_step_offset(layer, context);
  const GridMemory memory(layer, plan, context, sizeof(Element), 1);
  PersistentForwardParams<Element> params;
  static_cast<PersistentParams&>(params) = common_params(layer, plan, step_offset, memory);
  params.h0_stride = row_stride(layer.h0);
  params.c0_stride = row_stride(layer.c0);
  params.y_stride = layer.D * H;
  const Tensor x = input_tokens(layer);
  Tensor x_products[2];
  for (int64_t d = 0; d < layer.D; ++d) {
    const DirectionWeights& w = layer.weights[size_t(d)];
    x_products[d] = input_product<Element>(layer, x, d, context);
    auto& tensors = params.direction[d];
    tensors.weight_hh = const_data_of<Element>(w.hh);
    tensors.bias_ih = const_data_of<Element>(w.bias_ih);
    tensors.bias_hh = const_data_of<Element>(w.bias_hh);
    tensors.x_product = const_data_of<Accum>(x_products[d]);
    tensors.h0 = initial_state<Element>(layer.h0, d);
    tensors.c0 = initial_state<Element>(layer.c0, d);
    tensors.y = data_of<Element>(out.output, d * H);
    tensors.h_n = data_of<Element>(out.h_n, d * B * H);
    tensors.c_n = data_of<Element>(out.c_n, d * B * H);
    if (out.saved.numel() > 0) {
      tensors.saved = data_of<Accum>(out.saved, d * N * layer.cell.saved * H);
    }
    tensors.exchange = memory.of_direction(d);
  }
  return launched(kernels->forward(params, plan, context.stream));
}

template <class Element>
bool run_backward_persistent(const Layer& layer, const OutputGradients& gradients,
                             const LaunchPlan& plan, const LaunchContext& context,
                             StepGradients& out) {
  using Accum = Accumulator<Element>;
  const PersistentKernels<Element>* const kernels = persistent_kernels_for<Element>(layer);
  if (plan.algorithm == Algorithm::stepwise || !kernels) return false;
  const int64_t B = layer.B, N = layer.N, H = layer.H;
  const Tensor step_offset = upload_step_offset(layer, context);
  const GridMemory memory(layer, plan, context, sizeof(Element), layer.cell.gates);
  PersistentBackwardParams<Element> params;
  static_cast<PersistentParams&>(params) = common_params(layer, plan, step_offset, memory);
  params.h0_stride = row_stride(layer.h0);
  params.c0_stride = row_stride(layer.c0);
  params.dy_stride = layer.D * H;
  for (int64_t d = 0; d < layer.D; ++d) {
    auto& tensors = params.direction[d];
    tensors.weight_hh = const_data_of<Element>(layer.weights[size_t(d)].hh);
    tensors.saved = const_data_of<Accum>(gradients.saved, d * N * layer.cell.saved * H);
    tensors.h0 = initial_state<Element>(layer.h0, d);
    tensors.c0 = initial_state<Element>(layer.c0, d);
    tensors.dy = const_data_of<Element>(gradients.dy, d * H);
    tensors.dh_n = const_data_of<Element>(gradients.dh_n, d * B * H);
    tensors.dc_n = const_data_of<Element>(gradients.dc_n, d * B * H);
    tensors.dgates = data_of<Element>(out.gates.dgates, d * N * layer.cell.preacts * H);
    tensors.h_previous = data_of<Element>(out.gates.h_previous, d * N * H);
    tensors.dh0 = data_of<Element>(out.dh0, d * B * H);
    tensors.dc0 = data_of<Element>(out.dc0, d * B * H);
    tensors.exchange = memory.of_direction(d);
  }
  return launched(kernels->backward(params, plan, context.stream));
}

#define FUSEDRNN_PERSISTENT_OF(Element)                                                   \
  template bool run_forward_persistent<Element>(const Layer&, const LaunchPlan&,          \
                                                const LaunchContext&, LayerOutput&);      \
  template bool run_backward_persistent<Element>(const Layer&, const OutputGradients&,    \
                                                 const LaunchPlan&, const LaunchContext&, \
                                                 StepGradients&);
FUSEDRNN_PERSISTENT_OF(float)
FUSEDRNN_PERSISTENT_OF(double)
FUSEDRNN_PERSISTENT_OF(BFloat16)
FUSEDRNN_PERSISTENT_OF(Float16)

}  // namespace fusedrnn::cuda
