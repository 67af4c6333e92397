#include "device.h"

#include <ATen/Context.h>
#include <ATen/ops/_assert_async.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <mutex>
#include <optional>

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
  int multiprocessors, major;
};
const Attributes& attributes_of(int device) {
  static std::mutex mutex;
  static std::vector<std::optional<Attributes>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (size_t(device) >= known.size()) known.resize(device + 1);
  if (!known[device]) {
    known[device] = {attribute(cudaDevAttrMultiProcessorCount, device),
                     attribute(cudaDevAttrComputeCapabilityMajor, device)};
  }
  return *known[device];
}

}  // namespace

Device::Device(const Tensor& input) : guard_(new Guard{c10::cuda::CUDAGuard(input.device())}) {
  const int device = input.get_device();
  stream = c10::cuda::getCurrentCUDAStream(device).stream();
  const Attributes& attributes = attributes_of(device);
  multiprocessors = attributes.multiprocessors;
  has_tensor_cores = attributes.major >= 8;
}
Device::~Device() = default;

void check(int status) { C10_CUDA_CHECK(static_cast<cudaError_t>(status)); }

Precision rnn_precision() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::RNN) ==
                 at::Float32Precision::TF32
             ? Precision::tf32
             : Precision::ieee;
}

void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  Tensor result = out;
  if (out.scalar_type() == a.scalar_type()) {
    add ? at::addmm_out(result, out, a, b) : at::mm_out(result, a, b);
  } else {
    TORCH_INTERNAL_ASSERT(!add);
    at::mm_out(result, a, b, out.scalar_type());
  }
}

// torch switches TF32 on for the whole process, and off for a thread. Off is simple. On, other
// threads' products of float32 may see it while this one hands out its own; nobody's setting is
// lost, since only the first of several threads changes it and the last puts it back.
struct WithPrecision::Guard {
  std::optional<at::NoTF32Guard> off;
  bool on = false;
};

namespace {

std::mutex precision_mutex;
int precision_users = 0;
at::Float32Precision precision_before;

}  // namespace

WithPrecision::WithPrecision(Precision precision) : guard_(new Guard) {
  at::Context& context = at::globalContext();
  if (precision == Precision::ieee) {
    guard_->off.emplace();
    return;
  }
  const std::lock_guard<std::mutex> lock(precision_mutex);
  const auto backend = at::Float32Backend::CUDA;
  const auto op = at::Float32Op::MATMUL;
  if (precision_users == 0) precision_before = context.float32Precision(backend, op);
  if (precision_users > 0 || precision_before != at::Float32Precision::TF32) {
    if (precision_users++ == 0) {
      context.setFloat32Precision(backend, op, at::Float32Precision::TF32);
    }
    guard_->on = true;
  }
}

WithPrecision::~WithPrecision() {
  if (!guard_->on) return;
  const std::lock_guard<std::mutex> lock(precision_mutex);
  if (--precision_users == 0) {
    at::globalContext().setFloat32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL,
                                            precision_before);
  }
}

void check_later(const Tensor& wrong, const char* message) {
  at::_assert_async(at::logical_not(wrong.any()), message);
}

}  // namespace fusedrnn::cuda
