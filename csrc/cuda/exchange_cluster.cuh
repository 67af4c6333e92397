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
  FUSEDRNN_DEVICE int index(int k, int chunk) const {
    return int(unsigned(k) % 2) * chunks_ + chunk;
  }
  FUSEDRNN_DEVICE TransactionBarrier* at(int k, int chunk) const {
    return barriers_ + index(k, chunk);
  }
  /// Blocks until all bytes of step k have arrived. This barrier next counts step k + 2, which a
  /// CTA sends only after receiving our step k + 1, so phases cannot overlap.
  FUSEDRNN_DEVICE void wait(int k, int chunk, uint32_t bytes, const Waiter& waiter) const {
    wait(k, chunk, waiter);
    expect_next(k, chunk, bytes);
  }
  FUSEDRNN_DEVICE void wait(int k, int chunk, const Waiter& waiter) const {
    at(k, chunk)->wait(unsigned(k) / 2 % 2, waiter);
  }
  /// Announces the bytes of step k + 2, some time after the wait for step k.
  FUSEDRNN_DEVICE void expect_next(int k, int chunk, uint32_t bytes) const {
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

  /// Where a row's q-th 16 bytes are, from a chunk's first operand.
  static FUSEDRNN_DEVICE int b_offset(int row, int q) {
    return operand_offset<typename WorkTraits::Operand>(
        row, q * kPerWords<typename WorkTraits::Operand>, kOperandStride);
  }

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
      : ClusterAllGather(params, memory,
                         typename Traits::Storage(Tile<Traits>::tile_rows(params), gridDim.x)) {}

  /// Sends a group's 8 units of each row to every CTA of the cluster, 16 bytes at a time. The lanes
  /// of a row collect its parts, and each sends them to some CTAs. All lanes have read this chunk's
  /// former operands: a barrier of the group is behind them. So the receiver, which is another
  /// CTA's sender, may overwrite them.
  FUSEDRNN_DEVICE void store(int k, int chunk, const float (&h)[1][1]) const {
    if (k == this->params_.steps) return;
    Operand own;
    Gemm::set_operand(own, h[0][0]);
    uint32_t bits;
    if constexpr (kPerWord == 2) {
      bits = own.bits;
      bits |= shuffle_xor(bits, 4) << 16;  // only the words of even units are used
    } else {
      bits = scalar::bit_cast<uint32_t>(own);
    }
    const int ctas = row_ < this->rows_of(chunk) ? ctas_ : 0;
    const int offset = k % 2 * buffer_stride_ + chunk * kChunkStride;
    const int barrier = barriers_.index(k, chunk);
    unroll<kParts>([&](auto part) {
      Words words;
      unroll<4>([&](auto i) {
        words.word[i] = shuffle(bits, 4 * kPerWord * (4 * part + i) + lane_of_row_);
      });
      unroll<2>([&](auto i) {
        if (i < ctas) {
          st_async(words, to_[part][i] + offset, barrier_of_[i] + barrier);
        }
      });
    });
  }
  FUSEDRNN_DEVICE void commit(const Gemm&, int, int) const {}
  FUSEDRNN_DEVICE void wait(int k, int chunk) const {
    barriers_.wait(k, chunk, bytes(chunk), this->waiter());
  }
  FUSEDRNN_DEVICE void multiply(const Gemm& gemm, int k, int chunk,
                                float (&results)[Traits::kPairs][Traits::kResults]) {
    this->multiply_rows(gemm, operands_ + k % 2 * buffer_stride_ + chunk * kChunkStride, results);
  }

 private:
  static constexpr int kPerWord = 4 / int(sizeof(Operand)), kParts = 8 / kPerWords<Operand>;
  static constexpr int kChunkStride = Traits::kChunkRows * Traits::kOperandStride;

  FUSEDRNN_DEVICE ClusterAllGather(const PersistentParams& params, unsigned char* memory,
                                   const typename Traits::Storage& at)
      : Base(params, memory, at),
        operands_(reinterpret_cast<Operand*>(memory + at.operands)),
        buffer_stride_(Base::tile_rows(params) * Traits::kOperandStride) {
    for (int i = threadIdx.x; i < 2 * buffer_stride_; i += Traits::kThreads) {
      operands_[i] = Operand{};
    }
    auto* const barriers = reinterpret_cast<TransactionBarrier*>(memory + at.barriers);
    barriers_.init(barriers, this->chunks(), params.steps, [&](int chunk) { return bytes(chunk); });
    const Pair p = this->pair(0, 0);
    const unsigned first = threadIdx.x % kWarp / 4;
    row_ = kept(p.chunk_row);
    ctas_ = kept(int(first < gridDim.x) + int(first + 8 < gridDim.x));
    lane_of_row_ = kept(int(threadIdx.x % 4));
    unroll<2>([&](auto i) {
      const unsigned cta = i < ctas_ ? first + 8 * i : blockIdx.x;
      barrier_of_[i] = Remote(barriers, cta);
      unroll<kParts>([&](auto part) {
        const int unit = this->first_unit + p.unit / 8 * 8 + part * kPerWords<Operand>;
        to_[part][i] = Remote(
            operands_ + operand_offset<Operand>(p.chunk_row, unit, Traits::kOperandStride), cta);
      });
    });
  }

  /// The bytes that a CTA receives for a chunk.
  FUSEDRNN_DEVICE uint32_t bytes(int chunk) const {
    return gridDim.x * Traits::kUnits * this->rows_of(chunk) * sizeof(Operand);
  }

  Operand* operands_;
  int buffer_stride_;
  ChunkBarriers barriers_;
  /// The lane's parts of its row and the barriers, in the memory of its CTAs, two at most.
  Remote<Operand> to_[kParts][2];
  Remote<TransactionBarrier> barrier_of_[2];
  int row_, ctas_, lane_of_row_;
};

