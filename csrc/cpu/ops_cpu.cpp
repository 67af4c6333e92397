// The ops on the CPU: each call's types, and registration for the CPU key.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "gemm.h"
#include "kernel_table.h"
#include "layer_cpu.h"

namespace fusedrnn::cpu {
namespace {

/// Whether the kernels multiply this call's bfloat16. Not with a projection: it would have to round
/// once more.
bool multiplies_bfloat16(const LayerArgs& args) {
  return args.input.scalar_type() == at::kBFloat16 && kernels().bf16 &&
         args.weights.size() / (args.bidirectional ? 2 : 1) % 2 == 0;
}

/// Appends a zero feature to an odd feature count: the kernels read bfloat16 in pairs.
void make_features_even(Layer& layer) {
  if (layer.I % 2 == 0) return;
  std::vector<int64_t> shape = layer.input.sizes().vec();
  ++shape.back();
  const Tensor padded = at::zeros(shape, layer.options());
  padded.narrow(-1, 0, layer.I).copy_(layer.input);
  layer.input = padded;
}

LayerOutput run_forward(const CellInfo& cell, const ForwardArgs& args) {
  Layer layer(cell, args, multiplies_bfloat16(args) ? KeepType::operands : KeepType::none);
  const PoolBackoff::Call call;
  LayerOutput out;
  if (layer.input.scalar_type() == at::kBFloat16) {
    make_features_even(layer);
    out = forward<BFloat16>(layer, args.save);
  } else if (layer.compute_type == at::kDouble) {
    out = forward<double>(layer, args.save);
  } else {
    out = forward<float>(layer, args.save);
  }
  for (Tensor* t : {&out.output, &out.h_n, &out.c_n}) {
    if (t->defined()) *t = in_type(*t, layer.type);
  }
  return out;
}

/// Panels for this machine's vectors.
FrozenWeights for_this_machine(const FrozenWeights& weights) {
  if (weights.fits(kernels())) return weights;
  TORCH_WARN_ONCE(
      "fusedrnn: these weights were frozen on a machine with other vectors, and are packed anew in "
      "each call: freeze the model on this machine");
  return FrozenWeights(freeze(weights.cell(), weights.unfreeze(), weights.sizes().D == 2,
                              weights.type(), kernels()));
}

LayerOutput run_frozen(const CellInfo& cell, const FrozenArgs& args) {
  const FrozenWeights weights = for_this_machine(FrozenWeights(args.weights));
  const FrozenSizes& sizes = weights.sizes();
  TORCH_CHECK(weights.cell().index == cell.index, "fusedrnn::", cell.name,
              "_frozen: the weights were frozen for ", weights.cell().name);
  TORCH_CHECK(args.hidden_size == sizes.H && args.output_size == sizes.P, "fusedrnn::", cell.name,
              "_frozen: Expected hidden_size ", sizes.H, " and output_size ", sizes.P, ", got ",
              args.hidden_size, " and ", args.output_size);
  Layer layer(
      cell,
      LayerArgs{
          args.input, args.h0, args.c0, {}, args.bidirectional, args.batch_sizes, args.lengths},
      KeepType::none, &sizes);
  const PoolBackoff::Call call;
  if (weights.type() == WeightType::bfloat16) make_features_even(layer);
  LayerOutput out = forward_frozen(layer, weights);
  for (Tensor* t : {&out.output, &out.h_n, &out.c_n}) {
    if (t->defined()) *t = in_type(*t, layer.type);
  }
  return out;
}

Tensor freeze_layer(const std::string& name, at::TensorList weights, bool bidirectional,
                    at::ScalarType type) {
  WeightType found = WeightType::float32;
  if (type == at::kBFloat16) {
    found = WeightType::bfloat16;
  } else if (type == at::kChar) {
    found = WeightType::int8;
  } else {
    TORCH_CHECK(type == at::kFloat, "_freeze: type must be float32, bfloat16 or int8, got ", type);
  }
  for (int i = 0; i < scalar::Cells::count; ++i) {
    if (name == cell_info(i).name) {
      return freeze(cell_info(i), weights, bidirectional, found, kernels());
    }
  }
  TORCH_CHECK(false, "_freeze: there is no cell ", name);
}

std::vector<Tensor> unfreeze_layer(const Tensor& weights) {
  return FrozenWeights(weights).unfreeze();
}

LayerGradients run_backward(const CellInfo& cell, const BackwardArgs& args) {
  const Layer layer(cell, args);
  const OutputGradients g(layer, args);
  const PoolBackoff::Call call;
  return layer.compute_type == at::kDouble ? backward<double>(layer, g) : backward<float>(layer, g);
}

VariantOutput run_forward_variant(const CellInfo& cell, const VariantForwardArgs& args) {
  const Layer layer(cell, args);
  const LayerVariant variant(layer, args, false);
  const PoolBackoff::Call call;
  VariantOutput out = layer.compute_type == at::kDouble
                          ? forward_variant<double>(layer, variant, args.save)
                          : forward_variant<float>(layer, variant, args.save);
  if (!out.cells.defined()) out.cells = at::empty({0}, layer.options());
  for (Tensor* t : {&out.output, &out.h_n, &out.c_n, &out.cells}) {
    if (t->defined()) *t = in_type(*t, layer.type);
  }
  return out;
}

LayerGradients run_backward_variant(const CellInfo& cell, const VariantBackwardArgs& args) {
  const Layer layer(cell, args);
  const LayerVariant variant(layer, args, false);
  const OutputGradients g(layer, variant, args);
  const PoolBackoff::Call call;
  return layer.compute_type == at::kDouble ? backward_variant<double>(layer, g, variant)
                                           : backward_variant<float>(layer, g, variant);
}

Tensor random_mask(const Tensor& seed, c10::IntArrayRef size, double p) {
  TORCH_CHECK(seed.device().is_cpu() && seed.scalar_type() == at::kLong && seed.numel() == 1,
              "_random_mask: seed must be one int64 on the CPU");
  TORCH_CHECK(p >= 0 && p <= 1, "_random_mask: p must be from 0 to 1, got ", p);
  const Tensor mask = at::empty(size, at::kBool);
  bool* const out = mask.mutable_data_ptr<bool>();
  const int64_t count = mask.numel();
  const double scaled = p * 4294967296.0;
  if (scaled > 4294967295.0) {  // no word is as large
    std::fill(out, out + count, true);
    return mask;
  }
  const auto key = uint64_t(seed.item<int64_t>());
  const int64_t block = kernels().mask_block, blocks = scalar::divide_up(count, block);
  // A value costs about four multiply-adds.
  in_row_parts<float>(blocks, 4 * count, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * block;
    kernels().random_mask(key, first, std::min(end * block, count) - first, uint32_t(scaled),
                          out + first);
  });
  return mask;
}

struct Cpu {
  template <class Cell>
  static VariantOutput forward_variant(const VariantForwardArgs& args) {
    return run_forward_variant(cell_info(scalar::Cells::index_of<Cell>()), args);
  }
  template <class Cell>
  static LayerGradients backward_variant(const VariantBackwardArgs& args) {
    return run_backward_variant(cell_info(scalar::Cells::index_of<Cell>()), args);
  }
  template <class Cell>
  static LayerOutput forward(const ForwardArgs& args) {
    return run_forward(cell_info(scalar::Cells::index_of<Cell>()), args);
  }
  template <class Cell>
  static LayerOutput frozen(const FrozenArgs& args) {
    return run_frozen(cell_info(scalar::Cells::index_of<Cell>()), args);
  }
  template <class Cell>
  static LayerGradients backward(const BackwardArgs& args) {
    return run_backward(cell_info(scalar::Cells::index_of<Cell>()), args);
  }
};

std::string isa() { return kernels().isa; }
/// Equal where frozen weights fit both.
std::string panel_layout() {
  return std::to_string(kernels().f32.common.lanes) + "x" +
         std::to_string(kernels().frozen_int8.common.per_lane);
}

}  // namespace

TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) {
  register_ops<Cpu>(m);
  register_frozen_ops<Cpu>(m);
  register_variant_ops<Cpu>(m);
  m.impl("_random_mask", &random_mask);
  m.impl("_freeze", &freeze_layer);
  m.impl("_unfreeze", &unfreeze_layer);
}
TORCH_LIBRARY_IMPL(fusedrnn, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", &isa);
  m.impl("_cpu_panel_layout", &panel_layout);
  m.impl("_cpu_threads", &threads);
}

}  // namespace fusedrnn::cpu
