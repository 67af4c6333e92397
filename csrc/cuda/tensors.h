// A layer's tensors and tokens, for both algorithms' host code.
#pragma once

#include <ATen/ops/empty.h>

#include <type_traits>
#include <vector>

#include "../layer.h"
#include "device.h"
#include "params.h"

namespace fusedrnn::cuda {

// ---- allocation and pointers --------------------------------------------------------------------

/// torch's type for a type of sequence.h.
template <class T>
using TorchType = std::conditional_t<std::is_same_v<T, BFloat16>, at::BFloat16,
                                     std::conditional_t<std::is_same_v<T, Float16>, at::Half, T>>;

template <class T>
at::TensorOptions options_of(const Layer& layer) {
  return layer.options().dtype(c10::CppTypeToScalarType<TorchType<T>>::value);
}
template <class T>
Tensor new_tensor(const Layer& layer, c10::IntArrayRef shape) {
  return at::empty(shape, options_of<T>(layer));
}

/// A tensor's data, `offset` elements on; null if undefined.
template <class T>
T* data_of(const Tensor& t, int64_t offset = 0) {
  return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) + offset : nullptr;
}
template <class T>
const T* const_data_of(const Tensor& t, int64_t offset = 0) {
  return t.defined() ? static_cast<const T*>(t.const_data_ptr()) + offset : nullptr;
}

/// Direction d of an initial state [D, B, features], and its row stride.
template <class Element>
const Element* initial_state(const Tensor& state, int64_t d) {
  return state.defined() ? const_data_of<Element>(state, d * state.stride(0)) : nullptr;
}
inline int64_t row_stride(const Tensor& state) { return state.defined() ? state.stride(1) : 0; }

/// The input as [N, I], features contiguous.
inline Tensor input_tokens(const Layer& layer) { return layer.input.reshape({layer.N, layer.I}); }

/// weight_ih x of direction d, [N, G*H]; x is input_tokens(layer).
template <class Element>
Tensor input_product(const Layer& layer, const Tensor& x, int64_t d, const LaunchContext& context) {
  const Tensor product =
      new_tensor<Accumulator<Element>>(layer, {layer.N, layer.cell.gates * layer.H});
  multiply(context, product, x, layer.weights[size_t(d)].ih.t(), false);
  return product;
}

// ---- tokens -------------------------------------------------------------------------------------

/// Each step's tokens and active rows.
class TokenMap {
 public:
  explicit TokenMap(const Layer& layer) : layer_(layer) {
    if (!layer.packed) return;
    step_offset_.reserve(size_t(layer.T) + 1);
    step_offset_.push_back(0);
    for (const int64_t size : layer.batch_sizes) {
      step_offset_.push_back(step_offset_.back() + size);
    }
  }
  /// The time of a direction's i-th step; -1 before its first.
  int64_t time(int64_t i, bool reverse) const { return i < 0 || !reverse ? i : layer_.T - 1 - i; }
  /// Batch row 0's token at time t; 0 for t = -1.
  int64_t token(int64_t t) const {
    return t < 0 ? 0 : layer_.packed ? step_offset_[size_t(t)] : t * layer_.B;
  }
  int64_t rows(int64_t t) const {
    return t < 0 ? 0 : layer_.packed ? layer_.batch_sizes[size_t(t)] : layer_.B;
  }
  /// [T + 1] host numbers; empty if padded.
  const std::vector<int64_t>& step_offset() const { return step_offset_; }

  StepRows step_rows(int64_t t) const {
    return {rows(t), rows(t), t, layer_.T, const_data_of<int64_t>(layer_.lengths)};
  }

 private:
  const Layer& layer_;
  std::vector<int64_t> step_offset_;
};

// ---- results of the backward steps --------------------------------------------------------------

/// The backward steps fill these for layer_gradients().
struct StepGradients {
  GateGradients gates;
  Tensor dh0, dc0;  ///< [D, B, P], [D, B, H]; dc0 undefined without a cell state
};

}  // namespace fusedrnn::cuda
