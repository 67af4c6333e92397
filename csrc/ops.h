// The ops of ops.cpp as typed functions, for the C++ that calls them through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fusedrnn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

using LstmOp = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
    bool bidirectional, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
    bool save);
using GruOp = std::tuple<Tensor, Tensor, Tensor>(const Tensor& input, const OptionalTensor& h0,
                                                 at::TensorList weights, bool bidirectional,
                                                 const OptionalTensor& batch_sizes,
                                                 const OptionalTensor& lengths, bool save);
using LstmBackwardOp = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
    const OptionalTensor& grad_c_n, const Tensor& input, const OptionalTensor& h0,
    const OptionalTensor& c0, at::TensorList weights, bool bidirectional,
    const OptionalTensor& batch_sizes, const OptionalTensor& lengths, const OptionalTensor& output,
    const Tensor& saved, const c10::List<bool>& output_mask);
using GruBackwardOp = std::tuple<Tensor, Tensor, std::vector<Tensor>>(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const Tensor& input,
    const OptionalTensor& h0, at::TensorList weights, bool bidirectional,
    const OptionalTensor& batch_sizes, const OptionalTensor& lengths, const OptionalTensor& output,
    const Tensor& saved, const c10::List<bool>& output_mask);

template <class Op>
c10::TypedOperatorHandle<Op> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Op>();
}

inline const auto& lstm_op() {
  static const auto op = find_op<LstmOp>("fusedrnn::lstm");
  return op;
}
inline const auto& gru_op() {
  static const auto op = find_op<GruOp>("fusedrnn::gru");
  return op;
}
inline const auto& lstm_backward_op() {
  static const auto op = find_op<LstmBackwardOp>("fusedrnn::lstm_backward");
  return op;
}
inline const auto& gru_backward_op() {
  static const auto op = find_op<GruBackwardOp>("fusedrnn::gru_backward");
  return op;
}

inline bool needs_gradient(const Tensor& t) { return t.defined() && t.requires_grad(); }
inline bool needs_gradient(const OptionalTensor& t) { return t && needs_gradient(*t); }
inline bool needs_gradient(at::TensorList list) {
  for (const Tensor& t : list) {
    if (needs_gradient(t)) return true;
  }
  return false;
}

/// Whether a call with these arguments, tensors or lists of them, is to be differentiated.
template <class... Tensors>
bool any_needs_gradient(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (needs_gradient(tensors) || ...);
}

}  // namespace fusedrnn