// ---- reduce-scatter of partial dh ---------------------------------------------------------------

/// sum[0] += sum[1] + ... + sum[count - 1], neighbours first; count is a power of two.
template <int count, int n>
FUSEDRNN_DEVICE void sum_in_tree(float (&sum)[n]) {
  if constexpr (count > 1) {
    unroll<count / 2>([&](auto i) { sum[i] = sum[2 * i] + sum[2 * i + 1]; });
    sum_in_tree<count / 2>(sum);
  }
}

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
  static constexpr bool kOneChunk = false, kHalvesTakeTurns = false;
  static constexpr bool kInFragments = true;
  static constexpr bool kOwnUnitsAlone = true;  ///< K is the CTA's own units' gates
  using Carried = cuda::Carried<kPairs, kThreads, kOneChunk>;
  static_assert(kChunkRows == 8 && kChunkRows * kUnits == kThreads * kPairs);
  static constexpr int kK = Gemm::kK;
  static constexpr int kTileUnits = 16;                         ///< per mma tile
  static constexpr int kWarpUnits = kTileUnits * Gemm::kTiles;  ///< rows of a warp's A
  static constexpr int kOperandStride = operand_stride<Element>(kK);
  static constexpr int kMaxCtas = kWarpUnits * (kThreads / kWarp) / kUnits;
  static constexpr int kPartials = kUnits * kChunkRows;  ///< from one CTA, for a chunk
  static constexpr int kChunkPartials = kMaxCtas * kPartials;
  static constexpr int kLoadScratch = kThreads / kWarp * Gemm::kLoadScratchBytes;

  /// Rows and units from a thread's first pair to its i-th.
  static FUSEDRNN_INLINE constexpr int pair_row(int) { return 0; }
  static FUSEDRNN_INLINE constexpr int pair_unit(int) { return 0; }

  /// A unit's gates are neighbours in K.
  template <int kParts>
  static FUSEDRNN_INLINE constexpr KPlace place_of(int k) {
    static_assert(kParts * kUnits == kK);
    return {k % kParts, k / kParts};
  }

  struct Storage : SharedLayout {
    FUSEDRNN_INLINE Storage(int tile_rows, int)
        : carried(add<float>(Carried::floats(tile_rows / kChunkRows))),
          operands(add<Element>(2 * tile_rows * kOperandStride)),
          barriers(add<TransactionBarrier>(2 * (tile_rows / kChunkRows))),
          partials(add<unsigned char>(partial_bytes(tile_rows / kChunkRows))) {}
    /// While weights are loaded, their scratch memory lies where the partial dh will be.
    static FUSEDRNN_INLINE int partial_bytes(int chunks) {
      const int bytes = 2 * chunks * kChunkPartials * int(sizeof(float));
      return bytes > kLoadScratch ? bytes : kLoadScratch;
    }
    int carried;
    int operands;  ///< [2, chunks, kChunkRows, kOperandStride]
    int barriers;  ///< [2, chunks]
    int partials;  ///< [2, chunks, kMaxCtas, kPartials], zeros from CTAs that do not exist
  };
};

