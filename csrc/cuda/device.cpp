#include "device.h"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <vector>

#include "gemm.h"

namespace fusedrnn::cuda {

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

void check_blas(cublasStatus_t status) {
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS,
              "fusedrnn: a product by cuBLAS failed: ", cublasGetStatusString(status));
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

struct LaunchContext::State {
  explicit State(c10::Device device) : guard(device) {}
  /// For the stream that was the current one at the first call.
  cublasHandle_t gemm_handle() {
    if (!handle) handle.emplace();
    return *handle;
  }
  c10::cuda::CUDAGuard guard;
  std::optional<GemmHandle> handle;
};

LaunchContext::LaunchContext(const Tensor& input)
    : precision(rnn_precision()), state_(new State(input.device())) {
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

/// A matrix in device memory, in cuBLAS's terms.
template <class Data>
struct GemmOperand {
  Data* data;
  cublasOperation_t operation;
  int64_t stride;
};
template <class Data>
GemmOperand<Data> gemm_operand(Data* data, const GemmMatrix& m) {
  return {data, m.transpose ? CUBLAS_OP_T : CUBLAS_OP_N, m.stride};
}

/// out = a b, or += with add, column-major: out [m, n], a [m, k], b [k, n].
void run_gemm(const LaunchContext& context, const GemmTypes& types, int64_t m, int64_t n, int64_t k,
              const GemmOperand<const void>& a, const GemmOperand<const void>& b,
              const GemmOperand<void>& out, bool add) {
  // cuBLAS reads alpha and beta in the compute type.
  const float numbers[2] = {0, 1};
  const double double_numbers[2] = {0, 1};
  const auto number = [&](bool one) -> const void* {
    return types.compute == CUBLAS_COMPUTE_64F ? static_cast<const void*>(&double_numbers[one])
                                               : &numbers[one];
  };
  check_blas(cublasGemmEx_64(context.state().gemm_handle(), a.operation, b.operation, m, n, k,
                             number(true), a.data, types.operands, a.stride, b.data, types.operands,
                             b.stride, number(add), out.data, types.result, out.stride,
                             types.compute, CUBLAS_GEMM_DEFAULT));
}

}  // namespace

void fill(void* data, int value, int64_t bytes, const LaunchContext& context) {
  C10_CUDA_CHECK(
      cudaMemsetAsync(data, value, size_t(bytes), static_cast<cudaStream_t>(context.stream)));
}

// Not torch's matmul, whose precision follows process-wide settings. It may refuse half types with
// a float32 result, accumulate in float16, or take TF32 for float32.
void multiply(const LaunchContext& context, const Tensor& out, const Tensor& a, const Tensor& b,
              bool add) {
  if (is_empty_gemm(out, a, add)) return;
  const Gemm gemm(out, a, b);
  run_gemm(context, gemm_types(a.scalar_type(), out.scalar_type(), context.precision), gemm.m,
           gemm.n, gemm.k, gemm_operand(gemm.b.tensor.const_data_ptr(), gemm.b),
           gemm_operand(gemm.a.tensor.const_data_ptr(), gemm.a),
           gemm_operand(out.mutable_data_ptr(), gemm.out), add);
}

void PreparedGemm::run(void* out, const void* a, int64_t a_stride, int64_t rows) const {
  const at::ScalarType type = b_.tensor.scalar_type();
  run_gemm(context_, gemm_types(type, out_type_, context_.precision), n_, rows, k_,
           gemm_operand(b_.tensor.const_data_ptr(), b_), {a, CUBLAS_OP_N, std::max(a_stride, k_)},
           {out, CUBLAS_OP_N, n_}, false);
}

}  // namespace fusedrnn::cuda
