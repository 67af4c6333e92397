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

  FUSEDRNN_DEVICE CtaExchange(const PersistentParams& params, uint32_t*, unsigned char* memory)
      : CtaExchange(params, memory, typename Traits::Storage(params.tile_rows, gridDim.x)) {}

  template <int kParts>
  FUSEDRNN_DEVICE void store(int k, int, const float (&values)[Traits::kPairs][kParts]) const {
    Operand* const rows = buffer(k);
    unroll<Traits::kPairs>([&](auto i) {
      const Pair p = this->pair(0, i);
      store_operands<Traits>(p.unit, values[i], [&](int at) {
        return rows + operand_offset<Operand>(p.chunk_row, at, Traits::kOperandStride);
      });
    });
  }
  /// Orders a step's stores before the next step's loads. Nothing follows the last step.
  FUSEDRNN_DEVICE void commit(const Gemm&, int k, int) const {
    if (k < this->params_.steps) sync_cta();
  }
  FUSEDRNN_DEVICE void wait(int, int) const {}
  FUSEDRNN_DEVICE void multiply(const Gemm& gemm, int k, int,
                                float (&results)[Traits::kPairs][Traits::kResults]) {
    this->template multiply_rows<SharedOperand>(gemm, buffer(k), Traits::kOperandStride, results);
  }

 private:
  static constexpr int kBuffer = Traits::kChunkRows * Traits::kOperandStride;

  FUSEDRNN_DEVICE CtaExchange(const PersistentParams& params, unsigned char* memory,
                              const typename Traits::Storage& at)
      : Base(params, memory, at), operands_(reinterpret_cast<Operand*>(memory + at.operands)) {
    // Padding of K must be zero.
    for (int i = threadIdx.x; i < 2 * kBuffer; i += Traits::kThreads) operands_[i] = Operand{};
    sync_cta();
  }

  FUSEDRNN_DEVICE Operand* buffer(int k) const { return operands_ + k % 2 * kBuffer; }

  Operand* operands_;
};

}  // namespace fusedrnn::cuda
