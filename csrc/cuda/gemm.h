// A GEMM of row-major matrices in cuBLAS's terms: its matrices are column-major. device.cpp hands
// it to cuBLAS; the tests' emulator multiplies by the same description.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>

namespace fusedrnn::cuda {

/// A matrix in memory as cuBLAS sees it: column-major, columns `stride` elements apart.
struct GemmMatrix {
  at::Tensor tensor;  ///< holds the memory: the given tensor, or a copy with usable strides
  bool transpose;     ///< whether the GEMM transposes this column-major matrix
  int64_t stride;     ///< the leading dimension, at least a column's length

  /// A row-major matrix is its own transpose in column-major order, so it needs none.
  explicit GemmMatrix(const at::Tensor& t) {
    const auto by_rows = [&](int64_t row, int64_t column) {
      // A single row or column has an arbitrary stride.
      return (t.size(column) <= 1 || t.stride(column) == 1) &&
             (t.size(row) <= 1 || t.stride(row) >= t.size(column));
    };
    transpose = !by_rows(0, 1) && by_rows(1, 0);
    tensor = transpose || by_rows(0, 1) ? t : t.contiguous();
    const int64_t outer = transpose ? 1 : 0;
    stride = tensor.size(outer) > 1 ? tensor.stride(outer)
                                    : std::max<int64_t>(tensor.size(1 - outer), 1);
  }
};

/// out = a b, or += : cuBLAS computes the transposed result [n, m] from b and a.
struct Gemm {
  Gemm(const at::Tensor& out_, const at::Tensor& a_, const at::Tensor& b_)
      : a(a_), b(b_), out(out_), m(b_.size(1)), n(a_.size(0)), k(a_.size(1)) {
    TORCH_INTERNAL_ASSERT(b_.size(0) == k && out_.size(0) == n && out_.size(1) == m);
    TORCH_INTERNAL_ASSERT(!out.transpose && out.tensor.is_same(out_));
  }
  GemmMatrix a, b, out;
  int64_t m, n, k;
};

/// Whether a GEMM has nothing to multiply. If so, `out` already has the result.
inline bool is_empty_gemm(const at::Tensor& out, const at::Tensor& a, bool add) {
  if (out.numel() > 0 && a.size(1) > 0) return false;
  if (!add) out.zero_();
  return true;
}

}  // namespace fusedrnn::cuda
