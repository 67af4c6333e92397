// The exchange among a group's resident CTAs: an all-gather through global memory, which stays in
// L2.
#pragma once

#include "exchange.cuh"

namespace fusedrnn::cuda {

template <class Traits>
class GridExchange;

/// WorkTraits: FragmentTraits or PartialSumTraits.
template <class WorkTraits>
struct GridTraits : WorkTraits {
  using Exchange = GridExchange<GridTraits>;
  static constexpr int kOperandStride = WorkTraits::kK;

  struct Storage : WorkTraits::WorkStorage {
    FUSEDRNN_INLINE Storage(int tile_rows, int) : WorkTraits::WorkStorage(tile_rows) {}
  };
};

/// The group's counter counts the CTAs that have committed a step.
template <class Traits>
class GridExchange : public Traits::template Work<Traits> {
 public:
  using Base = typename Traits::template Work<Traits>;
  using Gemm = typename Traits::Gemm;
  using Operand = typename Traits::Operand;

  /// exchange: [2, groups * tile_rows, kOperandStride] of the direction, zero on entry.
  FUSEDRNN_DEVICE GridExchange(const PersistentParams& params, typename Traits::Element* exchange,
                               unsigned char* memory)
      : Base(params, memory, typename Traits::Storage(params.tile_rows, gridDim.x)),
        operands_(reinterpret_cast<Operand*>(exchange) + this->first_row * Traits::kOperandStride),
        buffer_stride_(gridDim.y * params.tile_rows * Traits::kOperandStride),
        arrivals_(params.arrivals + this->direction * gridDim.y + blockIdx.y) {}

  template <int kParts>
  FUSEDRNN_DEVICE void store(int k, int chunk,
                             const float (&values)[Traits::kPairs][kParts]) const {
    if (k == this->params_.steps) return;
    unroll<Traits::kPairs>([&](auto i) {
      const Pair p = this->pair(chunk, i);
      Operand* const row = buffer(k) + p.tile_row * Traits::kOperandStride;
      if (!this->exists(p)) return;
      store_operands<Traits>(this->first_unit + p.unit, values[i],
                             [&](int at) { return row + at; });
    });
  }
  /// The CTA arrives once for all chunks in a step. Orders a chunk's stores before later loads, and
  /// its reads before the next GEMM's partial sums. Nothing follows the last step's last chunk.
  FUSEDRNN_DEVICE void commit(const Gemm&, int k, int chunk) const {
    const bool is_last = chunk + 1 == this->chunks();
    if (!is_last || k < this->params_.steps) sync_cta();
    if (is_last && threadIdx.x == 0) add_release(arrivals_, 1);
  }
  FUSEDRNN_DEVICE void wait(int k, int chunk) const {
    if (chunk > 0) return;
    if (threadIdx.x == 0) {
      poll([&] { return load_acquire(arrivals_) >= uint32_t(k + 1) * gridDim.x; }, this->waiter());
    }
    sync_cta();
  }
  FUSEDRNN_DEVICE void multiply(const Gemm& gemm, int k, int chunk,
                                float (&results)[Traits::kPairs][Traits::kResults]) {
    this->template multiply_rows<GlobalOperand>(
        gemm, buffer(k) + chunk * Traits::kChunkRows * Traits::kOperandStride,
        Traits::kOperandStride, results);
  }

 private:
  FUSEDRNN_DEVICE Operand* buffer(int k) const { return operands_ + k % 2 * buffer_stride_; }

  Operand* operands_;
  int buffer_stride_;
  uint32_t* arrivals_;
};

}  // namespace fusedrnn::cuda
