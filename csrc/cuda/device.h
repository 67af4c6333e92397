// What layer_cuda.cpp needs of the device: device.cpp has it from torch and CUDA, the tests'
// emulator has its own.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "kernels.h"

namespace fusedrnn::cuda {

using at::Tensor;

/// Makes the tensors' device the current one while it lives, and its current stream `stream`.
class Device {
 public:
  explicit Device(const Tensor& input);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  void* stream = nullptr;
  int64_t multiprocessors = 0;

 private:
  struct Guard;
  std::unique_ptr<Guard> guard_;
};

/// Throws if a function of kernels.h returned an error.
void check(int status);
/// The same, but false where CTAs that wait for each other found no room to run together: the
/// device may have less than it tells, say beside other processes.
bool launched(int status);

/// The precision that torch.backends.cudnn.rnn.fp32_precision asks for.
Precision rnn_precision();

/// out = a b, or += with add, on the device's stream; products of float32 in the given precision,
/// those of the half types summed in float32. `out` has the type of the operands or, for the half
/// types, float32; its rows are contiguous.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool add, Precision precision);

/// Makes the device's work fail, with this message, if any of `wrong` is true; without waiting.
void check_later(const Tensor& wrong, const char* message);

}  // namespace fusedrnn::cuda
