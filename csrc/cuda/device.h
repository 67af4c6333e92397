// The backend's interface to torch and CUDA. device.cpp implements it for a GPU, the tests'
// emulator for CPU tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "gemm.h"
#include "plan.h"

namespace fusedrnn::cuda {

using at::Tensor;

/// Makes the input's device the current one while it lives. Holds cuBLAS's handle: torch takes
/// longer to hand it out than a GEMM to start.
class LaunchContext {
 public:
  explicit LaunchContext(const Tensor& input);
  ~LaunchContext();
  LaunchContext(const LaunchContext&) = delete;
  LaunchContext& operator=(const LaunchContext&) = delete;

  void* stream = nullptr;  ///< the device's current stream
  int64_t multiprocessors = 0;
  int64_t capability = 0;    ///< compute capability, 10 * major + minor
  int64_t shared_limit = 0;  ///< bytes of shared memory that a CTA can have
  /// As torch.backends.cudnn.rnn.fp32_precision asks for.
  Precision precision = Precision::ieee;

  struct State;
  State& state() const { return *state_; }

 private:
  std::unique_ptr<State> state_;
};

/// Throws if a function of kernel_table.h returned an error.
void check(int status);
/// The same, but false if CTAs that must be resident, or a cluster's, found no room. A device may
/// have less room than it reports, for example beside other processes.
bool launched(int status);

/// Sets all bytes to `value`, on the context's stream.
void fill(void* data, int value, int64_t bytes, const LaunchContext& context);

/// out = a b, or += with add. The context's precision applies to float32; the half types accumulate
/// in float32. `out` has the operands' type or, for the half types, float32. Its rows are
/// contiguous.
void multiply(const LaunchContext& context, const Tensor& out, const Tensor& a, const Tensor& b,
              bool add);

/// The same for a time loop, out [rows, n] = a [rows, k] b with pointers in place of tensors.
class PreparedGemm {
 public:
  /// b [k, n] has any strides, and k and n are not 0. out_type: b's type or float32.
  PreparedGemm(const LaunchContext& context, const Tensor& b, at::ScalarType out_type)
      : context_(context), b_(b), out_type_(out_type), k_(b.size(0)), n_(b.size(1)) {}

  /// `a` has rows a_stride elements apart, at least k; `out` has contiguous rows.
  void run(void* out, const void* a, int64_t a_stride, int64_t rows) const;

 private:
  const LaunchContext& context_;
  const GemmMatrix b_;
  const at::ScalarType out_type_;
  const int64_t k_, n_;
};

}  // namespace fusedrnn::cuda
