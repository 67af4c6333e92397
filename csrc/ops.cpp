// Every op's schema and contract. Backends register the kernels.
//
// Each cell in cells.h has the ops <cell>, <cell>_backward, _<cell>_backward_differentiable, and
// <cell>_frozen for inference with frozen weights.
// Shapes: T steps, B batch rows, I input_size, H hidden_size, P = proj_size or H, D directions,
// G gates of the cell. N = T * B when padded, sum(batch_sizes) when packed.
//
//   input        [T, B, I]; with batch_sizes [N, I], step after step as in PackedSequence
//   h0, c0       [D, B, P], [D, B, H]; None: zeros. c0: cells with a cell state only
//   weights      per direction weight_ih [G*H, I], weight_hh [G*H, P], then, both or neither,
//                bias_ih and bias_hh [G*H], then weight_hr [P, H] if projected (LSTM only)
//   batch_sizes  [T] int64 on the CPU, positive, never increasing
//   lengths      [B] int64 on the input's device, from 0 to T; padded layout only. Tokens past a
//                row's length are not read, and zero in the output
//   save         whether a backward pass will follow; without it `saved` is empty
//
//   output       [T, B, D*P] or [N, D*P]
//   h_n, c_n     [D, B, P], [D, B, H]: after each row's own last step
//   saved        for the same backend's backward op, unchanged
//
// <cell>_variant is the layer with more in its steps; <cell>_variant_backward gives its gradients,
// the norms' behind the weights'. "tokens" is [T, B], or [N] when packed.
//   reset_mask         [*tokens] bool: the row's states begin again before this step. In the
//   reverse
//                      direction, too, that is before the step at this time
//   reset_to_initial   from h0 and c0 (they get the gradient), else from zeros
//   hidden_mask        [D, B, P] factors of h as weight_hh's operand, of the input's type
//   candidate_mask     [D, *tokens, H] bool: false zeroes the candidate (an LSTM's g, a GRU's n),
//   true
//                      scales it by candidate_scale. Not for plain RNNs
//   zoneout_h_mask     [D, *tokens, P] bool: true keeps h from before the step; zoneout_c_mask
//                      [D, *tokens, H] for c. Without a mask zoneout_h and zoneout_c are the shares
//                      of h and c from before
//   norms              for each direction the scales of layer norms: norm_ih [G*H] of weight_ih x,
//                      norm_hh [G*H] of weight_hh h, and for a cell state norm_c [H] and its bias
//                      [H]; or empty. Biases are added behind the norms
//   cells              [T, B, D*H] or [N, D*H], c after each step; empty without a cell state
//
// _freeze prepacks a layer's float32 weights, as listed above, into one uint8 tensor. `type`:
// float32, bfloat16 or int8, the type of weight_ih and weight_hh there. weight_hr and the biases
// stay float32. int8 has a scale for each row of weights, and needs a cell with states within
// [-1, 1] and no projection. The tensor is for this machine's vectors; on another machine a
// <cell>_frozen op has the same weights, but packs anew in each call. _unfreeze gives the weights
// back: exactly, or as bfloat16 and int8 have rounded them. <cell>_frozen has no gradient, and
// takes float32, bfloat16 and float16 input. It computes in float32. With int8 weights, states are
// quantised to int16. The input is too, or to int8 where the CPU has VNNI. A row is NaN from a
// token on that is not finite.
//
// float32, float64, bfloat16 and float16; one type and device for all tensors but batch_sizes. Any
// strides. No op writes to its inputs. An unused output has the gradient None. The backward ops
// need `output` only with a projection. output_mask has an entry for input, h0, c0 and each weight.
// A false entry gets an empty tensor, and the GEMMs for it alone are skipped. autograd.cpp has the
// derivatives. *_backward_differentiable are the backward ops in torch's own ops, in _ops.py.
#include "ops.h"

#include <torch/library.h>

