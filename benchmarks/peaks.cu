// Prints the bounds on a recurrence on a GPU, as JSON. Rates: multiply-adds with the weights in
// registers. Latencies: a step that only exchanges h, within a CTA, a cluster or a grid.
// benchmarks/roofline.py compiles this file for the current GPU:
//
//   nvcc -O3 -std=c++17 --expt-relaxed-constexpr -arch=native -Icsrc benchmarks/peaks.cu
#include <cooperative_groups.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "activations.h"
#include "cuda/mma.cuh"

using namespace fusedrnn;
using namespace fusedrnn::cuda;

namespace {

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  std::exit(1);
}

int attribute(cudaDeviceAttr which) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, 0));
  return value;
}

/// Milliseconds for the work that `run` enqueues; the minimum of a few tries.
template <class Run>
double milliseconds(Run run) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  float least = 1e30f;
  for (int i = 0; i < 6; ++i) {
    check(cudaEventRecord(begin));
    run();
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float found = 0;
    check(cudaEventElapsedTime(&found, begin, end));
    if (i > 0) least = std::min(least, found);
  }
  check(cudaEventDestroy(begin));
  check(cudaEventDestroy(end));
  return least;
}

/// Nanoseconds per step, without a launch's cost.
template <class Run>
double nanoseconds(Run run) {
  constexpr int kFew = 1000, kMany = 11000;
  const double few = milliseconds([&] { run(kFew); });
  return 1e6 * (milliseconds([&] { run(kMany); }) - few) / (kMany - kFew);
}

// ---- rates --------------------------------------------------------------------------------------

constexpr int kRounds = 2000;

/// Tensor core mma in every warp, with as many accumulators as the kernels use.
template <class Element>
struct TensorRate {
  static constexpr int kThreads = 256, kChains = 8;
  static constexpr double kFlops = 2.0 * 16 * 8 * (sizeof(Element) == 2 ? 16 : 8) * kChains / 32;
  float* out;
  uint32_t seed = 1;

  /// Distinct values from 2^-8 to 2 in any type, because zeros would draw less power.
  FUSEDRNN_DEVICE uint32_t word(uint32_t i) const {
    const uint32_t hash = (seed + threadIdx.x + 256 * i) * 2654435761u;
    return 0x3c003c00u | (hash >> 8 & 0x00ff00ffu);
  }

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    uint32_t a[kChains][4], count = 0;
    float c[kChains][4] = {};
    for (auto& fragment : a)
      for (uint32_t& value : fragment) value = word(++count);
    const uint32_t b = word(0);
    for (int round = 0; round < kRounds; ++round)
      scalar::unroll<kChains>([&](auto i) { mma<Element>(c[i], a[i], b, b); });
    float sum = 0;
    for (auto& fragment : c)
      for (float value : fragment) sum += value;
    out[blockIdx.x * kThreads + threadIdx.x] = sum;
  }
};

template <class Value>
struct PlainRate {
  static constexpr int kThreads = 256, kChains = 16;
  static constexpr double kFlops = 2.0 * kChains;
  float* out;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    Value c[kChains] = {};
    const Value a = Value(threadIdx.x) * Value(1e-3), b = Value(blockIdx.x);
    for (int round = 0; round < kRounds; ++round)
      scalar::unroll<kChains>([&](auto i) { c[i] = c[i] * a + b; });
    Value sum = 0;
    for (Value value : c) sum += value;
    out[blockIdx.x * kThreads + threadIdx.x] = float(sum);
  }
};

/// TFLOP/s of the whole GPU.
template <class Kernel>
double tflops(float* out) {
  const unsigned ctas = 2 * unsigned(attribute(cudaDevAttrMultiProcessorCount));
  const double ms =
      milliseconds([&] { check(cudaError_t(launch(Kernel{out}, Grid{ctas}, nullptr))); });
  return Kernel::kFlops * Kernel::kThreads * ctas * kRounds / ms * 1e-9;
}

// ---- exchange of h ------------------------------------------------------------------------------

constexpr int kHidden = 128;  // values that a CTA sends

/// Between a CTA's threads, through shared memory.
struct InCta {
  static constexpr int kThreads = kHidden;
  float* out;
  int steps;

