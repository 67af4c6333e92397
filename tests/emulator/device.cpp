// The emulated device, for CPU tensors.
#include "../../csrc/cuda/device.h"

#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/record_function.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "../../csrc/cuda/gemm.h"
#include "../../csrc/cuda/ptx.cuh"

namespace fusedrnn::cuda {

namespace {
Precision asked_precision() {
  const char* asked = std::getenv("FUSEDRNN_EMULATOR_PRECISION");
  return asked && std::string_view(asked) == "tf32" ? Precision::tf32 : Precision::ieee;
}
}  // namespace

struct LaunchContext::State {};
LaunchContext::LaunchContext(const Tensor&)
    : multiprocessors(emulator::settings().multiprocessors),
      capability(90),
      shared_limit(227 * 1024),
      precision(asked_precision()) {}
LaunchContext::~LaunchContext() = default;

void check(int status) { TORCH_CHECK(status == 0, emulator::last_error()); }
bool launched(int status) {
  if (status == emulator::kNoRoom) return false;
  check(status);
  return true;
}

namespace {

/// Columns of `length` elements, `stride` apart, as cuBLAS reads memory.
Tensor columns_of(const GemmMatrix& m, int64_t rows, int64_t columns) {
  TORCH_CHECK(m.stride >= std::max<int64_t>(rows, 1), "cuBLAS wants a stride of ", rows,
              " or more, got ", m.stride);
  return m.tensor.as_strided({rows, columns}, {1, m.stride});
}
Tensor operand_of(const GemmMatrix& m, int64_t rows, int64_t columns) {
  return m.transpose ? columns_of(m, columns, rows).t() : columns_of(m, rows, columns);
}

}  // namespace

void fill(void* data, int value, int64_t bytes, const LaunchContext&) {
  RECORD_FUNCTION("emulated::memset", std::vector<c10::IValue>());
  std::memset(data, value, size_t(bytes));
}

void multiply(const LaunchContext&, const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  if (is_empty_gemm(out, a, add)) return;
  const Gemm gemm(out, a, b);
  RECORD_FUNCTION("emulated::gemm", std::vector<c10::IValue>());
  // As on a GPU: half types accumulate in float32.
  const at::ScalarType type = a.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor result = columns_of(gemm.out, gemm.m, gemm.n);
  Tensor product = at::mm(operand_of(gemm.b, gemm.m, gemm.k).to(type),
                          operand_of(gemm.a, gemm.k, gemm.n).to(type));
  if (add) product.add_(result.to(type));
  result.copy_(product);
}

void PreparedGemm::run(void* out, const void* a, int64_t a_stride, int64_t rows) const {
  const at::ScalarType type = b_.tensor.scalar_type();
  const auto rows_at = [&](const void* data, int64_t columns, int64_t stride, at::ScalarType of) {
    return at::from_blob(const_cast<void*>(data), {rows, columns}, {stride, 1}, of);
  };
  const Tensor b = operand_of(b_, n_, k_).t();
  multiply(context_, rows_at(out, n_, n_, out_type_), rows_at(a, k_, a_stride, type), b, false);
}

}  // namespace fusedrnn::cuda
