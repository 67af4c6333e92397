// How a persistent kernel's threads divide a layer, and how a step hands its results to the next
// step's GEMM: the exchanges' common parts.
//
// An exchange is a thread's view of its CTA. Traits has the sizes. All threads call
//
//   load<Weight>(gemm, ...)         reads the thread's part of weight_hh into registers
//   store(k, chunk, pair, values)   a pair's operands for the k-th GEMM: h or gate gradients
//   commit(gemm, k, chunk)          publishes a chunk whose stores are all done
//   wait(gemm, k, chunk)            waits for a chunk's k-th GEMM
//   read(pair, gate)                a pair's result from the latest GEMM
//
// The first GEMM is k = 0. Stores for k = steps are never read. The exchange is double-buffered by
// k % 2. Waiting for step k - 1 proves that every CTA has finished reading step k - 2, so its
// buffer may be overwritten.
#pragma once

#include "mma.cuh"
#include "params.h"

namespace fusedrnn::cuda {

/// Floats that a CTA carries from step to step for each row and unit.
constexpr int kCarried = 2;

template <class Element>
FUSEDRNN_DEVICE float value_or_zero(const Element* p, int64_t i) {
  return p ? value_of(p[i]) : 0.f;
}

/// Byte offsets for consecutive arrays in shared memory.
struct SharedLayout {
  int bytes = 0;
  template <class T>
  FUSEDRNN_INLINE constexpr int add(int count) {
    const int offset = bytes;
    bytes += count * int(sizeof(T));
    return offset;
  }
};

/// A CTA's rows and units, divided among its threads. Traits: kThreads; kUnits per CTA; kChunkRows,
/// the batch rows of one GEMM.
template <class Traits>
class Tile {
 public:
  FUSEDRNN_DEVICE Tile(const PersistentParams& params, float* carried)
      : params_(params),
        direction(blockIdx.z),
        first_row(blockIdx.y * params.tile_rows),
        first_unit(blockIdx.x * Traits::kUnits),
        carried_(carried) {}

  /// A batch row and a hidden unit that one thread works on.
  struct Pair {
    int chunk_row, tile_row;  ///< the row's index in its chunk and in the tile
    int row;                  ///< in the batch
    int unit;                 ///< the same for all the thread's pairs
    bool exists;
  };
  /// This thread's i-th pair in a chunk, i < Traits::kPairs.
  FUSEDRNN_DEVICE Pair pair(int chunk, int i) const {
    Pair pair;
    pair.chunk_row = (threadIdx.x + i * Traits::kThreads) / Traits::kUnits;
    pair.tile_row = chunk * Traits::kChunkRows + pair.chunk_row;
    pair.row = first_row + pair.tile_row;
    pair.unit = first_unit + threadIdx.x % Traits::kUnits;
    pair.exists = pair.row < params_.rows && pair.unit < params_.hidden_size;
    return pair;
  }
  /// The chunks that have batch rows.
  FUSEDRNN_DEVICE int chunks() const {
    const int rows = params_.rows - first_row;
    return ((rows < params_.tile_rows ? rows : params_.tile_rows) + Traits::kChunkRows - 1) /
           Traits::kChunkRows;
  }
  FUSEDRNN_DEVICE int rows_of(int chunk) const {
    const int rows = params_.rows - first_row - chunk * Traits::kChunkRows;
    return rows < Traits::kChunkRows ? rows : Traits::kChunkRows;
  }

  /// The i-th value that the CTA carries for a pair, i < kCarried.
  FUSEDRNN_DEVICE float& carried(const Pair& p, int i) const {
    return carried_[(i * params_.tile_rows + p.tile_row) * Traits::kUnits +
                    threadIdx.x % Traits::kUnits];
  }

  /// The time of this direction's i-th step.
  FUSEDRNN_DEVICE int time(int i) const { return direction ? params_.steps - 1 - i : i; }
  /// Batch row 0's token at step t.
  FUSEDRNN_DEVICE int64_t step_offset(int t) const {
    return params_.step_offset ? params_.step_offset[t] : int64_t(t) * params_.rows;
  }
  FUSEDRNN_DEVICE bool is_active(int row, int t) const {
    if (t < 0 || t >= params_.steps) return false;
    if (params_.lengths) return t < params_.lengths[row];
    return !params_.step_offset || row < params_.step_offset[t + 1] - params_.step_offset[t];
  }

 protected:
  const PersistentParams& params_;

 public:
  const int direction, first_row, first_unit;

 protected:
  float* carried_;
};

/// Elements between rows of `k` operands in shared memory: an odd multiple of 64 bytes. The lanes
/// of an mma then load their 16 bytes from different banks.
template <class Element>
constexpr int operand_stride(int k) {
  const int bytes = k * int(sizeof(Element)), over = bytes % 128;
  return (bytes + (over <= 64 ? 64 - over : 192 - over)) / int(sizeof(Element));
}

// ---- all-gather ---------------------------------------------------------------------------------

/// Sizes of an exchange in which every CTA reads the operands of all hidden units.
///
/// A CTA has kBlocks blocks of 16 units. Each block has kSplits warps that share K (split-K).
/// Forward, A's rows are the block's gates, kTiles = G, and K is all units' h. Backward, A's rows
/// are the block's units and K is all units' gate gradients.
template <class Gemm_, int kBlocks_, int kSplits_, int kChunkRows_>
struct AllGatherTraits {
  using Gemm = Gemm_;
  using Element = typename Gemm::Element;
  static constexpr int kBlocks = kBlocks_, kSplits = kSplits_, kChunkRows = kChunkRows_;
  static constexpr int kBlockUnits = 16;
  static constexpr int kThreads = kWarp * kBlocks * kSplits;
  static constexpr int kUnits = kBlockUnits * kBlocks;
  static constexpr int kK = kSplits * Gemm::kK;
  static constexpr int kPairs = kChunkRows * kUnits / kThreads;  ///< per thread and chunk
  static_assert(kChunkRows * kUnits % kThreads == 0 && kThreads % kUnits == 0);

