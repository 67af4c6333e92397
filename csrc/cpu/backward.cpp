// A layer's backward pass on the CPU.
#include <ATen/ops/empty.h>

#include "gemm.h"
#include "layer_cpu.h"

namespace fusedrnn::cpu {
namespace {

/// Valid tokens in CompactTokens order, where row lengths differ. Undefined if all tokens are
/// valid.
Tensor valid_tokens(const Layer& layer, const BatchLayout& layout, const CompactTokens& compact) {
  if (!layer.lengths.defined()) return {};
  const Tensor tokens = new_tensor<int64_t>({compact.count});
  int64_t* to = tokens.mutable_data_ptr<int64_t>();
  for (int64_t t = 0; t < layer.T; ++t) {
    for (int64_t j = 0; j < layout.active[t]; ++j) *to++ = layout.step_offset[t] + layout.order[j];
  }
  return tokens;
}

template <class Accum>
GateGradients new_gate_gradients(const Layer& layer, int64_t tokens, bool has_norms) {
  const auto of_tokens = [&](int64_t features) {
    return new_tensor<Accum>({layer.D, tokens, features});
  };
  GateGradients gates{of_tokens(layer.cell.preacts * layer.H), of_tokens(layer.P), {}, {}, {}, {}};
  if (has_norms) {
    gates.dinput = of_tokens(layer.cell.gates * layer.H);
    gates.dhidden = of_tokens(layer.cell.gates * layer.H);
  }
  if (layer.has_projection) {
    gates.dr = of_tokens(layer.P);
    gates.h_raw = of_tokens(layer.H);
  }
  return gates;
}

/// A step multiplies the pre-activations' gradients, [rows, G*H], by weight_hh.
template <class Accum>
LayerWork backward_work(const Layer& layer, const Common<Accum>& common, bool has_norms) {
  LayerWork work{};
  work.rows = layer.B;
  work.steps = layer.T;
  work.output_size = layer.cell.gates * layer.H;
  work.vectors = divide_up(layer.P, common.lanes);
  work.parts = layer.has_projection || has_norms
                   ? 1
                   : divide_up(std::max(layer.H, layer.P), common.block_columns);
  work.tile_rows = common.tile_rows;
  work.vector_bytes = common.lanes * int64_t(sizeof(Accum));
  work.vector_cycles = work.input_vector_cycles = work.vector_bytes == 64 ? 2 : 1;
  return work;
}

/// Appends the gradients of the layer norms' parameters, sums over dnorms [D, B, size] (Variant),
/// or empty tensors for unwanted ones.
void append_sums(const Layer& layer, const OutputGradients& g, const Tensor& dnorms,
                 std::vector<Tensor>& gradients) {
  const int64_t H = layer.H, gates = layer.cell.gates * H;
  int64_t place = 1 + layer.cell.states() + layer.D * layer.weights_per_direction();
  for (int64_t d = 0; d < layer.D; ++d) {
    int64_t first = 0;
    for (const int64_t size : {gates, gates, H, H}) {
      if (first == dnorms.size(2)) break;
      gradients.push_back(g.output_mask[size_t(place++)]
                              ? in_type(dnorms[d].narrow(1, first, size).sum(0), layer.type)
                              : at::empty({0}, layer.options().dtype(layer.type)));
      first += size;
    }
  }
}

/// variant: null for the plain layer.
template <class Accum>
LayerGradients run_backward(const Layer& layer, const OutputGradients& g,
                            const LayerVariant* variant) {
  const bool has_norms = variant && variant->has_norms();
  const int64_t D = layer.D, H = layer.H, P = layer.P;
  const Common<Accum>& common = table<Accum>().common;
  const Kernel<Accum>& kernel = kernel_of<Accum>(layer.cell);
  const BatchLayout layout(layer);
  const WorkPartition partition(layer, layout, backward_work(layer, common, has_norms), true,
                                divide_up(std::max(H, P), common.block_columns));
  const CompactTokens compact(layout);
  const GateGradients gates = new_gate_gradients<Accum>(layer, compact.count, has_norms);
  const Tensor dnorm_c =
      has_norms && layer.cell.has_cell_state ? new_tensor<Accum>({D, compact.count, H}) : Tensor();
  const int64_t norms = 2 * (layer.cell.gates + layer.cell.has_cell_state) * H;
  const Tensor dnorms = has_norms ? new_tensor<Accum>({D, layer.B, norms}) : Tensor();
  c10::SmallVector<Variant<Accum>, 2> variants;
  for (int64_t d = 0; variant && d < D; ++d) {
    Variant<Accum> v = variant->of_direction<Accum>(layer, d);
    if (g.dcells.defined()) v.dcells = g.dcells.const_data_ptr<Accum>() + d * H;
    v.dinput = direction_data<Accum>(gates.dinput, d);
    v.dhidden = direction_data<Accum>(gates.dhidden, d);
    v.dnorm_c = direction_data<Accum>(dnorm_c, d);
    v.dnorms = direction_data<Accum>(dnorms, d);
    v.dnorms_size = norms;
    variants.push_back(v);
  }
  const Tensor dh0 = new_tensor<Accum>({D, layer.B, P});
  const Tensor dc0 = layer.cell.has_cell_state ? new_tensor<Accum>({D, layer.B, H}) : Tensor();

  const Scratch<Accum> projection_panels =
      layer.has_projection ? prepack_weights<Accum>(layer, &DirectionWeights::hr, P, H, H, 1)
                           : Scratch<Accum>();
  const bool prepacks = pays_to_prepack<Accum>(layer.T * divide_up(layer.B, common.tile_rows), P);
  const Scratch<Accum> panels =
      prepacks ? prepack_weights<Accum>(layer, &DirectionWeights::hh, layer.cell.gates * H, P, P, 1)
               : Scratch<Accum>();

  const Runs<Backward<Accum>> runs(
      layer, layout, partition,
      variant ? kernel.variants.backward_workspace : kernel.backward_workspace,
      variant ? kernel.variants.backward_begin : kernel.backward_begin,
      [&](Backward<Accum>& s, const WorkPartition::RowGroup& group) {
        const int64_t d = group.direction;
        s.panels = prepacks ? panels[d] : const_data<Accum>(layer.weights[d].hh);
        s.matrix_stride = prepacks ? 0 : P;
        s.projection_panels = projection_panels.get(d);
        if (variant) s.variant = &variants[size_t(d)];
        if (layer.has_projection && !variant) s.y = g.output.const_data_ptr<Accum>() + d * P;
        s.y_stride = s.dy_stride = D * P;
        s.saved = direction_data<Accum>(g.saved, d);
        if (g.dy.defined()) s.dy = g.dy.const_data_ptr<Accum>() + d * P;
        s.dh_n = direction_data<Accum>(g.dh_n, d);
        s.dc_n = direction_data<Accum>(g.dc_n, d);
        s.sorted_index = group.sorted_index.data();
        s.compact_offset = compact.step_offset.data();
        s.dgates = direction_data<Accum>(gates.dgates, d);
        s.h_previous = direction_data<Accum>(gates.h_previous, d);
        s.dr = direction_data<Accum>(gates.dr, d);
        s.h_raw = direction_data<Accum>(gates.h_raw, d);
        s.dh0 = direction_data<Accum>(dh0, d);
        s.dc0 = direction_data<Accum>(dc0, d);
      });
  // The extra last step takes the gradients to h0.
  const auto step = variant ? kernel.variants.backward_step : kernel.backward_step;
  partition.execute(layer.T + 1, [&](int64_t r, int64_t i, int64_t begin, int64_t end) {
    step(runs[r], i, begin, end);
  });
  const Tensor tokens = valid_tokens(layer, layout, compact), x = layer.flat_input();
  LayerGradients found =
      layer_gradients(layer, g, gates, dh0, dc0, tokens.defined() ? x.index_select(0, tokens) : x,
                      TileGemms<Accum>(), tokens);
  if (has_norms) {
    append_sums(layer, g, dnorms, found.weights);
  }
  return found;
}

}  // namespace

template <class Accum>
LayerGradients backward(const Layer& layer, const OutputGradients& g) {
  return run_backward<Accum>(layer, g, nullptr);
}
template <class Accum>
LayerGradients backward_variant(const Layer& layer, const OutputGradients& g,
                                const LayerVariant& variant) {
  return run_backward<Accum>(layer, g, &variant);
}

template LayerGradients backward<float>(const Layer&, const OutputGradients&);
template LayerGradients backward<double>(const Layer&, const OutputGradients&);
template LayerGradients backward_variant<float>(const Layer&, const OutputGradients&,
                                                const LayerVariant&);
template LayerGradients backward_variant<double>(const Layer&, const OutputGradients&,
                                                 const LayerVariant&);

}  // namespace fusedrnn::cpu