template <class Traits>
class ClusterReduceScatter : public Tile<Traits> {
 public:
  using Element = typename Traits::Element;
  using Gemm = typename Traits::Gemm;

  FUSEDRNN_DEVICE ClusterReduceScatter(const PersistentParams& params, uint32_t*,
                                       unsigned char* memory)
      : ClusterReduceScatter(
            params, memory, typename Traits::Storage(Tile<Traits>::tile_rows(params), gridDim.x)) {}

  /// weight: as in TransposedGemm. Afterwards the cluster's CTAs may send.
  template <class Weight>
  FUSEDRNN_DEVICE void load(Gemm& gemm, const Weight& weight) {
    const int warp = threadIdx.x / kWarp;
    gemm.load(weight, warp * Traits::kWarpUnits,
              reinterpret_cast<unsigned char*>(partials_) + warp * Gemm::kLoadScratchBytes);
    sync_cta();  // the partial dh take the place of the scratch memory
    for (int buffer = 0; buffer < 2 * this->chunks(); ++buffer) {
      for (int cta = gridDim.x; cta < Traits::kMaxCtas; ++cta) {
        partials_[buffer * Traits::kChunkPartials + cta * Traits::kPartials + threadIdx.x] = 0;
      }
    }
    barriers_.init(barrier_memory_, this->chunks(), this->params_.steps,
                   [&](int chunk) { return bytes(chunk); });
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
    store_neighbours(values[0], operands(k, chunk), p.chunk_row, p.unit * kParts,
                     Traits::kOperandStride, store_offset_);
  }

  /// Multiplies this CTA's operands and sends each partial dh to the CTA that has its unit. The
  /// results of two tiles are sent while the next two are multiplied.
  FUSEDRNN_DEVICE void commit(const Gemm& gemm, int k, int chunk) const {
    if (k == this->params_.steps) return;
    const bool sends = 2 * int(threadIdx.x % 4) < this->rows_of(chunk);
    Remote<float> to[kReceivers][2];
    Remote<TransactionBarrier> barrier[kReceivers];
    unroll<kReceivers>([&](auto i) {
      to[i][0] = receiver_[i].partials + buffer(k, chunk) * Traits::kChunkPartials;
      to[i][1] = to[i][0] + second_;
      barrier[i] = receiver_[i].barriers + barriers_.index(k, chunk);
      unroll<2>([&](auto half) { to[i][half] = kept(to[i][half]); });
      barrier[i] = kept(barrier[i]);
    });
    const Element* const b_lane = operands(k, chunk) + b_offset_;
    sync_cta();
    Words words[Gemm::kPairs];
    unroll<Gemm::kPairs>(
        [&](auto j) { words[j] = SharedOperand<Element>::load(b_lane + j * Gemm::kPairK); });
    constexpr int kTogether = Gemm::kTiles < 2 ? 1 : 2;
    unroll<Gemm::kTiles / kTogether>([&](auto pair) {
      float c[1][kTogether][4] = {};
      gemm.template accumulate_tiles<pair * kTogether>(
          EachOperand{[&](auto j, auto) { return words[j]; }}, c);
      // All lanes take part in an mma, so it must not move into the branch of those that send.
      unroll<kTogether>([&](auto m) { unroll<4>([&](auto n) { c[0][m][n] = kept(c[0][m][n]); }); });
      constexpr int i = pair * kTogether * Traits::kTileUnits / Traits::kUnits;
      if (!sends || !receiver_[i].exists) return;
      unroll<kTogether>([&](auto m) {
        unroll<2>([&](auto half) {
          const float even = c[0][m][2 * half], odd = c[0][m][2 * half + 1];
          const bool is_swapped = kTogether == 2 ? m == 1 : swapped(first_of_tile(0));
          st_async(is_swapped ? odd : even, is_swapped ? even : odd,
                   to[i][half] + m * Traits::kTileUnits * Traits::kChunkRows, barrier[i]);
        });
      });
    });
    if (k > 0) barriers_.expect_next(k - 1, chunk, bytes(chunk));
  }

  FUSEDRNN_DEVICE void wait(int k, int chunk) {
    received_ = buffer(k, chunk) * Traits::kChunkPartials + received_offset_;
    received_ = kept(received_);
    barriers_.wait(k, chunk, this->waiter());
  }

  /// Adds what the CTAs have sent, in twos, fours, ...
  FUSEDRNN_DEVICE void multiply(const Gemm&, int, int, float (&results)[1][1]) const {
    const float* const at = partials_ + received_;
    float sum[Traits::kMaxCtas];
    unroll<Traits::kMaxCtas>([&](auto cta) { sum[cta] = at[cta * Traits::kPartials]; });
    sum_in_tree<Traits::kMaxCtas>(sum);
    results[0][0] += sum[0];
  }

