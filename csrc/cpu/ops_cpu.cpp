// The ops on the CPU: each call's types, and registration for the CPU key.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <string>
#include <vector>

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

LayerGradients run_backward(const CellInfo& cell, const BackwardArgs& args) {
  const Layer layer(cell, args);
  const OutputGradients g(layer, args);
  const PoolBackoff::Call call;
  return layer.compute_type == at::kDouble ? backward<double>(layer, g) : backward<float>(layer, g);
}

struct Cpu {
  template <class Cell>
  static LayerOutput forward(const ForwardArgs& args) {
    return run_forward(cell_info(scalar::Cells::index_of<Cell>()), args);
  }
  template <class Cell>
  static LayerGradients backward(const BackwardArgs& args) {
    return run_backward(cell_info(scalar::Cells::index_of<Cell>()), args);
  }
};

std::string isa() { return kernels().isa; }

}  // namespace

TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) { register_ops<Cpu>(m); }
TORCH_LIBRARY_IMPL(fusedrnn, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", &isa);
  m.impl("_cpu_threads", &threads);
}

}  // namespace fusedrnn::cpu
