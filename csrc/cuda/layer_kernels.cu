// Kernels around the time loop.
#include <algorithm>

#include "kernel_table.h"
#include "rows.cuh"

namespace fusedrnn::cuda {
namespace {

constexpr int kUploaded = 440;  ///< numbers that fill a kernel's 4 KB of arguments

struct UploadKernel {
  static constexpr int kThreads = kUploaded;
  int64_t numbers[kUploaded];
  int count;
  int64_t* to;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    if (int(threadIdx.x) < count) to[threadIdx.x] = numbers[threadIdx.x];
  }
};

template <class Element, int V>
struct MaskPaddingKernel : RowKernel<V> {
  MaskPaddingParams<Element> p;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const auto position = this->position(p.steps * p.rows, p.features);
    const int64_t token = position.row;
    if (token < 0) return;
    const bool is_padding = p.lengths[token % p.rows] <= token / p.rows;
    const Element* const x = p.x + token * p.x_stride + position.feature;
    store(p.out + token * p.features + position.feature,
          load_or_zeros<V>(is_padding ? nullptr : x));
  }
};

/// The sums over all tokens, in a fixed order. A CTA has kColumns columns. kColumnThreads threads
/// have a token's columns, V each.
template <class Element, int V>
struct BiasGradientsKernel {
  static constexpr int kThreads = 512, kLanes = 32, kWarps = kThreads / kLanes;
  static constexpr int kColumnThreads = V == 1 ? 16 : 2, kColumns = kColumnThreads * V;
  using Accum = Accumulator<Element>;
  BiasGradientParams<Element> p;

  FUSEDRNN_DEVICE void operator()(unsigned char* memory) const {
    const int64_t width = p.preacts * p.hidden_size;
    const int own = threadIdx.x % kColumnThreads * V;
    const int64_t first = int64_t(blockIdx.x) * kColumns, column = first + own;
    Vector<Accum, V> sum = {};
    if (column < width) {
#pragma unroll 8
      for (int64_t token = threadIdx.x / kColumnThreads; token < p.tokens;
           token += kThreads / kColumnThreads) {
        const Vector<Accum, V> dgates = load_values<V>(p.dgates + token * width + column);
        unroll<V>([&](auto v) { sum.value[v] += dgates.value[v]; });
      }
    }
    for (int mask = kColumnThreads; mask < kLanes; mask *= 2) {
      unroll<V>([&](auto v) { sum.value[v] += shuffle_xor(sum.value[v], mask); });
    }
    Accum* const partial = reinterpret_cast<Accum*>(memory);  // [kWarps, kColumns]
    if (threadIdx.x % kLanes < kColumnThreads) {
      unroll<V>([&](auto v) { partial[threadIdx.x / kLanes * kColumns + own + v] = sum.value[v]; });
    }
    sync_cta();
    if (int(threadIdx.x) >= kColumns || first + threadIdx.x >= width) return;
    Accum total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += partial[warp * kColumns + threadIdx.x];
    finish(first + threadIdx.x, total);
  }

  FUSEDRNN_DEVICE void finish(int64_t column, Accum total) const {
    const int64_t preact = column / p.hidden_size, unit = column % p.hidden_size;
    if (preact < p.gates && p.bias_ih) round_to(p.bias_ih[column], total);
    for (int64_t gate = 0; gate < p.gates; ++gate) {
      if (p.hidden_preact[gate] == preact && p.bias_hh) {
        round_to(p.bias_hh[gate * p.hidden_size + unit], total);
      }
    }
  }
};

template <class Element>
struct LayerKernels {
  template <int V>
  using MaskPadding = MaskPaddingKernel<Element, V>;
};

template <class Element, int V>
int launch_bias_gradients(const BiasGradientParams<Element>& p, void* stream) {
  using Kernel = BiasGradientsKernel<Element, V>;
  Kernel kernel;
  kernel.p = p;
  Grid grid{unsigned(scalar::divide_up(p.preacts * p.hidden_size, Kernel::kColumns))};
  grid.shared = Kernel::kWarps * Kernel::kColumns * sizeof(typename Kernel::Accum);
  return launch(kernel, grid, stream);
}

}  // namespace

int upload(const int64_t* numbers, int64_t count, int64_t* to, void* stream) {
  for (int64_t begin = 0; begin < count; begin += kUploaded) {
    UploadKernel kernel;
    kernel.count = int(std::min<int64_t>(kUploaded, count - begin));
    std::copy_n(numbers + begin, kernel.count, kernel.numbers);
    kernel.to = to + begin;
    if (const int status = launch(kernel, {1}, stream)) return status;
  }
  return 0;
}

template <class Element>
int mask_padding(const MaskPaddingParams<Element>& p, void* stream) {
  constexpr int V = 16 / sizeof(Element);
  const bool fit = fits<V, Element>({p.x, p.out}, {p.features, p.x_stride});
  return launch_rows<LayerKernels<Element>::template MaskPadding, V>(p, p.steps * p.rows,
                                                                     p.features, fit, stream);
}

template <class Element>
int bias_gradients(const BiasGradientParams<Element>& p, void* stream) {
  constexpr int V = 16 / sizeof(Element);
  return fits<V, Element>({p.dgates}, {p.hidden_size})
             ? launch_bias_gradients<Element, V>(p, stream)
             : launch_bias_gradients<Element, 1>(p, stream);
}

#define FUSEDRNN_LAYER_KERNELS_OF(Element)                             \
  template int mask_padding(const MaskPaddingParams<Element>&, void*); \
  template int bias_gradients(const BiasGradientParams<Element>&, void*);
FUSEDRNN_LAYER_KERNELS_OF(float)
FUSEDRNN_LAYER_KERNELS_OF(double)
FUSEDRNN_LAYER_KERNELS_OF(BFloat16)
FUSEDRNN_LAYER_KERNELS_OF(Float16)

}  // namespace fusedrnn::cuda