  FUSEDRNN_DEVICE void operator()(unsigned char* shared) const {
    float* const h = reinterpret_cast<float*>(shared);  // [2, kHidden]
    float value = float(threadIdx.x);
    for (int t = 0; t < steps; ++t) {
      float* const buffer = h + t % 2 * kHidden;
      buffer[threadIdx.x] = value;
      sync_cta();
      value = 0.5f * buffer[(threadIdx.x + 37) % kHidden];
    }
    out[threadIdx.x] = value;
  }
};

/// Between all CTAs of a grid, through L2, as in the persistent grid kernels.
struct InGrid {
  static constexpr int kThreads = kHidden;
  float* out;
  int steps;
  float* h;           // [2, CTAs, kHidden]
  uint32_t* arrived;  // 0 before a launch

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const unsigned ctas = gridDim.x, peer = (blockIdx.x + 1) % ctas;
    float value = float(threadIdx.x);
    for (int t = 0; t < steps; ++t) {
      float* const buffer = h + size_t(t % 2) * ctas * kHidden;
      buffer[blockIdx.x * kHidden + threadIdx.x] = value;
      sync_cta();
      if (threadIdx.x == 0) {
        add_release(arrived, 1);
        while (load_acquire(arrived) < ctas * unsigned(t + 1)) fusedrnn::cuda::pause();
      }
      sync_cta();
      const Words words = load_cg(buffer + peer * kHidden + threadIdx.x % 32 * 4);
      value = 0.5f * scalar::bit_cast<float>(words.word[0]);
    }
    out[blockIdx.x * kHidden + threadIdx.x] = value;
  }
};

/// To the next CTA in a cluster, through its shared memory, with the cluster barrier.
__global__ void __launch_bounds__(kHidden, 1) in_cluster(float* out, int steps) {
#if __CUDA_ARCH__ >= 900
  __shared__ float h[2][kHidden];
  const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
  const unsigned peer = (cluster.block_rank() + 1) % cluster.num_blocks();
  float value = float(threadIdx.x);
  cluster.sync();
  for (int t = 0; t < steps; ++t) {
    cluster.map_shared_rank(h[t % 2], peer)[threadIdx.x] = value;
    cluster.sync();
    value = 0.5f * h[t % 2][(threadIdx.x + 37) % kHidden];
  }
  out[blockIdx.x * kHidden + threadIdx.x] = value;
#endif
}

/// Between all CTAs of a cluster, by st.async and transaction barriers, as in the persistent
/// cluster kernels.
struct InClusterAsync : UsesClusters {
  static constexpr int kThreads = kHidden;
  float* out;
  int steps;

  static Grid grid(unsigned ctas) {
    const size_t shared = 2 * ctas * kHidden * sizeof(float) + 2 * sizeof(TransactionBarrier);
    return {ctas, 1, 1, shared, false, ctas};
  }
  FUSEDRNN_DEVICE void operator()(unsigned char* shared) const {
    const unsigned ctas = gridDim.x, lane = threadIdx.x % 32, first = threadIdx.x / 32 * 32;
    float* const h = reinterpret_cast<float*>(shared);  // [2, CTAs, kHidden]
    auto* const barriers = reinterpret_cast<TransactionBarrier*>(h + 2 * ctas * kHidden);
    const uint32_t bytes = ctas * kHidden * sizeof(float);
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2; ++i) {
        barriers[i].init();
        barriers[i].arrive_and_expect_tx(bytes);
      }
    }
    sync_cluster();
    float value = float(threadIdx.x);
    for (int t = 0; t < steps; ++t) {
      float* const buffer = h + t % 2 * ctas * kHidden;
      TransactionBarrier* const barrier = barriers + t % 2;
      Words words;
      for (int i = 0; i < 4; ++i) {
        words.word[i] = shuffle(scalar::bit_cast<uint32_t>(value), lane % 8 * 4 + i);
      }
      sync_warp();
      float* const to = buffer + blockIdx.x * kHidden + first + lane % 8 * 4;
      for (unsigned cta = lane / 8; cta < ctas; cta += 4) st_async(words, to, barrier, cta);
      barrier->wait(t / 2 % 2);
      if (threadIdx.x == 0 && t + 2 < steps) barrier->arrive_and_expect_tx(bytes);
      value = 0.5f * buffer[(blockIdx.x + 1) % ctas * kHidden + (threadIdx.x + 37) % kHidden];
    }
    out[blockIdx.x * kHidden + threadIdx.x] = value;
  }
};

