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

  /// Where a row's q-th 16 bytes are, from a chunk's first operand.
  static FUSEDRNN_DEVICE int b_offset(int row, int q) {
    return operand_offset<typename WorkTraits::Operand>(
        row, q * kPerWords<typename WorkTraits::Operand>, kOperandStride);
  }

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

  FUSEDRNN_DEVICE CtaExchange(const PersistentParams& params, uint32_t*, unsigned char* memory)
      : CtaExchange(params, memory,
                    typename Traits::Storage(Tile<Traits>::tile_rows(params), gridDim.x)) {}

  template <int kParts>
  FUSEDRNN_DEVICE void store(int k, int, const float (&values)[Traits::kPairs][kParts]) const {
    if constexpr (Traits::kOperandsAreNeighbours) {
      this->store_rows(values, buffer(k), Traits::kOperandStride, store_offset_);
    } else {
      constexpr int kPart = Traits::kK / kParts;
      static_assert(kPart * sizeof(Operand) % 64 == 0);  // parts begin where places repeat
      unroll<Traits::kPairs>([&](auto i) {
        // Rows 2 n and 2 n + 1 have the same places.
        constexpr int row = Traits::pair_row(i) % 2;
        Operand* const to = buffer(k) + offset_[i - row] + row * Traits::kOperandStride;
        unroll<kParts>([&](auto part) { Gemm::set_operand(to[part * kPart], values[i][part]); });
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
    this->multiply_rows(gemm, buffer(k), results);
  }

 private:
  static constexpr int kBuffer = Traits::kChunkRows * Traits::kOperandStride;

  FUSEDRNN_DEVICE CtaExchange(const PersistentParams& params, unsigned char* memory,
                              const typename Traits::Storage& at)
      : Base(params, memory, at), operands_(reinterpret_cast<Operand*>(memory + at.operands)) {
    // The backward pass's first GEMM reads zeros. All other operands are stored before.
    constexpr int words = 2 * kBuffer / kPerWords<Operand>;
    for (int i = threadIdx.x; i < words; i += Traits::kThreads) {
      reinterpret_cast<Words*>(operands_)[i] = Words{};
    }
    if constexpr (Traits::kOperandsAreNeighbours) {
      store_offset_ = kept(this->first_offset(Traits::kOperandStride));
    } else {
      unroll<Traits::kPairs>([&](auto i) {
        const Pair p = this->pair(0, i);
        offset_[i] = operand_offset<Operand>(p.chunk_row, p.unit, Traits::kOperandStride);
        if (Traits::pair_row(i) % 2 == 0) offset_[i] = kept(offset_[i]);
      });
    }
    sync_cta();
  }

  FUSEDRNN_DEVICE Operand* buffer(int k) const { return operands_ + unsigned(k) % 2 * kBuffer; }

  Operand* operands_;
  int offset_[Traits::kPairs];  ///< of the pairs' operands in a buffer
  int store_offset_ = 0;        ///< of the first operand of the thread, if they are neighbours
};

}  // namespace fusedrnn::cuda
