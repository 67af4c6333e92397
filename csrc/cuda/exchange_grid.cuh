// The exchange among a group's resident CTAs: an all-gather through global memory, which stays in
// L2.
#pragma once

#include "exchange.cuh"

namespace fusedrnn::cuda {

template <class Traits>
class GridExchange;

template <class Gemm, int kSplits, int kChunkRows>
struct GridTraits : AllGatherTraits<Gemm, 1, kSplits, kChunkRows> {
  using Exchange = GridExchange<GridTraits>;
  using Base = AllGatherTraits<Gemm, 1, kSplits, kChunkRows>;
  static constexpr int kOperandStride = Base::kK;

  struct Storage : Base::GemmStorage {
    FUSEDRNN_INLINE Storage(int tile_rows, int) : Base::GemmStorage(tile_rows) {}
  };
};

/// The group's counter counts the CTAs that have committed a step.
template <class Traits>
class GridExchange : public AllGatherGemm<Traits> {
 public:
  using Base = AllGatherGemm<Traits>;
  using typename Base::Element;
  using typename Base::Gemm;
  using typename Base::Pair;

  /// exchange: [2, groups * tile_rows, kOperandStride] of the direction, zero on entry.
  FUSEDRNN_DEVICE GridExchange(const PersistentParams& params, Element* exchange,
                               unsigned char* memory)
      : Base(params, memory, typename Traits::Storage(params.tile_rows, gridDim.x)),
        operands_(exchange + this->first_row * Traits::kOperandStride),
        buffer_stride_(gridDim.y * params.tile_rows * Traits::kOperandStride),
        arrivals_(params.arrivals + this->direction * gridDim.y + blockIdx.y) {}

  template <int kParts>
  FUSEDRNN_DEVICE void store(int k, int, const Pair& p, const float (&values)[kParts]) const {
    if (k == this->params_.steps) return;
    Element* const row = buffer(k) + p.tile_row * Traits::kOperandStride + this->first_unit;
    if (p.exists) this->store_operands(row, values);
  }
  /// The CTA arrives once for all chunks in a step.
  FUSEDRNN_DEVICE void commit(const Gemm&, int k, int chunk) const {
    const bool is_last = chunk + 1 == this->chunks();
    this->sync_chunk(k, is_last);
    if (is_last && threadIdx.x == 0) add_release(arrivals_, 1);
  }
  FUSEDRNN_DEVICE void wait(const Gemm& gemm, int k, int chunk) const {
    if (chunk == 0) {
      if (threadIdx.x == 0) {
        poll([&] { return load_acquire(arrivals_) >= uint32_t(k + 1) * gridDim.x; },
             this->waiter());
      }
      sync_cta();
    }
    this->template multiply<GlobalOperand<Element>, Traits::kOperandStride>(
        gemm, buffer(k) + chunk * Traits::kChunkRows * Traits::kOperandStride);
  }

 private:
  FUSEDRNN_DEVICE Element* buffer(int k) const { return operands_ + k % 2 * buffer_stride_; }

  Element* operands_;
  int buffer_stride_;
  uint32_t* arrivals_;
};

}  // namespace fusedrnn::cuda
