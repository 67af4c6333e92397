// A cluster's exchanges, through distributed shared memory: forward an all-gather of h, backward a
// reduce-scatter of partial dh. Transaction barriers are the only synchronisation.
#pragma once

#include "exchange.cuh"

namespace fusedrnn::cuda {

/// Transaction barriers for the bytes that a CTA receives: one for each buffer and chunk.
class ChunkBarriers {
 public:
  /// By all threads; afterwards the cluster's CTAs may send. bytes(chunk): from all CTAs.
  template <class Bytes>
  FUSEDRNN_DEVICE void init(TransactionBarrier* barriers, int chunks, int steps,
                            const Bytes& bytes) {
    barriers_ = barriers;
    chunks_ = chunks;
    steps_ = steps;
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2 * chunks; ++i) {
        barriers[i].init();
        barriers[i].arrive_and_expect_tx(bytes(i % chunks));
      }
    }
    sync_cluster();
  }
  FUSEDRNN_DEVICE TransactionBarrier* at(int k, int chunk) const {
    return barriers_ + k % 2 * chunks_ + chunk;
  }
  /// Blocks until all bytes of step k have arrived. This barrier next counts step k + 2, which a
  /// CTA sends only after receiving our step k + 1, so phases cannot overlap.
  FUSEDRNN_DEVICE void wait(int k, int chunk, uint32_t bytes, const Waiter& waiter) const {
    at(k, chunk)->wait(k / 2 % 2, waiter);
    if (threadIdx.x == 0 && k + 2 < steps_) at(k, chunk)->arrive_and_expect_tx(bytes);
  }

 private:
  TransactionBarrier* barriers_;
  int chunks_, steps_;
};

// ---- all-gather of h ----------------------------------------------------------------------------

template <class Traits>
class ClusterAllGather;

/// WorkTraits: FragmentTraits with blocks of 8 units, whose lanes own one pair each.
template <class WorkTraits>
struct ClusterAllGatherTraits : WorkTraits, UsesClusters {
  using Exchange = ClusterAllGather<ClusterAllGatherTraits>;
  using Operand = typename WorkTraits::Operand;
  static constexpr int kOperandStride = operand_stride<Operand>(WorkTraits::kK);
  static_assert(WorkTraits::kBlocks == 1 && WorkTraits::kPairs == 1);

  struct Storage : WorkTraits::WorkStorage {
    FUSEDRNN_INLINE Storage(int tile_rows, int)
        : WorkTraits::WorkStorage(tile_rows),
          operands(this->template add<Operand>(2 * tile_rows * kOperandStride)),
          barriers(this->template add<TransactionBarrier>(2 * tile_rows / WorkTraits::kChunkRows)) {
    }
    int operands;  ///< [2, tile_rows, kOperandStride]
    int barriers;  ///< [2, chunks]
  };
};

template <class Traits>
class ClusterAllGather : public Traits::template Work<Traits> {
 public:
  using Base = typename Traits::template Work<Traits>;
  using Gemm = typename Traits::Gemm;
  using Operand = typename Traits::Operand;

  FUSEDRNN_DEVICE ClusterAllGather(const PersistentParams& params, uint32_t*, unsigned char* memory)
      : ClusterAllGather(params, memory, typename Traits::Storage(params.tile_rows, gridDim.x)) {}

