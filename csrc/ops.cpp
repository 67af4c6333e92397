// Every op of the library: its schema and its contract. Backends register the kernels.
//
// Shapes: T steps, B batch rows, I input_size, H hidden_size, P = proj_size or H, D directions,
// G gates (LSTM 4: i f g o, GRU 3: r z n). N = T * B when padded, sum(batch_sizes) when packed.
//
//   input        [T, B, I]; with batch_sizes [N, I], steps one after the other as in PackedSequence
//   h0, c0       [D, B, P], [D, B, H]; None: zeros
//   weights      per direction weight_ih [G*H, I], weight_hh [G*H, P], then, both or neither,
//                bias_ih and bias_hh [G*H], then weight_hr [P, H] if projected (LSTM only)
//   batch_sizes  [T] int64 on the CPU, positive, never increasing
//   lengths      [B] int64 on the input's device, from 0 to T; padded layout only. Positions past
//                a row's length are not read, and zero in the output
//   save         whether the backward pass will follow; without it `saved` is empty
//
//   output       [T, B, D*P] or [N, D*P]
//   h_n, c_n     [D, B, P], [D, B, H]: after each row's own last step
//   saved        what the backward op of the same backend wants back, unchanged
//
// float32, float64, bfloat16 and float16; one type and device for all, but batch_sizes. Any
// strides. No op writes to its inputs. Gradients are those of the whole call: None for a gradient
// of an output that was not used. The backward ops need `output` only with a projection.
// output_mask has an entry for input, h0, c0 (LSTM only) and each weight; where it is false an
// empty tensor is returned, and the products that only it needs are left out. autograd.cpp has the
// derivatives; *_backward_differentiable are the backward ops made of torch's own, in _ops.py.
#include <torch/library.h>

#include <string>

TORCH_LIBRARY(fusedrnn, m) {
  m.def(
      "lstm(Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, bool bidirectional, "
      "Tensor? batch_sizes, Tensor? lengths, bool save) "
      "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor saved)");
  m.def(
      "gru(Tensor input, Tensor? h0, Tensor[] weights, bool bidirectional, Tensor? batch_sizes, "
      "Tensor? lengths, bool save) -> (Tensor output, Tensor h_n, Tensor saved)");
  const std::string lstm_backward =
      "(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor? h0, "
      "Tensor? c0, Tensor[] weights, bool bidirectional, Tensor? batch_sizes, Tensor? lengths, "
      "Tensor? output, Tensor saved, bool[] output_mask) "
      "-> (Tensor grad_input, Tensor grad_h0, Tensor grad_c0, Tensor[] grad_weights)";
  const std::string gru_backward =
      "(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor? h0, Tensor[] weights, "
      "bool bidirectional, Tensor? batch_sizes, Tensor? lengths, Tensor? output, Tensor saved, "
      "bool[] output_mask) -> (Tensor grad_input, Tensor grad_h0, Tensor[] grad_weights)";
  m.def(("lstm_backward" + lstm_backward).c_str());
  m.def(("gru_backward" + gru_backward).c_str());
  m.def(("_lstm_backward_differentiable" + lstm_backward).c_str());
  m.def(("_gru_backward_differentiable" + gru_backward).c_str());
  // The CPU instruction set that the kernels of this process use.
  m.def("_cpu_isa() -> str");
}