/// A cluster in which each CTA fills a multiprocessor, as in a persistent layer.
struct Cluster {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute;

  explicit Cluster(unsigned ctas) {
    config.gridDim = dim3(ctas);
    config.blockDim = dim3(kHidden);
    config.dynamicSmemBytes = size_t(::attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) - 4096;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = ctas;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    check(cudaFuncSetAttribute(in_cluster, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    check(cudaFuncSetAttribute(in_cluster, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(config.dynamicSmemBytes)));
  }
  Cluster(const Cluster&) = delete;

  /// The number of clusters the GPU can hold at once.
  int active() const {
    int count = 0;
    const cudaError_t status = cudaOccupancyMaxActiveClusters(&count, in_cluster, &config);
    if (status != cudaSuccess) cudaGetLastError();  // the cluster is too large for this GPU
    return status == cudaSuccess ? count : 0;
  }
};

void print(const char* name, double value, const char* end = ",") {
  std::printf("\"%s\": %.6g%s", name, value, end);
}

}  // namespace

int main() {
  const unsigned multiprocessors = unsigned(attribute(cudaDevAttrMultiProcessorCount));
  float *out = nullptr, *h = nullptr;
  uint32_t* arrived = nullptr;
  check(cudaMalloc(&out, multiprocessors * 4 * 256 * sizeof(float)));
  check(cudaMalloc(&h, 2 * multiprocessors * kHidden * sizeof(float)));
  check(cudaMalloc(&arrived, sizeof(uint32_t)));

  for (int i = 0; i < 100; ++i) tflops<TensorRate<BFloat16>>(out);  // ramps up the clocks
  std::printf("{\"tflops\": {");
  print("bfloat16", tflops<TensorRate<BFloat16>>(out));
  print("float16", tflops<TensorRate<Float16>>(out));
  print("tf32", tflops<TensorRate<float>>(out));
  print("ieee", tflops<PlainRate<float>>(out));
  print("float64", tflops<PlainRate<double>>(out), "},\n");

  std::printf("\"exchange_ns\": {");
  for (unsigned ctas = 2; ctas <= multiprocessors; ctas *= 2) {
    print(("grid " + std::to_string(ctas)).c_str(), nanoseconds([&](int steps) {
            check(cudaMemsetAsync(arrived, 0, sizeof(uint32_t)));
            const Grid grid{ctas, 1, 1, 0, true};
            check(cudaError_t(launch(InGrid{out, steps, h, arrived}, grid, nullptr)));
          }));
  }
  const bool has_clusters = attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  int active[17] = {};
  for (unsigned ctas = 2; has_clusters && ctas <= 16; ctas *= 2) {
    const Cluster cluster(ctas);
    active[ctas] = cluster.active();
    if (!active[ctas]) continue;
    print(("cluster " + std::to_string(ctas)).c_str(), nanoseconds([&](int steps) {
            check(cudaLaunchKernelEx(&cluster.config, in_cluster, out, steps));
          }));
    if (!active_clusters<InClusterAsync>(InClusterAsync::grid(ctas))) continue;
    print(("st_async " + std::to_string(ctas)).c_str(), nanoseconds([&](int steps) {
            check(cudaError_t(
                launch(InClusterAsync{{}, out, steps}, InClusterAsync::grid(ctas), nullptr)));
          }));
  }
  print("cta", nanoseconds([&](int steps) {
          const Grid grid{1, 1, 1, 2 * kHidden * sizeof(float)};
          check(cudaError_t(launch(InCta{out, steps}, grid, nullptr)));
        }),
        "},\n");

  std::printf("\"active_clusters\": {");
  print("8", active[8]);
  print("16", active[16], "}}\n");
  check(cudaDeviceSynchronize());
  return 0;
}