  /// Sends a group's 8 units of each row to every CTA of the cluster, 16 bytes at a time. The lanes
  /// of a row collect its parts, and each sends them to some CTAs. All lanes have read this chunk's
  /// former operands: a barrier of the group is behind them. So the receiver, which is another
  /// CTA's sender, may overwrite them.
  FUSEDRNN_DEVICE void store(int k, int chunk, const float (&h)[1][1]) const {
    if (k == this->params_.steps) return;
    const int lane = threadIdx.x % kWarp, q = lane % 4;
    const Pair p = this->pair(chunk, 0);
    Operand own;
    Gemm::set_operand(own, h[0][0]);
    constexpr int kPerWord = 4 / int(sizeof(Operand)), kParts = 8 / kPerWords<Operand>;
    uint32_t bits;
    if constexpr (kPerWord == 2) {
      bits = own.bits;
      bits |= shuffle_xor(bits, 4) << 16;  // only the words of even units are used
    } else {
      bits = scalar::bit_cast<uint32_t>(own);
    }
    const bool sends = p.chunk_row < this->rows_of(chunk);
    unroll<kParts>([&](auto part) {
      Words words;
      unroll<4>([&](auto i) { words.word[i] = shuffle(bits, 4 * kPerWord * (4 * part + i) + q); });
      const int unit = this->first_unit + p.unit / 8 * 8 + part * kPerWords<Operand>;
      Operand* const to =
          buffer(k) + operand_offset<Operand>(p.tile_row, unit, Traits::kOperandStride);
      if (!sends) return;
      for (unsigned cta = lane / 4; cta < gridDim.x; cta += 8) {
        st_async(words, to, barriers_.at(k, chunk), cta);
      }
    });
  }
  FUSEDRNN_DEVICE void commit(const Gemm&, int, int) const {}
  FUSEDRNN_DEVICE void wait(int k, int chunk) const {
    barriers_.wait(k, chunk, bytes(chunk), this->waiter());
  }
  FUSEDRNN_DEVICE void multiply(const Gemm& gemm, int k, int chunk,
                                float (&results)[Traits::kPairs][Traits::kResults]) {
    this->template multiply_rows<SharedOperand>(
        gemm, buffer(k) + chunk * Traits::kChunkRows * Traits::kOperandStride,
        Traits::kOperandStride, results);
  }

 private:
  FUSEDRNN_DEVICE ClusterAllGather(const PersistentParams& params, unsigned char* memory,
                                   const typename Traits::Storage& at)
      : Base(params, memory, at),
        operands_(reinterpret_cast<Operand*>(memory + at.operands)),
        buffer_stride_(params.tile_rows * Traits::kOperandStride) {
    for (int i = threadIdx.x; i < 2 * buffer_stride_; i += Traits::kThreads) {
      operands_[i] = Operand{};
    }
    barriers_.init(reinterpret_cast<TransactionBarrier*>(memory + at.barriers), this->chunks(),
                   params.steps, [&](int chunk) { return bytes(chunk); });
  }

  /// The bytes that a CTA receives for a chunk.
  FUSEDRNN_DEVICE uint32_t bytes(int chunk) const {
    return gridDim.x * Traits::kUnits * this->rows_of(chunk) * sizeof(Operand);
  }
  FUSEDRNN_DEVICE Operand* buffer(int k) const { return operands_ + k % 2 * buffer_stride_; }

  Operand* operands_;
  int buffer_stride_;
  ChunkBarriers barriers_;
};

// ---- reduce-scatter of partial dh ---------------------------------------------------------------

template <class Traits>
class ClusterReduceScatter;

/// A CTA multiplies the gate gradients of its own 32 units, K = G * 32, by their weights to all
/// units. A's rows, which are all units, are divided among its 8 warps. Each CTA receives its
/// units' partial dh and adds them in a fixed order. It sends less than an all-gather: per unit and
/// CTA one float, not G operands. No warp waits for another warp's part of a GEMM.
template <class Gemm_, int kChunkRows_>
struct ClusterReduceScatterTraits : UsesClusters {
  using Gemm = Gemm_;
  using Element = typename Gemm::Element;
  using Exchange = ClusterReduceScatter<ClusterReduceScatterTraits>;
  using Operand = Element;
  static constexpr int kThreads = 256, kUnits = kWarp, kChunkRows = kChunkRows_, kPairs = 1;
  static constexpr int kResults = 1, kThreadUnits = 1;
  static constexpr bool kOneChunk = false;
  static constexpr bool kOwnUnitsAlone = true;  ///< K is the CTA's own units' gates
  static constexpr int kGateRun = 0;
  using Carried = cuda::Carried<kPairs, kThreads, kOneChunk>;
  static_assert(kChunkRows * kUnits == kThreads * kPairs);
  static constexpr int kK = Gemm::kK;
  static constexpr int kTileUnits = 16;                         ///< per mma tile
  static constexpr int kWarpUnits = kTileUnits * Gemm::kTiles;  ///< rows of a warp's A
  static constexpr int kOperandStride = operand_stride<Element>(kK);
  static constexpr int kMaxCtas = kWarpUnits * (kThreads / kWarp) / kUnits;
  static constexpr int kPartials = kUnits * kChunkRows;  ///< from one CTA, for a chunk

