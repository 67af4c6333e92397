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

/// A CTA's 32 units of a row are the lanes of one warp, which sends them together.
template <class Gemm, int kSplits, int kChunkRows>
struct ClusterAllGatherTraits : AllGatherTraits<Gemm, 2, kSplits, kChunkRows>, UsesClusters {
  using Exchange = ClusterAllGather<ClusterAllGatherTraits>;
  using Base = AllGatherTraits<Gemm, 2, kSplits, kChunkRows>;
  static constexpr int kOperandStride = operand_stride<typename Base::Element>(Base::kK);
  static_assert(Base::kUnits == kWarp);

  struct Storage : Base::GemmStorage {
    FUSEDRNN_INLINE Storage(int tile_rows, int)
        : Base::GemmStorage(tile_rows),
          operands(this->template add<typename Base::Element>(2 * tile_rows * kOperandStride)),
          barriers(this->template add<TransactionBarrier>(2 * tile_rows / kChunkRows)) {}
    int operands;  ///< [2, tile_rows, kOperandStride]
    int barriers;  ///< [2, chunks]
  };
};

template <class Traits>
class ClusterAllGather : public AllGatherGemm<Traits> {
 public:
  using Base = AllGatherGemm<Traits>;
  using typename Base::Element;
  using typename Base::Gemm;
  using typename Base::Pair;

  FUSEDRNN_DEVICE ClusterAllGather(const PersistentParams& params, Element*, unsigned char* memory)
      : ClusterAllGather(params, memory, typename Traits::Storage(params.tile_rows, gridDim.x)) {}

  FUSEDRNN_DEVICE void store(int k, int chunk, const Pair& p, const float (&h)[1]) const {
    if (k == this->params_.steps) return;
    Element* const row = buffer(k) + p.tile_row * Traits::kOperandStride + this->first_unit;
    if (p.row >= this->params_.rows) return;
    Element own;
    Gemm::set_operand(own, p.exists ? h[0] : 0.f);
    send_to_all(own, row, barriers_.at(k, chunk));
  }
  /// A chunk's arrival proves that its senders have read that chunk's partial sums, but nothing
  /// about other chunks. With several chunks we still need a CTA barrier.
  FUSEDRNN_DEVICE void commit(const Gemm&, int, int) const {
    if (this->chunks() > 1) sync_cta();
  }
  FUSEDRNN_DEVICE void wait(const Gemm& gemm, int k, int chunk) const {
    barriers_.wait(k, chunk, bytes(chunk), this->waiter());
    this->template multiply<SharedOperand<Element>, Traits::kOperandStride>(
        gemm, buffer(k) + chunk * Traits::kChunkRows * Traits::kOperandStride);
  }

 private:
  FUSEDRNN_DEVICE ClusterAllGather(const PersistentParams& params, unsigned char* memory,
                                   const typename Traits::Storage& at)
      : Base(params, memory, at),
        operands_(reinterpret_cast<Element*>(memory + at.operands)),
        buffer_stride_(params.tile_rows * Traits::kOperandStride) {
    for (int i = threadIdx.x; i < 2 * buffer_stride_; i += Traits::kThreads) {
      operands_[i] = Element{};
    }
    barriers_.init(reinterpret_cast<TransactionBarrier*>(memory + at.barriers), this->chunks(),
                   params.steps, [&](int chunk) { return bytes(chunk); });
  }

  /// The bytes that a CTA receives for a chunk.
  FUSEDRNN_DEVICE uint32_t bytes(int chunk) const {
    return gridDim.x * Traits::kUnits * this->rows_of(chunk) * sizeof(Element);
  }
  FUSEDRNN_DEVICE Element* buffer(int k) const { return operands_ + k % 2 * buffer_stride_; }

