// The backend's interface to torch and CUDA. device.cpp implements it for a GPU, the tests'
// emulator for CPU tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "plan.h"

namespace fusedrnn::cuda {

using at::Tensor;

/// Makes the input's device the current one while it lives.
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

 private:
  struct Guard;
  std::unique_ptr<Guard> guard_;
};

/// Throws if a function of kernel_table.h returned an error.
void check(int status);
/// The same, but false if CTAs that must be resident, or a cluster's, found no room. A device may
/// have less room than it reports, for example beside other processes.
bool launched(int status);

/// out = a b, or += with add, on the device's current stream. `precision` applies to float32; the
/// half types accumulate in float32. `out` has the operands' type or, for the half types, float32.
/// Its rows are contiguous.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool add, Precision precision);

/// Makes the device's work fail with this message if any element in `wrong` is true. Does not wait.
void check_later(const Tensor& wrong, const char* message);

}  // namespace fusedrnn::cuda