  struct Storage : SharedLayout {
    FUSEDRNN_INLINE Storage(int tile_rows, int ctas)
        : load_scratch(add<unsigned char>(kThreads / kWarp * Gemm::kLoadScratchBytes)),
          carried(add<float>(Carried::floats(tile_rows / kChunkRows))),
          operands(add<Element>(2 * tile_rows * kOperandStride)),
          partials(add<float>(2 * (tile_rows / kChunkRows) * ctas * kPartials)),
          barriers(add<TransactionBarrier>(2 * (tile_rows / kChunkRows))) {}
    int load_scratch, carried;
    int operands;  ///< [2, tile_rows, kOperandStride]
    int partials;  ///< [2, chunks, CTAs, kPartials]
    int barriers;  ///< [2, chunks]
  };
};

template <class Traits>
class ClusterReduceScatter : public Tile<Traits> {
 public:
  using Element = typename Traits::Element;
  using Gemm = typename Traits::Gemm;

  FUSEDRNN_DEVICE ClusterReduceScatter(const PersistentParams& params, uint32_t*,
                                       unsigned char* memory)
      : ClusterReduceScatter(params, memory,
                             typename Traits::Storage(params.tile_rows, gridDim.x)) {}

  /// weight.row(unit, 0): a row of A.
  template <class Weight>
  FUSEDRNN_DEVICE void load(Gemm& gemm, const Weight& weight) const {
    const int warp = threadIdx.x / kWarp;
    gemm.load([&](int row) { return weight.row(warp * Traits::kWarpUnits + row, 0); }, 0,
              load_scratch_ + warp * Gemm::kLoadScratchBytes);
  }

  FUSEDRNN_DEVICE float* carried_memory() const { return carried_memory_; }
  FUSEDRNN_DEVICE Pair pair(int chunk, int) const {
    Pair p;
    p.chunk_row = threadIdx.x / Traits::kUnits;
    p.tile_row = chunk * Traits::kChunkRows + p.chunk_row;
    p.unit = threadIdx.x % Traits::kUnits;
    p.is_owned = true;
    return p;
  }

  template <int kParts>
  FUSEDRNN_DEVICE void store(int k, int chunk, const float (&values)[1][kParts]) const {
    static_assert(kParts * Traits::kUnits == Traits::kK);
    const Pair p = pair(chunk, 0);
    store_operands<Traits>(p.unit, values[0], [&](int at) {
      return operands(k, chunk * Traits::kChunkRows) +
             operand_offset<Element>(p.chunk_row, at, Traits::kOperandStride);
    });
  }

