// CPU memory: new tensors, and scratch memory for one call.
#pragma once

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include "../layer.h"

namespace fusedrnn::cpu {

/// A new CPU tensor, without a dispatcher call.
template <class Element>
Tensor new_tensor(c10::IntArrayRef shape) {
  using Scalar = std::conditional_t<std::is_same_v<Element, BFloat16>, at::BFloat16, Element>;
  return Tensor(at::detail::empty_cpu(shape, c10::CppTypeToScalarType<Scalar>::value));
}

/// Null for an undefined tensor.
template <class Element>
const Element* const_data(const Tensor& t) {
  return t.defined() ? static_cast<const Element*>(t.const_data_ptr()) : nullptr;
}
/// The data of direction d of [D, ...].
template <class Accum>
Accum* direction_data(const Tensor& t, int64_t d) {
  return t.defined() ? t.data_ptr<Accum>() + d * t.stride(0) : nullptr;
}

/// Aligned memory pieces: within the object up to 4 KiB in all, else from torch's allocator.
template <class Item>
class Scratch {
 public:
  Scratch() {}  // not defaulted: Scratch() would clear 4 KiB
  Scratch(int64_t pieces, int64_t size) : stride_(scalar::round_up(size, 64)), is_set_(true) {
    const size_t bytes = size_t(pieces * stride_) * sizeof(Item);
    if (bytes > sizeof(small_)) memory_ = c10::GetCPUAllocator()->allocate(bytes);
  }
  explicit Scratch(int64_t size) : Scratch(1, size) {}
  Item* operator[](int64_t i) const {
    void* const begin = memory_ ? memory_.get() : const_cast<unsigned char*>(small_);
    return static_cast<Item*>(begin) + i * stride_;
  }
  /// Null where there are no pieces.
  Item* get(int64_t i) const { return is_set_ ? (*this)[i] : nullptr; }

 private:
  int64_t stride_ = 0;
  bool is_set_ = false;
  c10::DataPtr memory_;
  alignas(64) unsigned char small_[4096];
};

}  // namespace fusedrnn::cpu