  /// Strides of the partial sums [kSplits, kChunkRows, kBlocks, kBlockRows]. They spread a warp's
  /// stores, and its loads from two blocks, over all banks.
  static constexpr int kBlockRows = 16 * Gemm::kTiles;
  static constexpr int kBlockStride =
      kBlockRows % 32 == 0 && kBlocks > 1 ? kBlockRows + 16 : kBlockRows;
  static constexpr int kRowStride = kBlocks * kBlockStride + 4;
  static constexpr int kSplitStride = kChunkRows * kRowStride;
  /// While weights are loaded, their scratch memory lies where the partial sums will be.
  static constexpr int kWarps = kBlocks * kSplits;
  static constexpr int kLoadFloats = kWarps * Gemm::kLoadScratchBytes / int(sizeof(float));
  static constexpr int kPartialFloats =
      kSplits * kSplitStride > kLoadFloats ? kSplits * kSplitStride : kLoadFloats;

  /// The part of shared memory that every all-gather has.
  struct GemmStorage : SharedLayout {
    FUSEDRNN_INLINE explicit GemmStorage(int tile_rows)
        : partials(add<float>(kPartialFloats)),
          scratch(add<float>(kWarps * Gemm::kScratchFloats)),
          carried(add<float>(kCarried * tile_rows * kUnits)),
          carried_floats(kCarried * tile_rows * kUnits) {}
    int partials, scratch, carried;
    int carried_floats;  ///< `carried`'s size; an exchange adds its own arrays behind it
  };
};

/// The GEMM of an all-gather. Its split-K reduction goes through shared memory: a thread adds the
/// partial sums of its unit and row in a fixed order.
template <class Traits>
class AllGatherGemm : public Tile<Traits> {
 public:
  using Element = typename Traits::Element;
  using Gemm = typename Traits::Gemm;
  using typename Tile<Traits>::Pair;

  FUSEDRNN_DEVICE AllGatherGemm(const PersistentParams& params, unsigned char* memory,
                                const typename Traits::GemmStorage& at)
      : Tile<Traits>(params, reinterpret_cast<float*>(memory + at.carried)),
        partials_(reinterpret_cast<float*>(memory + at.partials)),
        scratch_(reinterpret_cast<float*>(memory + at.scratch)) {}

  /// Weight's constructor takes the first unit and first k of the warp's part, 0 and `args`.
  template <class Weight, class... Args>
  FUSEDRNN_DEVICE void load(Gemm& gemm, const Args&... args) const {
    const int warp = threadIdx.x / kWarp;
    const Weight weight{this->first_unit + warp / Traits::kSplits * Traits::kBlockUnits,
                        warp % Traits::kSplits * Gemm::kK, 0, args...};
    gemm.load(weight, reinterpret_cast<unsigned char*>(partials_) + warp * Gemm::kLoadScratchBytes);
    sync_cta();  // the partial sums take the place of the scratch memory
  }

  FUSEDRNN_DEVICE float read(const Pair& p, int gate) const {
    const int unit = threadIdx.x % Traits::kUnits, block = unit / Traits::kBlockUnits;
    const float* at = partials_ + p.chunk_row * Traits::kRowStride + block * Traits::kBlockStride +
                      gate * 16 + unit % Traits::kBlockUnits;
    float sum = at[0];
#pragma unroll
    for (int split = 1; split < Traits::kSplits; ++split) sum += at[split * Traits::kSplitStride];
    return sum;
  }

 protected:
  /// Multiplies a chunk whose operands begin at `rows`, kStride apart.
  template <class Operand, int kStride>
  FUSEDRNN_DEVICE void multiply(const Gemm& gemm, const Element* rows) const {
    const int warp = threadIdx.x / kWarp, block = warp / Traits::kSplits;
    const int split = warp % Traits::kSplits;
    gemm.template multiply<Traits::kChunkRows>(
        Operand{rows + split * Gemm::kK, kStride},
        partials_ + split * Traits::kSplitStride + block * Traits::kBlockStride, Traits::kRowStride,
        scratch_ + warp * Gemm::kScratchFloats);
    sync_cta();
  }

  /// Orders a chunk's stores before later loads, and its reads before the next GEMM's partial sums.
  /// Nothing follows the last step's last chunk.
  FUSEDRNN_DEVICE void sync_chunk(int k, bool is_last) const {
    if (!is_last || k < this->params_.steps) sync_cta();
  }

  /// Rounds a pair's values to its operands, in a row of the exchange at the CTA's first unit. K
  /// has kParts equal parts; values[i] belongs to the i-th.
  template <int kParts>
  static FUSEDRNN_DEVICE void store_operands(Element* row, const float (&values)[kParts]) {
    unroll<kParts>([&](auto part) {
      Gemm::set_operand(row[part * (Traits::kK / kParts) + threadIdx.x % Traits::kUnits],
                        values[part]);
    });
  }

  float* partials_;
  float* scratch_;
};

}  // namespace fusedrnn::cuda