  /// Multiplies this CTA's operands and sends each partial dh to the CTA that has its unit.
  FUSEDRNN_DEVICE void commit(const Gemm& gemm, int k, int chunk) const {
    if (k == this->params_.steps) return;
    sync_cta();
    float c[1][Gemm::kTiles][4] = {};
    gemm.accumulate(
        SharedOperand<Element>{operands(k, chunk * Traits::kChunkRows), Traits::kOperandStride}, c);
    const int lane = threadIdx.x % kWarp, r = lane / 4, q = lane % 4;
    float* const to = partials(k, chunk) + blockIdx.x * Traits::kPartials;
    unroll<Gemm::kTiles>([&](auto m) {
      const int first = threadIdx.x / kWarp * Traits::kWarpUnits + m * Traits::kTileUnits;
      const unsigned cta = first / Traits::kUnits;
      if (cta >= gridDim.x || 2 * q >= this->rows_of(chunk)) return;
      const bool is_swapped = swapped(first % Traits::kUnits);
      unroll<2>([&](auto i) {
        const int unit = first % Traits::kUnits + r + 8 * i;
        const float even = c[0][m][2 * i], odd = c[0][m][2 * i + 1];
        st_async(is_swapped ? odd : even, is_swapped ? even : odd, to + offset(unit, q),
                 barriers_.at(k, chunk), cta);
      });
    });
  }

  FUSEDRNN_DEVICE void wait(int k, int chunk) const {
    barriers_.wait(k, chunk, bytes(chunk), this->waiter());
  }

  /// Adds what the CTAs have sent.
  FUSEDRNN_DEVICE void multiply(const Gemm&, int k, int chunk, float (&results)[1][1]) const {
    const Pair p = pair(chunk, 0);
    const float* at = partials(k, chunk) + offset(p.unit, p.chunk_row / 2) +
                      (p.chunk_row % 2 ^ int(swapped(p.unit)));
    float of_cta[Traits::kMaxCtas], sum = 0;  // all loads are issued before the first addition
    unroll<Traits::kMaxCtas>(
        [&](auto cta) { of_cta[cta] = cta < gridDim.x ? at[cta * Traits::kPartials] : 0.f; });
    unroll<Traits::kMaxCtas>([&](auto cta) { sum += of_cta[cta]; });
    results[0][0] = sum;
  }

 private:
  FUSEDRNN_DEVICE ClusterReduceScatter(const PersistentParams& params, unsigned char* memory,
                                       const typename Traits::Storage& at)
      : Tile<Traits>(params),
        carried_memory_(reinterpret_cast<float*>(memory + at.carried)),
        load_scratch_(memory + at.load_scratch),
        operands_(reinterpret_cast<Element*>(memory + at.operands)),
        partials_(reinterpret_cast<float*>(memory + at.partials)) {
    const int count = 2 * params.tile_rows * Traits::kOperandStride;
    for (int i = threadIdx.x; i < count; i += Traits::kThreads) operands_[i] = Element{};
    barriers_.init(reinterpret_cast<TransactionBarrier*>(memory + at.barriers), this->chunks(),
                   params.steps, [&](int chunk) { return bytes(chunk); });
  }

  /// The bytes that a CTA receives for a chunk; rows are sent in twos.
  FUSEDRNN_DEVICE uint32_t bytes(int chunk) const {
    return gridDim.x * Traits::kUnits * ((this->rows_of(chunk) + 1) / 2) * 2 * sizeof(float);
  }
  FUSEDRNN_DEVICE Element* operands(int k, int row) const {
    return operands_ + (k % 2 * this->params_.tile_rows + row) * Traits::kOperandStride;
  }
  /// A chunk's received partial dh: from each CTA [kUnits, kChunkRows].
  FUSEDRNN_DEVICE float* partials(int k, int chunk) const {
    return partials_ + (k % 2 * this->chunks() + chunk) * int(gridDim.x) * Traits::kPartials;
  }
  /// Where a unit's rows 2 row_pair and 2 row_pair + 1 lie, and whether they are swapped. A warp
  /// that reads one row of 32 units uses all banks.
  static FUSEDRNN_DEVICE int offset(int unit, int row_pair) {
    return unit * Traits::kChunkRows + 2 * (row_pair ^ (unit / 4 % 4));
  }
  static FUSEDRNN_DEVICE bool swapped(int unit) { return unit / 16 % 2; }

  float* carried_memory_;
  unsigned char* load_scratch_;
  Element* operands_;
  float* partials_;
  ChunkBarriers barriers_;
};

}  // namespace fusedrnn::cuda
