#include "device.h"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/ops/_assert_async.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <climits>
#include <mutex>
#include <optional>
#include <vector>

namespace fusedrnn::cuda {

struct Device::Guard {
  c10::cuda::CUDAGuard guard;
};

namespace {

/// Attributes of a device, asked for once: a call of the runtime costs as much as a launch.
int attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

struct Attributes {
  int multiprocessors, major, minor;
};
const Attributes& attributes_of(int device) {
  static std::mutex mutex;
  static std::vector<std::optional<Attributes>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (size_t(device) >= known.size()) known.resize(device + 1);
  if (!known[device]) {
    known[device] = {attribute(cudaDevAttrMultiProcessorCount, device),
                     attribute(cudaDevAttrComputeCapabilityMajor, device),
                     attribute(cudaDevAttrComputeCapabilityMinor, device)};
  }
  return *known[device];
}

}  // namespace

Device::Device(const Tensor& input) : guard_(new Guard{c10::cuda::CUDAGuard(input.device())}) {
  const int device = input.get_device();
  stream = c10::cuda::getCurrentCUDAStream(device).stream();
  const Attributes& attributes = attributes_of(device);
  multiprocessors = attributes.multiprocessors;
  TORCH_CHECK(attributes.major >= 8, "fusedrnn: the CUDA kernels need a GPU of compute capability ",
              "8.0 or later, and ", input.device(), " has ", attributes.major, ".",
              attributes.minor, ": use torch.nn's layers there");
}
Device::~Device() = default;

void check(int status) { C10_CUDA_CHECK(static_cast<cudaError_t>(status)); }
bool launched(int status) {
  if (status == cudaErrorCooperativeLaunchTooLarge) {
    C10_CUDA_CLEAR_ERROR();
    return false;
  }
  check(status);
  return true;
}

Precision rnn_precision() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::RNN) ==
                 at::Float32Precision::TF32
             ? Precision::tf32
             : Precision::ieee;
}

namespace {

/// A matrix as cuBLAS, which counts columns first, sees its transpose.
struct Matrix {
  explicit Matrix(const Tensor& t) {
    const int64_t rows = t.size(0), columns = t.size(1);
    tensor = columns == 1 || t.stride(1) == 1 || rows == 1 || t.stride(0) == 1 ? t : t.contiguous();
    // Strides of one row or column mean nothing.
    const bool by_rows = columns == 1 || tensor.stride(1) == 1;
    operation = by_rows ? CUBLAS_OP_N : CUBLAS_OP_T;
    const int64_t length = by_rows ? columns : rows, count = by_rows ? rows : columns;
    stride = count > 1 ? tensor.stride(by_rows ? 0 : 1) : length;
    fits = std::max({rows, columns, stride}) <= INT_MAX && stride >= length;
  }
  Tensor tensor;
  cublasOperation_t operation;
  int64_t stride;
  bool fits;
};

/// torch has no switch of this for a call or a thread, only for the whole process, where others
/// would see it.
bool multiply_tf32(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  const int64_t rows = a.size(0), depth = a.size(1), columns = b.size(1);
  if (rows == 0 || depth == 0 || columns == 0) return false;
  const Matrix left(a), right(b), result(out);
  if (!left.fits || !right.fits || !result.fits || result.operation != CUBLAS_OP_N ||
      !result.tensor.is_same(out)) {
    return false;
  }
  const float alpha = 1, beta = add ? 1 : 0;
  const cublasStatus_t status = cublasGemmEx(
      at::cuda::getCurrentCUDABlasHandle(), right.operation, left.operation, int(columns),
      int(rows), int(depth), &alpha, right.tensor.const_data_ptr(), CUDA_R_32F, int(right.stride),
      left.tensor.const_data_ptr(), CUDA_R_32F, int(left.stride), &beta, out.mutable_data_ptr(),
      CUDA_R_32F, int(result.stride), CUBLAS_COMPUTE_32F_FAST_TF32, CUBLAS_GEMM_DEFAULT);
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "fusedrnn: cublasGemmEx failed with status ",
              int(status));
  return true;
}

}  // namespace

void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool add, Precision precision) {
  Tensor result = out;
  if (a.scalar_type() == at::kFloat && precision == Precision::tf32 &&
      multiply_tf32(out, a, b, add)) {
    return;
  }
  const at::NoTF32Guard ieee;
  if (out.scalar_type() == a.scalar_type()) {
    add ? at::addmm_out(result, out, a, b) : at::mm_out(result, a, b);
  } else {
    TORCH_INTERNAL_ASSERT(!add);
    at::mm_out(result, a, b, out.scalar_type());
  }
}

void check_later(const Tensor& wrong, const char* message) {
  at::_assert_async(at::logical_not(wrong.any()), message);
}

}  // namespace fusedrnn::cuda
