// The exchange for a CTA that has all hidden units: operands stay in its shared memory.
#pragma once

#include "exchange.cuh"

namespace fusedrnn::cuda {

template <class Traits>
class CtaExchange;

/// WorkTraits: FragmentTraits or PartialSumTraits.
template <class WorkTraits>
struct CtaTraits : WorkTraits {
  using Exchange = CtaExchange<CtaTraits>;
  static constexpr int kOperandStride =
      operand_stride<typename WorkTraits::Operand>(WorkTraits::kK);
  static_assert(WorkTraits::kOneChunk);

  struct Storage : WorkTraits::WorkStorage {
    FUSEDRNN_INLINE Storage(int tile_rows, int)
        : WorkTraits::WorkStorage(tile_rows),
          operands(this->template add<typename WorkTraits::Operand>(2 * kRows * kOperandStride)) {}
    static constexpr int kRows = WorkTraits::kChunkRows;
    int operands;  ///< [2, kChunkRows, kOperandStride]
  };
};

template <class Traits>
class CtaExchange : public Traits::template Work<Traits> {
 public:
  using Base = typename Traits::template Work<Traits>;
  using Gemm = typename Traits::Gemm;
  using Operand = typename Traits::Operand;

  FUSEDRNN_DEVICE CtaExchange(const PersistentParams& params, typename Traits::Element*,
                              unsigned char* memory)
      : CtaExchange(params, memory, typename Traits::Storage(params.tile_rows, gridDim.x)) {}

  template <int kParts>
  FUSEDRNN_DEVICE void store(int k, int, const float (&values)[Traits::kPairs][kParts]) const {
    Operand* const rows = buffer(k);
    if constexpr (Traits::kOperandsAreNeighbours) {
      this->store_rows(values, rows, Traits::kOperandStride, store_offset_);
    } else {
      unroll<Traits::kPairs>([&](auto i) {
        const Pair p = this->pair(0, i);
        store_operands<Traits>(p.unit, values[i], [&](int at) {
          return rows + operand_offset<Operand>(p.chunk_row, at, Traits::kOperandStride);
        });
      });
    }
  }
  /// Orders a step's stores before the next step's loads. Nothing follows the last step.
  FUSEDRNN_DEVICE void commit(const Gemm&, int k, int) const {
    if (k < this->params_.steps) sync_cta();
  }
  FUSEDRNN_DEVICE void wait(int, int) const {}
  FUSEDRNN_DEVICE void multiply(const Gemm& gemm, int k, int,
                                float (&results)[Traits::kPairs][Traits::kResults]) {
    if constexpr (Traits::kOperandsAreNeighbours) {
      float c[1][Gemm::kTiles][4] = {};
      const Operand* const lane = buffer(k) + lane_offset_;
      gemm.template accumulate_tiles<0>(
          [&](auto j, auto) { return SharedOperand<Operand>::load(lane + j * Gemm::kPairK); }, c);
      unroll<Traits::kPairs>([&](auto i) { results[i][0] = gemm.result(c, 0, i / 2, i % 2); });
    } else {
      this->template multiply_rows<SharedOperand>(gemm, buffer(k), Traits::kOperandStride, results);
    }
  }

 private:
  static constexpr int kBuffer = Traits::kChunkRows * Traits::kOperandStride;

  FUSEDRNN_DEVICE CtaExchange(const PersistentParams& params, unsigned char* memory,
                              const typename Traits::Storage& at)
      : Base(params, memory, at), operands_(reinterpret_cast<Operand*>(memory + at.operands)) {
    // Padding of K must be zero.
    constexpr int words = 2 * kBuffer / kPerWords<Operand>;
    for (int i = threadIdx.x; i < words; i += Traits::kThreads) {
      reinterpret_cast<Words*>(operands_)[i] = Words{};
    }
    sync_cta();
    if constexpr (Traits::kOperandsAreNeighbours) {
      const int lane = threadIdx.x % kWarp;
      store_offset_ = Base::first_offset(Traits::kOperandStride);
      lane_offset_ =
          operand_offset<Operand>(lane / 4, lane % 4 * kPerWords<Operand>, Traits::kOperandStride);
      keep(store_offset_);
      keep(lane_offset_);
    }
  }

  FUSEDRNN_DEVICE Operand* buffer(int k) const { return operands_ + unsigned(k) % 2 * kBuffer; }

  Operand* operands_;
  int store_offset_ = 0;  ///< where the thread's first operand lies in a buffer
  int lane_offset_ = 0;   ///< where the lane's first operands of a GEMM lie
};

}  // namespace fusedrnn::cuda