namespace fusedrnn {
namespace {

template <class Argument>
const char* schema_type() {
  using Type = std::decay_t<Argument>;
  if constexpr (std::is_same_v<Type, Tensor>) return "Tensor ";
  if constexpr (std::is_same_v<Type, OptionalTensor>) return "Tensor? ";
  if constexpr (std::is_same_v<Type, at::TensorList>) return "Tensor[] ";
  if constexpr (std::is_same_v<Type, bool>) return "bool ";
  if constexpr (std::is_same_v<Type, int64_t>) return "int ";
  if constexpr (std::is_same_v<Type, double>) return "float ";
  if constexpr (std::is_same_v<Type, c10::List<bool>>) return "bool[] ";
}

#define FUSEDRNN_ARG(type, name) std::string(schema_type<type>()) + #name + ", " +
#define FUSEDRNN_CELL_STATE_ARG(type, name) \
  of_cell_state(std::string(schema_type<type>()) + #name + ", ") +
template <class Cell>
void define_ops(torch::Library& m) {
  const auto of_cell_state = [](const std::string& text) {
    return Cell::kHasCellState ? text : std::string();
  };
  const auto define = [&](const std::string& name, std::string arguments,
                          const std::string& results) {
    arguments.resize(arguments.size() - 2);  // the last comma
    m.def((name + "(" + arguments + ") -> (" + results + ")").c_str());
  };
  const std::string name = Cell::kName;
  const std::string layer = FUSEDRNN_LAYER_ARGS(FUSEDRNN_ARG, FUSEDRNN_CELL_STATE_ARG) "";
  define(name, layer + FUSEDRNN_FORWARD_ARGS(FUSEDRNN_ARG) "",
         "Tensor output, Tensor h_n, " + of_cell_state("Tensor c_n, ") + "Tensor saved");
  define(name + "_frozen", FUSEDRNN_FROZEN_ARGS(FUSEDRNN_ARG, FUSEDRNN_CELL_STATE_ARG) "",
         "Tensor output, Tensor h_n" + std::string(Cell::kHasCellState ? ", Tensor c_n" : ""));
  const std::string backward = FUSEDRNN_OUTPUT_GRADIENT_ARGS(FUSEDRNN_ARG, FUSEDRNN_CELL_STATE_ARG)
                                   layer +
                               FUSEDRNN_BACKWARD_ARGS(FUSEDRNN_ARG) "";
  const std::string gradients = "Tensor grad_input, Tensor grad_h0, " +
                                of_cell_state("Tensor grad_c0, ") + "Tensor[] grad_weights";
  define(name + "_backward", backward, gradients);
  define("_" + name + "_backward_differentiable", backward, gradients);
  const std::string variant = layer + FUSEDRNN_VARIANT_ARGS(FUSEDRNN_ARG) "";
  define(
      name + "_variant", variant + FUSEDRNN_FORWARD_ARGS(FUSEDRNN_ARG) "",
      "Tensor output, Tensor h_n, " + of_cell_state("Tensor c_n, ") + "Tensor cells, Tensor saved");
  const std::string variant_backward =
      FUSEDRNN_OUTPUT_GRADIENT_ARGS(FUSEDRNN_ARG, FUSEDRNN_CELL_STATE_ARG) variant +
      FUSEDRNN_VARIANT_BACKWARD_ARGS(FUSEDRNN_ARG) "";
  define(name + "_variant_backward", variant_backward, gradients);
  define("_" + name + "_variant_backward_differentiable", variant_backward, gradients);
}
#undef FUSEDRNN_ARG
#undef FUSEDRNN_CELL_STATE_ARG

}  // namespace

TORCH_LIBRARY(fusedrnn, m) {
  scalar::Cells::for_each([&](auto cell) { define_ops<decltype(cell)>(m); });
  // Booleans that are true with probability p; the same for the same seed, one int64.
  m.def("_random_mask(Tensor seed, SymInt[] size, float p) -> Tensor");
  m.def("_freeze(str cell, Tensor[] weights, bool bidirectional, ScalarType type) -> Tensor");
  m.def("_unfreeze(Tensor weights) -> Tensor[]");
  // The CPU instruction set in use, and the layout of its frozen weights.
  m.def("_cpu_isa() -> str");
  m.def("_cpu_panel_layout() -> str");
  // Threads of a call on the CPU.
  m.def("_cpu_threads() -> int");
  // The algorithm of this thread's last pass on CUDA: stepwise, persistent_cta, persistent_cluster,
  // persistent_grid, or none before the first. Autograd runs a backward pass on another thread.
  m.def("_cuda_algorithm() -> str");
}

}  // namespace fusedrnn
