#include "layer.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <numeric>

namespace fusedrnn {
namespace {

/// FSDP and others take the memory of a tensor away and leave the rest.
void check_allocated(const CellInfo& cell, const char* name, const Tensor& t) {
  TORCH_CHECK(t.numel() == 0 || t.storage().nbytes() > 0, "fusedrnn::", cell.name, ": ", name,
              " has elements, but its data is not allocated");
}

void check_like(const CellInfo& cell, const char* name, const Tensor& t, const Tensor& input,
                c10::IntArrayRef shape) {
  TORCH_CHECK(t.device() == input.device(), "fusedrnn::", cell.name, ": input is on ",
              input.device(), " but ", name, " is on ", t.device());
  TORCH_CHECK(t.scalar_type() == input.scalar_type(), "fusedrnn::", cell.name, ": input has type ",
              input.scalar_type(), " but ", name, " has type ", t.scalar_type());
  TORCH_CHECK(t.sizes() == shape, "fusedrnn::", cell.name, ": Expected ", name, " size ", shape,
              ", got ", t.sizes());
  check_allocated(cell, name, t);
}

/// With the features next to each other, as the kernels read them.
Tensor with_contiguous_features(const Tensor& t, at::ScalarType type) {
  const Tensor converted = in_type(t, type);
  return converted.size(-1) <= 1 || converted.stride(-1) == 1 ? converted : converted.contiguous();
}

}  // namespace

Layer::Layer(const CellInfo& cell_info, const Tensor& x, const OptionalTensor& h,
             const OptionalTensor& c, at::TensorList list, bool bidirectional,
             const OptionalTensor& sizes, const OptionalTensor& row_lengths, bool keep_type)
    : cell(cell_info), type(x.scalar_type()), D(bidirectional ? 2 : 1) {
  packed = sizes.has_value();
  compute_type = type == at::kDouble ? at::kDouble : at::kFloat;
  const at::ScalarType operand_type = keep_type ? type : compute_type;
  TORCH_CHECK(
      type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf,
      "fusedrnn::", cell.name, ": input must be float32, float64, bfloat16 or float16, got ", type);
  TORCH_CHECK(x.dim() == (packed ? 2 : 3), "fusedrnn::", cell.name, ": Expected input to be ",
              packed ? "2D" : "3D", packed ? " with batch_sizes" : "", ", got ", x.dim(), "D");
  I = x.size(-1);
  check_allocated(cell, "input", x);

  if (packed) {
    const Tensor& s = *sizes;
    TORCH_CHECK(!row_lengths, "fusedrnn::", cell.name,
                ": batch_sizes and lengths exclude each other");
    TORCH_CHECK(s.device().is_cpu() && s.scalar_type() == at::kLong && s.dim() == 1,
                "fusedrnn::", cell.name, ": batch_sizes must be a 1-D int64 tensor on the CPU");
    const Tensor flat = s.contiguous();
    batch_sizes.assign(flat.const_data_ptr<int64_t>(),
                       flat.const_data_ptr<int64_t>() + flat.numel());
    for (size_t t = 0; t < batch_sizes.size(); ++t) {
      TORCH_CHECK(batch_sizes[t] > 0 && (t == 0 || batch_sizes[t] <= batch_sizes[t - 1]),
                  "fusedrnn::", cell.name,
                  ": batch_sizes must be positive and never increase, got ",
                  c10::IntArrayRef(batch_sizes));
      // One by one, so that no sum can overflow.
      TORCH_CHECK(batch_sizes[t] <= x.size(0), "fusedrnn::", cell.name,
                  ": batch_sizes don't add up to the ", x.size(0), " rows of input");
    }
    T = int64_t(batch_sizes.size());
    B = T ? batch_sizes[0] : 0;
    N = std::accumulate(batch_sizes.begin(), batch_sizes.end(), int64_t(0));
    TORCH_CHECK(N == x.size(0), "fusedrnn::", cell.name, ": batch_sizes add up to ", N,
                " but input has ", x.size(0), " rows");
  } else {
    T = x.size(0);
    B = x.size(1);
    N = T * B;
  }
  TORCH_CHECK(T > 0, "Expected sequence length to be larger than 0 in RNN");
  if (row_lengths) {
    const Tensor& l = *row_lengths;
    TORCH_CHECK(
        l.device() == x.device() && l.scalar_type() == at::kLong && l.dim() == 1 && l.size(0) == B,
        "fusedrnn::", cell.name, ": lengths must be an int64 tensor of size [", B,
        "] on the device of input");
    lengths = l.contiguous();
  }

  const int64_t per = int64_t(list.size()) / D;
  TORCH_CHECK(int64_t(list.size()) == per * D && per >= 2 && per <= (cell.has_c ? 5 : 4) &&
                  (cell.has_c || per != 3),
              "fusedrnn::", cell.name, ": got ", list.size(), " weights for ", D, " direction",
              D == 2 ? "s" : "");
  has_bias = per >= 4;
  has_projection = per % 2 == 1;
  for (const Tensor& w : list) {
    TORCH_CHECK(w.defined(), "fusedrnn::", cell.name, ": a weight is undefined");
  }
  const Tensor& first_hh = list[1];
  TORCH_CHECK(first_hh.dim() == 2 && first_hh.size(0) % cell.gates == 0, "fusedrnn::", cell.name,
              ": Expected weight_hh size [", cell.gates, " * hidden_size, output size], got ",
              first_hh.sizes());
  H = first_hh.size(0) / cell.gates;
  P = first_hh.size(1);
  TORCH_CHECK(H > 0 && P > 0 && (has_projection || P == H), "fusedrnn::", cell.name,
              ": Expected weight_hh size [", first_hh.size(0), ", ", H, "], got ",
              first_hh.sizes());
  for (int64_t d = 0; d < D; ++d) {
    const Tensor* w = &list[d * per];
    check_like(cell, "weight_ih", w[0], x, {cell.gates * H, I});
    check_like(cell, "weight_hh", w[1], x, {cell.gates * H, P});
    if (has_bias) {
      check_like(cell, "bias_ih", w[2], x, {cell.gates * H});
      check_like(cell, "bias_hh", w[3], x, {cell.gates * H});
    }
    if (has_projection) check_like(cell, "weight_hr", w[per - 1], x, {P, H});
    const auto ready = [&](const Tensor& t) { return in_type(t, operand_type).contiguous(); };
    weights.push_back({ready(w[0]), ready(w[1]), has_bias ? ready(w[2]) : Tensor(),
                       has_bias ? ready(w[3]) : Tensor(),
                       has_projection ? ready(w[per - 1]) : Tensor()});
  }
  if (h) check_like(cell, "h0", *h, x, {D, B, P});
  if (c) check_like(cell, "c0", *c, x, {D, B, H});
  input = with_contiguous_features(x, operand_type);
  if (h) h0 = with_contiguous_features(*h, compute_type);
  if (c) c0 = with_contiguous_features(*c, compute_type);
}

Tensor Layer::flat_input() const { return input.reshape({N, input.size(-1)}).contiguous(); }

std::vector<int64_t> Layer::shape(int64_t features) const {
  return packed ? std::vector<int64_t>{N, features} : std::vector<int64_t>{T, B, features};
}

std::vector<Tensor> weight_gradients(const Layer& layer,
                                     const std::vector<DirectionGradients>& directions,
                                     const std::vector<bool>& output_mask, bool want_input,
                                     Tensor& grad_input, const Products& products,
                                     const Tensor& positions) {
  const CellInfo& cell = layer.cell;
  const int64_t H = layer.H, inputs = cell.gates * H, per = layer.weights_per_direction();
  Tensor x = layer.flat_input();
  if (positions.defined()) {
    x = x.index_select(0, positions);
  } else if (layer.lengths.defined()) {  // zero gradients don't undo NaN or infinity in the padding
    const Tensor steps = at::arange(layer.T, layer.lengths.options()).unsqueeze(1);
    x = x.masked_fill(steps.ge(layer.lengths).view({layer.N, 1}), 0);
  }
  std::vector<Tensor> gradients(output_mask.size());
  if (want_input) grad_input = at::empty(x.sizes(), layer.options());

  for (int64_t d = 0; d < layer.D; ++d) {
    const DirectionGradients& g = directions[d];
    const DirectionWeights& w = layer.weights[d];
    const auto wanted = [&](int64_t i) { return output_mask[d * per + i]; };
    Tensor* out = &gradients[d * per];
    const auto product = [&](const Tensor& a, const Tensor& b) {
      Tensor result = at::empty({a.size(1), b.size(1)}, layer.options());
      products.multiply_transposed(a, b, result);
      return result;
    };
    const Tensor dinput = g.dsums.narrow(1, 0, inputs);
    if (want_input) products.multiply(dinput, w.ih, grad_input, d > 0);
    if (wanted(0)) out[0] = product(dinput, x);
    if (wanted(1)) {
      out[1] = at::empty_like(w.hh);
      // Row blocks of weight_hh whose sums lie next to each other go in one product.
      for (int64_t gate = 0, end; gate < cell.gates; gate = end) {
        for (end = gate + 1;
             end < cell.gates && cell.hidden_sum[end] == cell.hidden_sum[end - 1] + 1;) {
          ++end;
        }
        const int64_t rows = (end - gate) * H;
        products.multiply_transposed(g.dsums.narrow(1, cell.hidden_sum[gate] * H, rows),
                                     g.h_previous, out[1].narrow(0, gate * H, rows));
      }
    }
    if (layer.has_bias && (wanted(2) || wanted(3))) {
      const Tensor sums = g.dsums.sum(0);
      out[2] = sums.narrow(0, 0, inputs);
      out[3] = at::empty_like(w.bias_hh);
      for (int64_t gate = 0; gate < cell.gates; ++gate) {
        out[3].narrow(0, gate * H, H).copy_(sums.narrow(0, cell.hidden_sum[gate] * H, H));
      }
      if (cell.sums > cell.gates) out[2] = out[2].clone();  // not a view of more than it shows
    }
    if (layer.has_projection && wanted(per - 1)) out[per - 1] = product(g.dr, g.h_raw);
  }
  if (want_input && positions.defined()) {
    grad_input =
        at::zeros({layer.N, layer.I}, layer.options()).index_copy_(0, positions, grad_input);
  }
  if (want_input) grad_input = grad_input.view(layer.shape(layer.I));
  for (size_t i = 0; i < gradients.size(); ++i) {
    gradients[i] = output_mask[i] ? in_type(gradients[i], layer.type)
                                  : at::empty({0}, layer.options().dtype(layer.type));
  }
  return gradients;
}

OutputGradients::OutputGradients(const Layer& layer, const OptionalTensor& grad_output,
                                 const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
                                 const OptionalTensor& layer_output, const Tensor& layer_saved,
                                 const std::vector<bool>& output_mask) {
  const CellInfo& cell = layer.cell;
  const auto ready = [&](const char* name, const Tensor& t, c10::IntArrayRef shape) {
    TORCH_CHECK(t.scalar_type() == layer.type, "fusedrnn::", cell.name,
                "_backward: input has type ", layer.type, " but ", name, " has type ",
                t.scalar_type());
    TORCH_CHECK(t.device() == layer.input.device(), "fusedrnn::", cell.name,
                "_backward: input is on ", layer.input.device(), " but ", name, " is on ",
                t.device());
    TORCH_CHECK(t.sizes() == shape, "fusedrnn::", cell.name, "_backward: Expected ", name, " size ",
                shape, ", got ", t.sizes());
    return in_type(t, layer.compute_type).contiguous();
  };
  const std::vector<int64_t> output_shape = layer.shape(layer.D * layer.P);
  TORCH_CHECK(layer_output || !layer.has_projection, "fusedrnn::", cell.name,
              "_backward: output is needed with a projection");
  if (layer.has_projection) output = ready("output", *layer_output, output_shape);
  if (grad_output) dy = ready("grad_output", *grad_output, output_shape);
  if (grad_h_n) dh_n = ready("grad_h_n", *grad_h_n, {layer.D, layer.B, layer.P});
  if (grad_c_n) dc_n = ready("grad_c_n", *grad_c_n, {layer.D, layer.B, layer.H});
  TORCH_CHECK(layer_saved.scalar_type() == layer.compute_type &&
                  layer_saved.device() == layer.input.device() &&
                  layer_saved.sizes() == c10::IntArrayRef({layer.D, layer.N, cell.saved, layer.H}),
              "fusedrnn::", cell.name,
              "_backward: saved must be what the forward op returned with save=True");
  saved = layer_saved.contiguous();
  const size_t wanted = (cell.has_c ? 3 : 2) + layer.D * layer.weights_per_direction();
  TORCH_CHECK(output_mask.size() == wanted, "fusedrnn::", cell.name, "_backward: Expected ", wanted,
              " entries in output_mask, got ", output_mask.size());
}

}  // namespace fusedrnn
