// The CUDA backend's ops as torch.ops.fusedrnn_emulated.*, for CPU tensors.
#include <torch/library.h>

#include "../../csrc/cuda/device.h"
#include "../../csrc/cuda/ops_cuda.h"
#include "../../csrc/cuda/ptx.cuh"

namespace {

void set(int64_t seed, int64_t multiprocessors, std::optional<int64_t> room) {
  fusedrnn::emulator::set(
      {uint64_t(seed), int(multiprocessors), int(room.value_or(multiprocessors))});
}
std::vector<int64_t> counts() {
  const auto c = fusedrnn::emulator::counts();
  return {int64_t(c.launches), int64_t(c.ctas), int64_t(c.waits)};
}

/// "launches name" for each kernel.
std::vector<std::string> kernels() {
  std::vector<std::string> all;
  for (const auto& kernel : fusedrnn::emulator::kernels()) {
    all.push_back(std::to_string(kernel.launches) + " " + kernel.name);
  }
  return all;
}

void multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add) {
  const fusedrnn::cuda::LaunchContext context(out);
  fusedrnn::cuda::multiply(context, out, a, b, add);
}

}  // namespace

TORCH_LIBRARY(fusedrnn_emulated, m) {
  m.def("set(int seed, int multiprocessors, int? room=None) -> ()", &set);
  m.def("counts() -> int[]", &counts);
  m.def("kernels() -> str[]", &kernels);
  m.def("_cuda_algorithm() -> str", &fusedrnn::cuda::last_algorithm);
  m.def("multiply(Tensor(a!) out, Tensor a, Tensor b, bool add) -> ()", &multiply);
  const auto define = [&](const std::string& name) {
    // The real op's schema.
    const auto& schema =
        c10::Dispatcher::singleton().findSchemaOrThrow(("fusedrnn::" + name).c_str(), "").schema();
    m.def(c10::FunctionSchema("fusedrnn_emulated::" + name, "", schema.arguments(),
                              schema.returns()));
  };
  define("_random_mask");
  fusedrnn::scalar::Cells::for_each([&](auto cell) {
    for (const char* suffix : {"", "_backward", "_variant", "_variant_backward"}) {
      define(std::string(cell.kName) + suffix);
    }
  });
}

TORCH_LIBRARY_IMPL(fusedrnn_emulated, CPU, m) { fusedrnn::cuda::register_cuda_ops(m); }