 private:
  FUSEDRNN_DEVICE ClusterReduceScatter(const PersistentParams& params, unsigned char* memory,
                                       const typename Traits::Storage& at)
      : Tile<Traits>(params),
        carried_memory_(reinterpret_cast<float*>(memory + at.carried)),
        operands_(reinterpret_cast<Element*>(memory + at.operands)),
        partials_(reinterpret_cast<float*>(memory + at.partials)),
        barrier_memory_(reinterpret_cast<TransactionBarrier*>(memory + at.barriers)) {
    const int lane = threadIdx.x % kWarp, r = lane / 4, q = lane % 4;
    const int own = blockIdx.x * Traits::kPartials + offset(first_of_tile(0) + r, q);
    second_ = offset(r + 8, q) - offset(r, q);
    const Pair p = pair(0, 0);
    received_offset_ = offset(p.unit, p.chunk_row / 2) + (p.chunk_row % 2 ^ int(swapped(p.unit)));
    b_offset_ = operand_offset<Element>(r, q * kPerWords<Element>, Traits::kOperandStride);
    store_offset_ = operand_offset<Element>(p.chunk_row, p.unit * (Traits::kK / Traits::kUnits),
                                            Traits::kOperandStride);
    second_ = kept(second_);
    received_offset_ = kept(received_offset_);
    b_offset_ = kept(b_offset_);
    store_offset_ = kept(store_offset_);
    unroll<kReceivers>([&](auto i) {
      const unsigned cta = first_of_tile(i * (Traits::kUnits / Traits::kTileUnits)) / kCtaUnits;
      receiver_[i].exists = cta < gridDim.x;
      const unsigned some = receiver_[i].exists ? cta : blockIdx.x;
      receiver_[i].partials = Remote<float>(partials_ + own, some);
      receiver_[i].barriers = Remote<TransactionBarrier>(barrier_memory_, some);
    });
  }

  /// The bytes that a CTA receives for a chunk; rows are sent in twos.
  FUSEDRNN_DEVICE uint32_t bytes(int chunk) const {
    return gridDim.x * Traits::kUnits * ((this->rows_of(chunk) + 1) / 2) * 2 * sizeof(float);
  }
  /// The k-th step's buffer for a chunk, of operands and of partial dh.
  FUSEDRNN_DEVICE int buffer(int k, int chunk) const {
    return int(unsigned(k) % 2) * this->chunks() + chunk;
  }
  FUSEDRNN_DEVICE Element* operands(int k, int chunk) const {
    return operands_ + buffer(k, chunk) * Traits::kChunkRows * Traits::kOperandStride;
  }
  /// Where a unit's rows 2 row_pair and 2 row_pair + 1 lie, and whether they are swapped. A warp
  /// that reads one row of 32 units uses all banks.
  static FUSEDRNN_DEVICE int offset(int unit, int row_pair) {
    return unit % Traits::kUnits * Traits::kChunkRows + 2 * (row_pair ^ (unit / 4 % 4));
  }
  static FUSEDRNN_DEVICE bool swapped(int unit) { return unit / 16 % 2; }
  /// The first unit in the layer of the warp's m-th tile.
  static FUSEDRNN_DEVICE int first_of_tile(int m) {
    return threadIdx.x / kWarp * Traits::kWarpUnits + m * Traits::kTileUnits;
  }

  /// The CTAs that have a warp's units.
  static constexpr int kCtaUnits = Traits::kUnits;
  static constexpr int kReceivers = (Traits::kWarpUnits + kCtaUnits - 1) / kCtaUnits;
  struct Receiver {
    bool exists;
    Remote<float> partials;  ///< where the lane's first result goes in the first buffer
    Remote<TransactionBarrier> barriers;
  };

  float* carried_memory_;
  Element* operands_;
  float* partials_;
  TransactionBarrier* barrier_memory_;
  ChunkBarriers barriers_;
  Receiver receiver_[kReceivers];
  int b_offset_;         ///< the lane's first operands in a chunk's
  int store_offset_;     ///< the pair's first operand in a chunk's
  int received_offset_;  ///< the pair's partial dh from the first CTA in a chunk's
  int received_ = 0;     ///< the same in all
  int second_;           ///< from the place of a unit's partial dh to that of the unit 8 further on
};

}  // namespace fusedrnn::cuda
