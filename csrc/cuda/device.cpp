#include "device.h"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/ops/_assert_async.h>
#include <ATen/ops/logical_not.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <mutex>
#include <optional>
#include <vector>

#include "gemm.h"

namespace fusedrnn::cuda {

struct LaunchContext::Guard {
  c10::cuda::CUDAGuard guard;
};

namespace {

/// Device attributes are queried once: a runtime call costs as much as a launch.
int attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

struct Attributes {
  int multiprocessors, major, minor, shared;
};
/// By value: another thread's first call on another device may reallocate `known`.
Attributes attributes_of(int device) {
  static std::mutex mutex;
  static std::vector<std::optional<Attributes>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (size_t(device) >= known.size()) known.resize(device + 1);
  if (!known[device]) {
    known[device] = {attribute(cudaDevAttrMultiProcessorCount, device),
                     attribute(cudaDevAttrComputeCapabilityMajor, device),
                     attribute(cudaDevAttrComputeCapabilityMinor, device),
                     attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
  }
  return *known[device];
}

Precision rnn_precision() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::RNN) ==
                 at::Float32Precision::TF32
             ? Precision::tf32
             : Precision::ieee;
}

}  // namespace

LaunchContext::LaunchContext(const Tensor& input)
    : precision(rnn_precision()), guard_(new Guard{c10::cuda::CUDAGuard(input.device())}) {
  const int device = input.get_device();
  stream = c10::cuda::getCurrentCUDAStream(device).stream();
  const Attributes attributes = attributes_of(device);
  multiprocessors = attributes.multiprocessors;
  capability = 10 * attributes.major + attributes.minor;
  shared_limit = attributes.shared;
  TORCH_CHECK(attributes.major >= 8, "fusedrnn: the CUDA kernels need a GPU of compute capability ",
              "8.0 or later, and ", input.device(), " has ", attributes.major, ".",
              attributes.minor, ": use torch.nn's layers there");
}
LaunchContext::~LaunchContext() = default;

void check(int status) { C10_CUDA_CHECK(static_cast<cudaError_t>(status)); }
bool launched(int status) {
  if (status == cudaErrorCooperativeLaunchTooLarge || status == cudaErrorInvalidClusterSize) {
    C10_CUDA_CLEAR_ERROR();
    return false;
  }
  check(status);
  return true;
}

namespace {

void check_blas(cublasStatus_t status) {
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS,
              "fusedrnn: a product by cuBLAS failed: ", cublasGetStatusString(status));
}

struct GemmTypes {
  cudaDataType_t operands, result;
  cublasComputeType_t compute;
};
cudaDataType_t cuda_type(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return CUDA_R_64F;
    case at::kHalf:
      return CUDA_R_16F;
    case at::kBFloat16:
      return CUDA_R_16BF;
    default:
      return CUDA_R_32F;
  }
}
GemmTypes gemm_types(at::ScalarType operands, at::ScalarType result, Precision precision) {
  return {cuda_type(operands), cuda_type(result),
          operands == at::kDouble                                  ? CUBLAS_COMPUTE_64F
          : operands == at::kFloat && precision == Precision::tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32
                                                                   : CUBLAS_COMPUTE_32F};
}

/// torch's handle for this thread and stream. torch sets its math mode each time it hands it out.
/// While this lives, only GEMMs that ask for TF32 use it, and none accumulates in a half type.
class GemmHandle {
 public:
  GemmHandle() : handle_(at::cuda::getCurrentCUDABlasHandle()) {
    check_blas(cublasSetMathMode(
        handle_,
        cublasMath_t(CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)));
  }
  ~GemmHandle() { cublasSetMathMode(handle_, CUBLAS_DEFAULT_MATH); }
  GemmHandle(const GemmHandle&) = delete;
  operator cublasHandle_t() const { return handle_; }

 private:
  cublasHandle_t handle_;
};

}  // namespace

// Not torch's matmul, whose precision follows process-wide settings. It may refuse half types with
// a float32 result, accumulate in float16, or take TF32 for float32.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool add, Precision precision) {
  if (is_empty_gemm(out, a, add)) return;
  const Gemm gemm(out, a, b);
  const GemmTypes types = gemm_types(a.scalar_type(), out.scalar_type(), precision);
  // cuBLAS reads alpha and beta in the compute type.
  const float numbers[2] = {0, 1};
  const double double_numbers[2] = {0, 1};
  const auto number = [&](bool one) -> const void* {
    return types.compute == CUBLAS_COMPUTE_64F ? static_cast<const void*>(&double_numbers[one])
                                               : &numbers[one];
  };
  const auto operation = [](const GemmMatrix& m) {
    return m.transpose ? CUBLAS_OP_T : CUBLAS_OP_N;
  };
  const GemmHandle handle;
  check_blas(cublasGemmEx_64(handle, operation(gemm.b), operation(gemm.a), gemm.m, gemm.n, gemm.k,
                             number(true), gemm.b.tensor.const_data_ptr(), types.operands,
                             gemm.b.stride, gemm.a.tensor.const_data_ptr(), types.operands,
                             gemm.a.stride, number(add), out.mutable_data_ptr(), types.result,
                             gemm.out.stride, types.compute, CUBLAS_GEMM_DEFAULT));
}

void check_later(const Tensor& wrong, const char* message) {
  at::_assert_async(at::logical_not(wrong.any()), message);
}

}  // namespace fusedrnn::cuda