  /// Sends every lane's operand to the same place in each CTA of the cluster, 16 bytes at a time. A
  /// lane collects one 16-byte part of the row and sends it to some CTAs.
  static FUSEDRNN_DEVICE void send_to_all(Element own, Element* row, TransactionBarrier* barrier) {
    constexpr int kPerWord = 4 / sizeof(Element);  // elements
    constexpr int kPerStore = 16 / sizeof(Element), kStores = kWarp / kPerStore;
    const int lane = threadIdx.x % kWarp;
    uint32_t bits;
    if constexpr (kPerWord == 2) {
      bits = own.bits;
      bits |= shuffle(bits, lane ^ 1) << 16;  // only even lanes' words are used
    } else {
      bits = scalar::bit_cast<uint32_t>(own);
    }
    Words words;
    unroll<4>(
        [&](auto i) { words.word[i] = shuffle(bits, lane % kStores * kPerStore + i * kPerWord); });
    sync_warp();  // the receiver may overwrite memory that any lane of this warp has read
    for (unsigned cta = lane / kStores; cta < gridDim.x; cta += kWarp / kStores) {
      st_async(words, row + lane % kStores * kPerStore, barrier, cta);
    }
  }

  Element* operands_;
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
  static constexpr int kThreads = 256, kUnits = kWarp, kChunkRows = kChunkRows_, kPairs = 1;
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
          carried(add<float>(kCarried * tile_rows * kUnits)),
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
  using typename Tile<Traits>::Pair;

  FUSEDRNN_DEVICE ClusterReduceScatter(const PersistentParams& params, Element*,
                                       unsigned char* memory)
      : ClusterReduceScatter(params, memory,
                             typename Traits::Storage(params.tile_rows, gridDim.x)) {}

  /// Weight's constructor takes the warp's first unit, 0, the first unit of K and `args`.
  template <class Weight, class... Args>
  FUSEDRNN_DEVICE void load(Gemm& gemm, const Args&... args) const {
    const int warp = threadIdx.x / kWarp;
    const Weight weight{warp * Traits::kWarpUnits, 0, this->first_unit, args...};
    gemm.load(weight, load_scratch_ + warp * Gemm::kLoadScratchBytes);
  }

  template <int kParts>
  FUSEDRNN_DEVICE void store(int k, int, const Pair& p, const float (&values)[kParts]) const {
    static_assert(kParts * Traits::kUnits == Traits::kK);
    if (!p.exists) return;
    Element* const row = operands(k, p.tile_row);
    unroll<kParts>([&](auto part) {
      Gemm::set_operand(row[part * Traits::kUnits + threadIdx.x % Traits::kUnits], values[part]);
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

  FUSEDRNN_DEVICE void wait(const Gemm&, int k, int chunk) {
    barriers_.wait(k, chunk, bytes(chunk), this->waiter());
    received_ = partials(k, chunk);
  }

  FUSEDRNN_DEVICE float read(const Pair& p, int) const {
    const int unit = threadIdx.x % Traits::kUnits;
    const float* at =
        received_ + offset(unit, p.chunk_row / 2) + (p.chunk_row % 2 ^ int(swapped(unit)));
    float of_cta[Traits::kMaxCtas], sum = 0;  // all loads are issued before the first addition
    unroll<Traits::kMaxCtas>(
        [&](auto cta) { of_cta[cta] = cta < gridDim.x ? at[cta * Traits::kPartials] : 0.f; });
    unroll<Traits::kMaxCtas>([&](auto cta) { sum += of_cta[cta]; });
    return sum;
  }

 private:
  FUSEDRNN_DEVICE ClusterReduceScatter(const PersistentParams& params, unsigned char* memory,
                                       const typename Traits::Storage& at)
      : Tile<Traits>(params, reinterpret_cast<float*>(memory + at.carried)),
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

  unsigned char* load_scratch_;
  Element* operands_;
  float *partials_, *received_ = nullptr;
  ChunkBarriers barriers_;
};

}  // namespace fusedrnn::cuda
