// The emulated device, for tensors of the CPU.
#include "../../csrc/cuda/device.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <string_view>

#include "../../csrc/cuda/primitives.cuh"

namespace fusedrnn::cuda {

struct Device::Guard {};
Device::Device(const Tensor&) : multiprocessors(emulator::settings().multiprocessors) {}
Device::~Device() = default;

void check(int status) { TORCH_CHECK(status == 0, emulator::last_error()); }
bool launched(int status) {
  if (status == emulator::kNoRoom) return false;
  check(status);
  return true;
}

Precision rnn_precision() {
  const char* asked = std::getenv("FUSEDRNN_EMULATOR_PRECISION");
  return asked && std::string_view(asked) == "tf32" ? Precision::tf32 : Precision::ieee;
}

void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool add, Precision) {
  // As on a GPU: operands of a half type, sums of float32.
  const at::ScalarType type = a.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Tensor product = at::mm(a.to(type), b.to(type));
  if (add) product.add_(out.to(type));
  out.copy_(product);
}

void check_later(const Tensor& wrong, const char* message) {
  TORCH_CHECK(!wrong.any().item<bool>(), message);
}

}  // namespace fusedrnn::cuda
