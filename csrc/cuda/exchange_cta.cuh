// The exchange for a CTA that has all hidden units: operands stay in its shared memory.
#pragma once

#include "exchange.cuh"

namespace fusedrnn::cuda {

template <class Traits>
class CtaExchange;

template <class Gemm, int kBlocks, int kChunkRows>
struct CtaTraits : AllGatherTraits<Gemm, kBlocks, 1, kChunkRows> {
  using Exchange = CtaExchange<CtaTraits>;
  using Base = AllGatherTraits<Gemm, kBlocks, 1, kChunkRows>;
  static constexpr int kOperandStride = operand_stride<typename Base::Element>(Base::kK);

  struct Storage : Base::GemmStorage {
    FUSEDRNN_INLINE Storage(int tile_rows, int)
        : Base::GemmStorage(tile_rows),
          operands(this->template add<typename Base::Element>(2 * tile_rows * kOperandStride)) {}
    int operands;  ///< [2, tile_rows, kOperandStride]
  };
};

template <class Traits>
class CtaExchange : public AllGatherGemm<Traits> {
 public:
  using Base = AllGatherGemm<Traits>;
  using typename Base::Element;
  using typename Base::Gemm;
  using typename Base::Pair;

  FUSEDRNN_DEVICE CtaExchange(const PersistentParams& params, Element*, unsigned char* memory)
      : CtaExchange(params, memory, typename Traits::Storage(params.tile_rows, gridDim.x)) {}

  template <int kParts>
  FUSEDRNN_DEVICE void store(int k, int, const Pair& p, const float (&values)[kParts]) const {
    if (k == this->params_.steps) return;
    Element* const row = buffer(k) + p.tile_row * Traits::kOperandStride + this->first_unit;
    if (p.exists) this->store_operands(row, values);
  }
  FUSEDRNN_DEVICE void commit(const Gemm&, int k, int chunk) const {
    this->sync_chunk(k, chunk + 1 == this->chunks());
  }
  FUSEDRNN_DEVICE void wait(const Gemm& gemm, int k, int chunk) const {
    this->template multiply<SharedOperand<Element>, Traits::kOperandStride>(
        gemm, buffer(k) + chunk * Traits::kChunkRows * Traits::kOperandStride);
  }

 private:
  FUSEDRNN_DEVICE CtaExchange(const PersistentParams& params, unsigned char* memory,
                              const typename Traits::Storage& at)
      : Base(params, memory, at),
        // The same as memory + at.operands, but ptxas needs fewer registers for it.
        operands_(reinterpret_cast<Element*>(this->carried_ + at.carried_floats)),
        buffer_stride_(params.tile_rows * Traits::kOperandStride) {
    // Padding of K and rows past the batch must be zero.
    for (int i = threadIdx.x; i < 2 * buffer_stride_; i += Traits::kThreads) {
      operands_[i] = Element{};
    }
    sync_cta();
  }

  FUSEDRNN_DEVICE Element* buffer(int k) const { return operands_ + k % 2 * buffer_stride_; }

  Element* operands_;
  int buffer_stride_;
};

}  // namespace fusedrnn::cuda
