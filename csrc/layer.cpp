#include "layer.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <numeric>
#include <utility>

namespace fusedrnn {
namespace {

#define FUSEDRNN_CHECK(cell, condition, ...) \
  TORCH_CHECK(condition, "fusedrnn::", (cell).name, ": ", __VA_ARGS__)
#define FUSEDRNN_CHECK_BACKWARD(cell, condition, ...) \
  TORCH_CHECK(condition, "fusedrnn::", (cell).name, "_backward: ", __VA_ARGS__)

/// FSDP and others free a tensor's memory and keep the tensor.
void check_allocated(const CellInfo& cell, const char* name, const Tensor& t) {
  FUSEDRNN_CHECK(cell, t.numel() == 0 || t.storage().nbytes() > 0, name,
                 " has elements, but its data is not allocated");
}

void check_like(const CellInfo& cell, const char* name, const Tensor& t, const Tensor& input,
                c10::IntArrayRef shape) {
  FUSEDRNN_CHECK(cell, t.device() == input.device(), "input is on ", input.device(), " but ", name,
                 " is on ", t.device());
  FUSEDRNN_CHECK(cell, t.scalar_type() == input.scalar_type(), "input has type ",
                 input.scalar_type(), " but ", name, " has type ", t.scalar_type());
  FUSEDRNN_CHECK(cell, t.sizes() == shape, "Expected ", name, " size ", shape, ", got ", t.sizes());
  check_allocated(cell, name, t);
}

/// With the features next to each other, as the kernels read them.
Tensor with_contiguous_features(const Tensor& t, at::ScalarType type) {
  const Tensor converted = in_type(t, type);
  return converted.size(-1) <= 1 || converted.stride(-1) == 1 ? converted : converted.contiguous();
}

template <class... Cell>
constexpr std::array<CellInfo, sizeof...(Cell)> cell_infos(scalar::CellList<Cell...>) {
  return {CellInfo::of<Cell>()...};
}
constexpr auto kCellInfos = cell_infos(scalar::Cells());

}  // namespace

const CellInfo& cell_info(int index) { return kCellInfos[size_t(index)]; }

Layer::Layer(const CellInfo& cell_info, const LayerArgs& args, KeepType keep_type,
             const FrozenSizes* frozen)
    : cell(cell_info), type(args.input.scalar_type()), D(args.bidirectional ? 2 : 1) {
  const Tensor& x = args.input;
  packed = args.batch_sizes.has_value();
  compute_type = type == at::kDouble ? at::kDouble : at::kFloat;
  const at::ScalarType operand_type = keep_type == KeepType::none ? compute_type : type;
  state_type = keep_type == KeepType::all ? type : compute_type;
  FUSEDRNN_CHECK(
      cell, type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf,
      "input must be float32, float64, bfloat16 or float16, got ", type);
  FUSEDRNN_CHECK(cell, x.dim() == (packed ? 2 : 3), "Expected input to be ", packed ? "2D" : "3D",
                 packed ? " with batch_sizes" : "", ", got ", x.dim(), "D");
  I = x.size(-1);
  check_allocated(cell, "input", x);
  if (packed) {
    FUSEDRNN_CHECK(cell, !args.lengths, "batch_sizes and lengths exclude each other");
    read_batch_sizes(*args.batch_sizes, x.size(0));
  } else {
    T = x.size(0);
    B = x.size(1);
    N = T * B;
  }
  TORCH_CHECK(T > 0, "Expected sequence length to be larger than 0 in RNN");
  if (args.lengths) read_lengths(*args.lengths, x);
  if (frozen) {
    FUSEDRNN_CHECK(cell, D == frozen->D, "the weights were frozen for ", frozen->D, " direction",
                   frozen->D == 2 ? "s" : "", ", got ", D);
    FUSEDRNN_CHECK(cell, I == frozen->I, "input.size(-1) must be equal to input_size. Expected ",
                   frozen->I, ", got ", I);
    FUSEDRNN_CHECK(cell, type != at::kDouble, "frozen weights take no float64 input");
    H = frozen->H;
    P = frozen->P;
    has_bias = frozen->has_bias;
    has_projection = frozen->has_projection;
  } else {
    read_weights(x, args.weights, operand_type);
  }
  if (args.h0) check_like(cell, "h0", *args.h0, x, {D, B, P});
  if (args.c0) check_like(cell, "c0", *args.c0, x, {D, B, H});
  input = with_contiguous_features(x, operand_type);
  if (args.h0) h0 = with_contiguous_features(*args.h0, state_type);
  if (args.c0) c0 = with_contiguous_features(*args.c0, state_type);
}

void Layer::read_batch_sizes(const Tensor& sizes, int64_t rows) {
  FUSEDRNN_CHECK(cell,
                 sizes.device().is_cpu() && sizes.scalar_type() == at::kLong && sizes.dim() == 1,
                 "batch_sizes must be a 1-D int64 tensor on the CPU");
  const Tensor flat = sizes.contiguous();
  batch_sizes.assign(flat.const_data_ptr<int64_t>(), flat.const_data_ptr<int64_t>() + flat.numel());
  for (size_t t = 0; t < batch_sizes.size(); ++t) {
    FUSEDRNN_CHECK(cell, batch_sizes[t] > 0 && (t == 0 || batch_sizes[t] <= batch_sizes[t - 1]),
                   "batch_sizes must be positive and never increase, got ",
                   c10::IntArrayRef(batch_sizes));
    // One by one, so that no sum can overflow.
    FUSEDRNN_CHECK(cell, batch_sizes[t] <= rows, "batch_sizes don't add up to the ", rows,
                   " rows of input");
  }
  T = int64_t(batch_sizes.size());
  B = T ? batch_sizes[0] : 0;
  N = std::accumulate(batch_sizes.begin(), batch_sizes.end(), int64_t(0));
  FUSEDRNN_CHECK(cell, N == rows, "batch_sizes add up to ", N, " but input has ", rows, " rows");
}

void Layer::read_lengths(const Tensor& l, const Tensor& x) {
  FUSEDRNN_CHECK(
      cell,
      l.device() == x.device() && l.scalar_type() == at::kLong && l.dim() == 1 && l.size(0) == B,
      "lengths must be an int64 tensor of size [", B, "] on the device of input");
  lengths = l.contiguous();
}

void Layer::read_weights(const Tensor& x, at::TensorList list, at::ScalarType operand_type) {
  const int64_t count = int64_t(list.size()), per = count / D;
  const bool is_count = per == 2 || per == 4 || (cell.has_projection && (per == 3 || per == 5));
  FUSEDRNN_CHECK(cell, count == per * D && is_count, "got ", list.size(), " weights for ", D,
                 " direction", D == 2 ? "s" : "");
  has_bias = per >= 4;
  has_projection = per % 2 == 1;
  for (const Tensor& w : list) FUSEDRNN_CHECK(cell, w.defined(), "a weight is undefined");
  const Tensor& first_hh = list[1];
  FUSEDRNN_CHECK(cell, first_hh.dim() == 2 && first_hh.size(0) % cell.gates == 0,
                 "Expected weight_hh size [", cell.gates, " * hidden_size, output size], got ",
                 first_hh.sizes());
  H = first_hh.size(0) / cell.gates;
  P = first_hh.size(1);
  FUSEDRNN_CHECK(cell, H > 0 && P > 0 && (has_projection || P == H), "Expected weight_hh size [",
                 first_hh.size(0), ", ", H, "], got ", first_hh.sizes());
  const auto ready = [&](const Tensor& t) { return in_type(t, operand_type).contiguous(); };
  for (int64_t d = 0; d < D; ++d) {
    const Tensor* w = &list[d * per];
    check_like(cell, "weight_ih", w[0], x, {cell.gates * H, I});
    check_like(cell, "weight_hh", w[1], x, {cell.gates * H, P});
    if (has_bias) {
      check_like(cell, "bias_ih", w[2], x, {cell.gates * H});
      check_like(cell, "bias_hh", w[3], x, {cell.gates * H});
    }
    if (has_projection) check_like(cell, "weight_hr", w[per - 1], x, {P, H});
    weights.push_back({ready(w[0]), ready(w[1]), has_bias ? ready(w[2]) : Tensor(),
                       has_bias ? ready(w[3]) : Tensor(),
                       has_projection ? ready(w[per - 1]) : Tensor()});
  }
}

Tensor Layer::flat_input() const { return input.reshape({N, input.size(-1)}).contiguous(); }

std::vector<int64_t> Layer::shape(int64_t features) const {
  return packed ? std::vector<int64_t>{N, features} : std::vector<int64_t>{T, B, features};
}

namespace {

/// weight_hh's gradient. Row blocks whose pre-activations are neighbours share a GEMM.
Tensor hidden_weight_gradient(const Layer& layer, const Tensor& dgates, const Tensor& h_previous,
                              const Gemms& gemms) {
  const CellInfo& cell = layer.cell;
  const auto& at = cell.hidden_preact;
  const Tensor out = at::empty({cell.gates * layer.H, layer.P}, layer.options());
  for (int64_t gate = 0, end; gate < cell.gates; gate = end) {
    for (end = gate + 1; end < cell.gates && at[end] == at[end - 1] + 1;) ++end;
    const int64_t rows = (end - gate) * layer.H;
    gemms.multiply_transposed(dgates.narrow(1, at[gate] * layer.H, rows), h_previous,
                              out.narrow(0, gate * layer.H, rows));
  }
  return out;
}

}  // namespace

void Gemms::bias_gradients(const Layer& layer, const Tensor& dgates, const Tensor& bias_ih,
                           const Tensor& bias_hh) const {
  const CellInfo& cell = layer.cell;
  const int64_t H = layer.H;
  if (cell.preacts == cell.gates) {  // both biases add to each pre-activation
    Tensor first = bias_ih.defined() ? bias_ih : bias_hh;
    at::sum_out(first, dgates, 0);
    if (bias_hh.defined() && !bias_hh.is_same(first)) bias_hh.copy_(first);
    return;
  }
  const Tensor all = dgates.sum(0);
  if (bias_ih.defined()) bias_ih.copy_(all.narrow(0, 0, cell.gates * H));
  if (!bias_hh.defined()) return;
  for (int64_t gate = 0; gate < cell.gates; ++gate) {
    bias_hh.narrow(0, gate * H, H).copy_(all.narrow(0, cell.hidden_preact[gate] * H, H));
  }
}

LayerGradients layer_gradients(const Layer& layer, const OutputGradients& g,
                               const GateGradients& gates, const Tensor& dh0, const Tensor& dc0,
                               const Tensor& x, const Gemms& gemms, const Tensor& tokens) {
  const int64_t inputs = layer.cell.gates * layer.H, per = layer.weights_per_direction();
  const int64_t first_weight = 1 + layer.cell.states();
  const bool wants_input = g.output_mask[0];
  const auto wanted = [&](const Tensor& t, int64_t i) {
    return g.output_mask[i] ? in_type(t, layer.type)
                            : at::empty({0}, layer.options().dtype(layer.type));
  };
  const auto product = [&](const Tensor& a, const Tensor& b) {
    const Tensor result = at::empty({a.size(1), b.size(1)}, layer.options());
    gemms.multiply_transposed(a, b, result);
    return result;
  };
  LayerGradients out;
  if (wants_input) out.input = at::empty(x.sizes(), layer.options());
  for (int64_t d = 0; d < layer.D; ++d) {
    const int64_t first = first_weight + d * per;
    const auto wants = [&](int64_t i) { return g.output_mask[first + i]; };
    const Tensor dgates = gates.dgates[d];
    const Tensor dinput = gates.dinput.defined() ? gates.dinput[d] : dgates.narrow(1, 0, inputs);
    if (wants_input) gemms.multiply(dinput, layer.weights[d].ih, out.input, d > 0);
    std::vector<Tensor> of(static_cast<size_t>(per));
    if (wants(0)) of[0] = product(dinput, x);
    if (wants(1)) {
      of[1] = gates.dhidden.defined()
                  ? product(gates.dhidden[d], gates.h_previous[d])
                  : hidden_weight_gradient(layer, dgates, gates.h_previous[d], gemms);
    }
    if (layer.has_bias && (wants(2) || wants(3))) {
      // Two tensors: an optimizer may change one gradient in place.
      for (int64_t i : {2, 3}) {
        if (wants(i)) of[size_t(i)] = at::empty({inputs}, layer.options());
      }
      gemms.bias_gradients(layer, dgates, of[2], of[3]);
    }
    if (layer.has_projection && wants(per - 1)) of[per - 1] = product(gates.dr[d], gates.h_raw[d]);
    for (int64_t i = 0; i < per; ++i) out.weights.push_back(wanted(of[i], first + i));
  }
  if (wants_input && tokens.defined()) {
    out.input = at::zeros({layer.N, layer.I}, layer.options()).index_copy_(0, tokens, out.input);
  }
  out.input = wanted(wants_input ? out.input.view(layer.shape(layer.I)) : out.input, 0);
  out.h0 = wanted(dh0, 1);
  if (layer.cell.has_cell_state) out.c0 = wanted(dc0, 2);
  return out;
}

void append_norm_gradients(const Layer& layer, const OutputGradients& g,
                           const LayerVariant& variant, const GateGradients& gates,
                           const Tensor& dnorm_c, std::vector<Tensor>& gradients,
                           const Tensor& tokens) {
  const int64_t H = layer.H, size = layer.cell.gates * H;
  int64_t place = 1 + layer.cell.states() + layer.D * layer.weights_per_direction();
  for (int64_t d = 0; d < layer.D; ++d) {
    const auto normalised = [&](int64_t first, int64_t count) {
      const Tensor all = g.saved[d].narrow(1, first, count);
      return tokens.defined() ? all.index_select(0, tokens) : all;
    };
    const auto give = [&](const auto& sum) {
      gradients.push_back(g.output_mask[size_t(place++)]
                              ? in_type(sum(), layer.type)
                              : at::empty({0}, layer.options().dtype(layer.type)));
    };
    const Tensor dgates = gates.dgates[d];
    give([&] {
      return at::mul(dgates.narrow(1, 0, size), normalised(variant.saved.input, size)).sum(0);
    });
    give([&] {
      std::vector<Tensor> of_gates;
      for (int64_t gate = 0; gate < layer.cell.gates; ++gate) {
        const Tensor x = normalised(variant.saved.hidden + gate * H, H);
        of_gates.push_back(
            at::mul(dgates.narrow(1, layer.cell.hidden_preact[size_t(gate)] * H, H), x).sum(0));
      }
      return at::cat(of_gates);
    });
    if (!layer.cell.has_cell_state) continue;
    give([&] { return at::mul(dnorm_c[d], normalised(variant.saved.norm_c, H)).sum(0); });
    give([&] { return dnorm_c[d].sum(0); });
  }
}

Tensor OutputGradients::ready(const Layer& layer, const char* name, const Tensor& t,
                              c10::IntArrayRef shape) const {
  const CellInfo& cell = layer.cell;
  FUSEDRNN_CHECK_BACKWARD(cell, t.scalar_type() == layer.type, "input has type ", layer.type,
                          " but ", name, " has type ", t.scalar_type());
  FUSEDRNN_CHECK_BACKWARD(cell, t.device() == layer.input.device(), "input is on ",
                          layer.input.device(), " but ", name, " is on ", t.device());
  FUSEDRNN_CHECK_BACKWARD(cell, t.sizes() == shape, "Expected ", name, " size ", shape, ", got ",
                          t.sizes());
  return in_type(t, layer.state_type).contiguous();
}

OutputGradients::OutputGradients(const Layer& layer, const OutputGradientArgs& args,
                                 const Tensor& saved_values, c10::IntArrayRef saved_shape) {
  if (args.grad_output) {
    dy = ready(layer, "grad_output", *args.grad_output, layer.shape(layer.D * layer.P));
  }
  if (args.grad_h_n) dh_n = ready(layer, "grad_h_n", *args.grad_h_n, {layer.D, layer.B, layer.P});
  if (args.grad_c_n) dc_n = ready(layer, "grad_c_n", *args.grad_c_n, {layer.D, layer.B, layer.H});
  FUSEDRNN_CHECK_BACKWARD(layer.cell,
                          saved_values.scalar_type() == layer.compute_type &&
                              saved_values.device() == layer.input.device() &&
                              saved_values.sizes() == saved_shape,
                          "saved must be what the forward op returned with save=True");
  saved = saved_values.contiguous();
}

void OutputGradients::read_mask(const Layer& layer, const c10::List<bool>& mask, int64_t weights) {
  output_mask.assign(mask.begin(), mask.end());
  const size_t wanted = size_t(1 + layer.cell.states() + weights);
  FUSEDRNN_CHECK_BACKWARD(layer.cell, output_mask.size() == wanted, "Expected ", wanted,
                          " entries in output_mask, got ", output_mask.size());
}

OutputGradients::OutputGradients(const Layer& layer, const BackwardArgs& args)
    : OutputGradients(layer, args, args.saved, {layer.D, layer.N, layer.cell.saved, layer.H}) {
  FUSEDRNN_CHECK_BACKWARD(layer.cell, args.output || !layer.has_projection,
                          "output is needed with a projection");
  if (layer.has_projection) {
    output = ready(layer, "output", *args.output, layer.shape(layer.D * layer.P));
  }
  read_mask(layer, args.output_mask, layer.D * layer.weights_per_direction());
}

OutputGradients::OutputGradients(const Layer& layer, const LayerVariant& variant,
                                 const VariantBackwardArgs& args)
    : OutputGradients(layer, args, args.saved, {layer.D, layer.N, variant.saved.size}) {
  if (args.grad_cells && layer.cell.has_cell_state) {
    dcells = ready(layer, "grad_cells", *args.grad_cells, layer.shape(layer.D * layer.H));
  }
  read_mask(layer, args.output_mask,
            layer.D * (layer.weights_per_direction() + variant.norms_per_direction(layer)));
}

LayerVariant::LayerVariant(const Layer& layer, const VariantArgs& args, bool keeps_states)
    : reset_to_initial(args.reset_to_initial),
      candidate_scale(args.candidate_scale),
      zoneout_h(args.zoneout_h),
      zoneout_c(args.zoneout_c),
      saved(layer.H, layer.P, layer.cell.gates, layer.cell.saved, layer.cell.has_cell_state,
            !args.norms.empty(),
            keeps_states || layer.has_projection || args.zoneout_h_mask || args.zoneout_h != 0,
            keeps_states || !args.norms.empty() || args.zoneout_c_mask || args.zoneout_c != 0) {
  const CellInfo& cell = layer.cell;
  const Tensor& x = args.input;
  const auto mask = [&](const char* name, const OptionalTensor& t, std::vector<int64_t> shape) {
    if (!t) return Tensor();
    FUSEDRNN_CHECK(cell, t->device() == x.device(), "input is on ", x.device(), " but ", name,
                   " is on ", t->device());
    FUSEDRNN_CHECK(cell, t->scalar_type() == at::kBool, name, " must have type Bool, got ",
                   t->scalar_type());
    FUSEDRNN_CHECK(cell, t->sizes() == shape, "Expected ", name, " size ", c10::IntArrayRef(shape),
                   ", got ", t->sizes());
    check_allocated(cell, name, *t);
    return t->contiguous();
  };
  // [D, *tokens, features]; no features: [*tokens].
  const auto of_tokens = [&](int64_t features) {
    std::vector<int64_t> shape = layer.shape(features);
    if (features) {
      shape.insert(shape.begin(), layer.D);
    } else {
      shape.pop_back();
    }
    return shape;
  };
  reset_mask = mask("reset_mask", args.reset_mask, of_tokens(0));
  if (args.hidden_mask) {
    check_like(cell, "hidden_mask", *args.hidden_mask, x, {layer.D, layer.B, layer.P});
    hidden_mask = in_type(*args.hidden_mask, layer.compute_type).contiguous();
  }
  FUSEDRNN_CHECK(cell, cell.has_candidate || !args.candidate_mask,
                 "candidate_mask: the cell has no candidate");
  candidate_mask = mask("candidate_mask", args.candidate_mask, of_tokens(layer.H));
  zoneout_h_mask = mask("zoneout_h_mask", args.zoneout_h_mask, of_tokens(layer.P));
  FUSEDRNN_CHECK(cell, cell.has_cell_state || (!args.zoneout_c_mask && args.zoneout_c == 0),
                 "zoneout_c: the cell has no cell state");
  zoneout_c_mask = mask("zoneout_c_mask", args.zoneout_c_mask, of_tokens(layer.H));
  for (const double share : {zoneout_h, zoneout_c}) {
    FUSEDRNN_CHECK(cell, share >= 0 && share <= 1,
                   "zoneout_h and zoneout_c must be from 0 to 1, got ", share);
  }
  if (args.norms.empty()) return;
  const int64_t per = 2 + 2 * cell.has_cell_state;
  FUSEDRNN_CHECK(cell, int64_t(args.norms.size()) == per * layer.D, "Expected ", per * layer.D,
                 " norms, got ", args.norms.size());
  for (int64_t d = 0; d < layer.D; ++d) {
    const auto norm = [&](int64_t i, const char* name, int64_t size) {
      const Tensor& t = args.norms[size_t(d * per + i)];
      FUSEDRNN_CHECK(cell, t.defined(), name, " is undefined");
      check_like(cell, name, t, x, {size});
      return in_type(t, layer.compute_type).contiguous();
    };
    const int64_t gates = cell.gates * layer.H;
    norms.push_back({norm(0, "norm_ih", gates), norm(1, "norm_hh", gates),
                     cell.has_cell_state ? norm(2, "norm_c", layer.H) : Tensor(),
                     cell.has_cell_state ? norm(3, "norm_c_bias", layer.H) : Tensor()});
  }
}

}  // namespace fusedrnn
