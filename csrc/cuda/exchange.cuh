// How a persistent kernel's threads divide a layer, and how a step hands its results to the next
// step's GEMM: the exchanges' common parts.
//
// An exchange is a thread's view of its CTA. Traits has the sizes. All threads call
//
//   load<Weight>(gemm, ...)            reads the thread's part of weight_hh into registers
//   store(k, chunk, values)            the pairs' operands for the k-th GEMM: h or gate gradients
//   commit(gemm, k, chunk)             publishes a chunk whose stores are all done
//   wait(k, chunk)                     waits for a chunk's operands for the k-th GEMM
//   multiply(gemm, k, chunk, results)  the GEMM: the pairs' results
//
// The first GEMM is k = 0. Stores for k = steps are never read. The exchange is double-buffered by
// k % 2. Waiting for step k - 1 proves that every CTA has finished reading step k - 2, so its
// buffer may be overwritten. A grid's exchange has slots instead (exchange_grid.cuh).
#pragma once

#include "mma.cuh"
#include "params.h"

namespace fusedrnn::cuda {

/// Text that kernels can read.
struct Text {
  char chars[64] = "";
  int size = 0;
  FUSEDRNN_INLINE constexpr Text& operator+=(const char* more) {
    while (*more) chars[size++] = *more++;
    return *this;
  }
};
template <class Cell, class Traits, bool kBackward>
constexpr Text kernel_name_text() {
  using Element = typename Traits::Element;
  Text text;
  text += Cell::kName;
  if (kBackward) text += "_backward";
  text += std::is_base_of_v<UsesClusters, Traits> ? ", persistent_cluster" : ", persistent_grid";
  text += std::is_same_v<Element, BFloat16>  ? ", BFloat16"
          : std::is_same_v<Element, Float16> ? ", Half"
                                             : ", Float";
  return text;
}
/// The name of a kernel whose CTAs wait for each other, as "lstm_backward, persistent_grid, Half".
/// It is a constant of the device. The address of a kernel's argument would cost a step dozens of
/// instructions: after that the compiler loads all arguments anew at each barrier.
template <class Cell, class Traits, bool kBackward>
FUSEDRNN_DEVICE const char* kernel_name() {
  static constexpr Text text = kernel_name_text<Cell, Traits, kBackward>();
  return text.chars;
}

template <class T>
FUSEDRNN_DEVICE T value_or_zero(const T* p, int64_t i) {
  return p ? p[i] : T(0);
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

/// Values that a thread carries from step to step for each of its pairs: in registers where a tile
/// is one chunk, else in shared memory.
constexpr int kCarried = 3;
template <int kPairs, int kThreads, bool kInRegisters>
class Carried {
 public:
  FUSEDRNN_DEVICE explicit Carried(float* memory) : memory_(memory) {}
  FUSEDRNN_DEVICE float& at(int chunk, int pair, int value) {
    return memory_[((chunk * kPairs + pair) * kCarried + value) * kThreads + threadIdx.x];
  }
  static constexpr int floats(int chunks) { return chunks * kPairs * kCarried * kThreads; }

 private:
  float* memory_;
};
template <int kPairs, int kThreads>
class Carried<kPairs, kThreads, true> {
 public:
  FUSEDRNN_DEVICE explicit Carried(float*) {}
  FUSEDRNN_DEVICE float& at(int, int pair, int value) { return values_[pair][value]; }
  static constexpr int floats(int) { return 0; }

 private:
  float values_[kPairs][kCarried];
};

/// A batch row and a hidden unit that one thread works on.
struct Pair {
  int chunk_row, tile_row;  ///< the row's index in its chunk and in the tile
  int unit;                 ///< in the CTA
  bool is_owned;            ///< false: the thread has nothing to do
};

/// A CTA's rows, and the order of its steps. Traits: kUnits per CTA; kChunkRows, the batch rows of
/// one GEMM; kOneChunk, whether all rows of a tile are one chunk.
template <class Traits>
class Tile {
 public:
  FUSEDRNN_DEVICE explicit Tile(const PersistentParams& params)
      : params_(params),
        direction(blockIdx.z),
        first_row(blockIdx.y * params.tile_rows),
        first_unit(blockIdx.x * Traits::kUnits) {}

  /// The chunks that have batch rows.
  FUSEDRNN_DEVICE int chunks() const {
    if constexpr (Traits::kOneChunk) return 1;
    const int rows = params_.rows - first_row;
    return ((rows < params_.tile_rows ? rows : params_.tile_rows) + Traits::kChunkRows - 1) /
           Traits::kChunkRows;
  }
  FUSEDRNN_DEVICE int rows_of(int chunk) const {
    const int rows = params_.rows - first_row - chunk * Traits::kChunkRows;
    return rows < Traits::kChunkRows ? rows : Traits::kChunkRows;
  }
  FUSEDRNN_DEVICE bool exists(const Pair& p) const {
    return p.is_owned && first_row + p.tile_row < params_.rows &&
           first_unit + p.unit < params_.hidden_size;
  }

  /// A pair's row is active in the steps before this time; in none if the pair does not exist.
  FUSEDRNN_DEVICE int length(const Pair& p) const {
    if (!exists(p)) return 0;
    const int row = first_row + p.tile_row;
    if (params_.lengths) return int(params_.lengths[row]);
    if (!params_.step_offset) return params_.steps;
    int active = 0, inactive = params_.steps;  // batch sizes never increase: a binary search
    while (active < inactive) {
      const int t = (active + inactive) / 2;
      if (row < params_.step_offset[t + 1] - params_.step_offset[t]) {
        active = t + 1;
      } else {
        inactive = t;
      }
    }
    return active;
  }
  /// The time of this direction's i-th step.
  FUSEDRNN_DEVICE int time(int i) const { return direction ? params_.steps - 1 - i : i; }
  /// The tile's first token in the i-th step; of an existing step's row 0 if there is none.
  FUSEDRNN_DEVICE int64_t token(int i) const {
    const int last = params_.steps - 1, t = time(i < 0 ? 0 : i > last ? last : i);
    return (params_.step_offset ? params_.step_offset[t] : int64_t(t) * params_.rows) + first_row;
  }

  /// Set by the kernel, for the errors of waits.
  const char* kernel_name = "";

 protected:
  FUSEDRNN_DEVICE Waiter waiter() const { return {kernel_name, params_.hidden_size, params_.rows}; }
  const PersistentParams& params_;

 public:
  const int direction, first_row, first_unit;
};

/// Elements between rows of `k` operands in shared memory: an odd multiple of 64 bytes. Rows then
/// begin in other banks (operand_offset).
template <class Element>
constexpr int operand_stride(int k) {
  const int bytes = k * int(sizeof(Element)), over = bytes % 128;
  return (bytes + (over <= 64 ? 64 - over : 192 - over)) / int(sizeof(Element));
}

// ---- results in fragments -----------------------------------------------------------------------

/// Sizes of a GEMM by tensor cores whose results stay in the lanes' fragments.
///
/// A CTA has kGroups groups of 8 kBlocks units. Each group has kSplits warps that share K (split-K)
/// and trade their sums. A unit's kResults rows of A are in different row groups, so one lane gets
/// them all. A lane's fragments have the pairs of its units and of two rows in each eight.
template <class Gemm_, int kResults_, int kBlocks_, int kGroups_, int kSplits_, int kChunkRows_,
          bool kOneChunk_>
struct FragmentTraits {
  using Gemm = Gemm_;
  using Element = typename Gemm::Element;
  using Operand = typename Gemm::Operand;
  static constexpr int kResults = kResults_, kBlocks = kBlocks_, kGroups = kGroups_;
  static constexpr int kSplits = kSplits_, kChunkRows = kChunkRows_;
  static constexpr bool kOneChunk = kOneChunk_, kOwnUnitsAlone = false;
  static constexpr bool kInFragments = true;
  static constexpr int kGateRun = 0;
  static constexpr int kThreads = kWarp * kGroups * kSplits;
  static constexpr int kUnits = 8 * kBlocks * kGroups;
  static constexpr int kK = kSplits * Gemm::kK;
  static constexpr int kFragmentPairs = kBlocks * 2 * (kChunkRows / 8);
  static constexpr int kPairs = kFragmentPairs < kSplits ? 1 : kFragmentPairs / kSplits;
  static constexpr int kThreadUnits = kSplits == 1 ? kBlocks : 1;  ///< that a thread works on
  static_assert(Gemm::kRowGroups == kBlocks * kResults && kChunkRows % 8 == 0);
  static_assert(kSplits == 1 || kBlocks == 1 || kSplits % (2 * kBlocks) == 0);

  using Carried = cuda::Carried<kPairs, kThreads, kOneChunk>;

  /// A pair's results on their way to the warp that owns the pair.
  struct alignas(kResults == 1 ? 4 : kResults == 2 ? 8 : 16) Traded {
    float result[kResults == 3 ? 4 : kResults];
  };
  /// Two buffers: the warps of a group may be one GEMM apart.
  static constexpr int kTraded = kSplits == 1 ? 0 : kThreads * kSplits * kPairs;

  struct WorkStorage : SharedLayout {
    FUSEDRNN_INLINE explicit WorkStorage(int tile_rows)
        : traded(add<Traded>(2 * kTraded)),
          carried(add<float>(Carried::floats(tile_rows / kChunkRows))) {}
    int traded;  ///< [2, kGroups, kSplits (to), kSplits (from), kPairs, kWarp]
    int carried;
  };
  template <class Traits>
  class Work;
};

template <class Gemm_, int kResults_, int kBlocks_, int kGroups_, int kSplits_, int kChunkRows_,
          bool kOneChunk_>
template <class Traits>
class FragmentTraits<Gemm_, kResults_, kBlocks_, kGroups_, kSplits_, kChunkRows_, kOneChunk_>::Work
    : public Tile<Traits> {
 public:
  FUSEDRNN_DEVICE Work(const PersistentParams& params, unsigned char* memory, const WorkStorage& at)
      : Tile<Traits>(params),
        traded_(reinterpret_cast<Traded*>(memory + at.traded)),
        carried_memory_(reinterpret_cast<float*>(memory + at.carried)) {}

  FUSEDRNN_DEVICE float* carried_memory() const { return carried_memory_; }

  /// The thread's i-th pair in a chunk, i < kPairs.
  FUSEDRNN_DEVICE Pair pair(int chunk, int i) const {
    const int lane = threadIdx.x % kWarp, v = kSplits == 1 ? i : split() + i * kSplits;
    Pair p;
    p.chunk_row = v / 2 / kBlocks * 8 + lane % 4 * 2 + v % 2;
    p.tile_row = chunk * kChunkRows + p.chunk_row;
    p.unit = (group() * kBlocks + v / 2 % kBlocks) * 8 + lane / 4;
    p.is_owned = v < kFragmentPairs;
    return p;
  }
  /// Which of its units a thread's i-th pair has.
  static constexpr int unit_of_pair(int i) { return kSplits == 1 ? i / 2 % kBlocks : 0; }

  /// weight.row(unit, result): a row of A. Transposed: weight.load() as columns for
  /// load_transposed.
  template <class Weight>
  FUSEDRNN_DEVICE void load(Gemm& gemm, const Weight& weight) const {
    const int first = this->first_unit + group() * kBlocks * 8;
    if constexpr (Weight::kTransposed) {
      constexpr int kScratch = Gemm::kTransposedBytes / int(sizeof(Traded));
      static_assert(kThreads / kWarp * kScratch <= 2 * kTraded);
      gemm.load_transposed(weight, first, split() * Gemm::kK,
                           traded_ + threadIdx.x / kWarp * kScratch);
      sync_cta();  // the traded results take the place of the scratch memory
    } else {
      const int own = first + threadIdx.x % kWarp / 4;
      gemm.load(
          [&](auto row_group) {
            return weight.row(own + row_group / kResults * 8, row_group % kResults);
          },
          split() * Gemm::kK);
    }
  }

 protected:
  static FUSEDRNN_DEVICE int split() { return threadIdx.x / kWarp % kSplits; }
  static FUSEDRNN_DEVICE int group() { return threadIdx.x / kWarp / kSplits; }

  /// Multiplies a chunk whose operands begin at `rows`, `stride` apart.
  template <template <class> class B>
  FUSEDRNN_DEVICE void multiply_rows(const Gemm& gemm, const Operand* rows, int stride,
                                     float (&results)[kPairs][kResults]) {
    multiply_operand(gemm, B<Operand>{rows + split() * Gemm::kK, stride}, results);
  }
  /// Multiplies B's part of K that is the warp's own.
  template <class B>
  FUSEDRNN_DEVICE void multiply_operand(const Gemm& gemm, const B& b,
                                        float (&results)[kPairs][kResults]) {
    float c[kChunkRows / 8][Gemm::kTiles][4] = {};
    gemm.accumulate(b, c);
    const auto result = [&](auto v, auto g) {
      return gemm.result(c, v / 2 / kBlocks, v / 2 % kBlocks * kResults + g, v % 2);
    };
    if constexpr (kSplits == 1) {
      unroll<kPairs>(
          [&](auto i) { unroll<kResults>([&](auto g) { results[i][g] = result(i, g); }); });
    } else {
      trade(result, results);
    }
  }

 private:
  /// Each warp of a group owns every kSplits-th pair, and gets its results from the others.
  template <class Result>
  FUSEDRNN_DEVICE void trade(const Result& result, float (&results)[kPairs][kResults]) {
    const int lane = threadIdx.x % kWarp, own = split();
    const auto traded = [&](int to, int from, int i) -> Traded& {
      return traded_[(((group() * kSplits + to) * kSplits + from) * kPairs + i) * kWarp + lane];
    };
    if constexpr (kFragmentPairs < kSplits) {
      unroll<kResults>([&](auto g) { results[0][g] = 0; });
    }
    unroll<kSplits>([&](auto to) {
      unroll<kPairs>([&](auto i) {
        constexpr int v = to + i * kSplits;
        if constexpr (v < kFragmentPairs) {
          if (to == own) {
            unroll<kResults>(
                [&](auto g) { results[i][g] = result(std::integral_constant<int, v>{}, g); });
          } else {
            Traded t;
            unroll<kResults>(
                [&](auto g) { t.result[g] = result(std::integral_constant<int, v>{}, g); });
            traded(to, own, i) = t;
          }
        }
      });
    });
    sync_threads(1 + group(), kSplits * kWarp);
    unroll<kSplits - 1>([&](auto n) {
      unroll<kPairs>([&](auto i) {
        if (own + i * kSplits < kFragmentPairs) {
          const Traded t = traded(own, own ^ (n + 1), i);
          unroll<kResults>([&](auto g) { results[i][g] += t.result[g]; });
        }
      });
    });
    // The other buffer is for the next GEMM.
    traded_ += is_second_ ? -kTraded : kTraded;
    is_second_ = !is_second_;
  }

  Traded* traded_;
  float* carried_memory_;
  bool is_second_ = false;
};

// ---- partial sums in shared memory --------------------------------------------------------------

/// Sizes of a GEMM whose partial sums go through shared memory.
///
/// A CTA has kBlocks blocks of 16 units. Each block has kSplits warps that share K (split-K). A's
/// rows are the block's kResults rows of each unit, all units' first row first.
template <class Gemm_, int kBlocks_, int kSplits_, int kChunkRows_, bool kOneChunk_>
struct PartialSumTraits {
  using Gemm = Gemm_;
  using Element = typename Gemm::Element;
  using Operand = Element;
  static constexpr int kResults = Gemm::kTiles;
  static constexpr int kBlocks = kBlocks_, kSplits = kSplits_, kChunkRows = kChunkRows_;
  static constexpr bool kOneChunk = kOneChunk_, kOwnUnitsAlone = false;
  static constexpr bool kInFragments = false;
  static constexpr int kGateRun = 0;
  static constexpr int kBlockUnits = 16;
  static constexpr int kThreads = kWarp * kBlocks * kSplits;
  static constexpr int kUnits = kBlockUnits * kBlocks;
  static constexpr int kK = kSplits * Gemm::kK;
  /// Per thread and chunk. If there are more threads than pairs, some have none.
  static constexpr int kPairs = (kChunkRows * kUnits + kThreads - 1) / kThreads;
  static constexpr int kThreadUnits = 1;
  static_assert((kPairs == 1 || kChunkRows * kUnits % kThreads == 0) && kThreads % kUnits == 0);

  using Carried = cuda::Carried<kPairs, kThreads, kOneChunk>;

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

  struct WorkStorage : SharedLayout {
    FUSEDRNN_INLINE explicit WorkStorage(int tile_rows)
        : partials(add<float>(kPartialFloats)),
          scratch(add<float>(kWarps * Gemm::kScratchFloats)),
          carried(add<float>(Carried::floats(tile_rows / kChunkRows))) {}
    int partials, scratch, carried;
  };
  template <class Traits>
  class Work;
};

/// A thread adds the partial sums of its unit and row in a fixed order.
template <class Gemm_, int kBlocks_, int kSplits_, int kChunkRows_, bool kOneChunk_>
template <class Traits>
class PartialSumTraits<Gemm_, kBlocks_, kSplits_, kChunkRows_, kOneChunk_>::Work
    : public Tile<Traits> {
 public:
  FUSEDRNN_DEVICE Work(const PersistentParams& params, unsigned char* memory, const WorkStorage& at)
      : Tile<Traits>(params),
        partials_(reinterpret_cast<float*>(memory + at.partials)),
        scratch_(reinterpret_cast<float*>(memory + at.scratch)),
        carried_memory_(reinterpret_cast<float*>(memory + at.carried)) {}

  FUSEDRNN_DEVICE float* carried_memory() const { return carried_memory_; }

  /// The thread's i-th pair in a chunk, i < kPairs. All its pairs have the same unit.
  FUSEDRNN_DEVICE Pair pair(int chunk, int i) const {
    Pair p;
    p.chunk_row = (threadIdx.x + i * kThreads) / kUnits;
    p.tile_row = chunk * kChunkRows + p.chunk_row;
    p.unit = threadIdx.x % kUnits;
    p.is_owned = p.chunk_row < kChunkRows;
    return p;
  }
  static constexpr int unit_of_pair(int) { return 0; }

  /// weight.row(unit, result): a row of A.
  template <class Weight>
  FUSEDRNN_DEVICE void load(Gemm& gemm, const Weight& weight) const {
    const int warp = threadIdx.x / kWarp;
    const int first = this->first_unit + warp / kSplits * kBlockUnits;
    gemm.load([&](int row) { return weight.row(first + row % 16, row / 16); },
              warp % kSplits * Gemm::kK,
              reinterpret_cast<unsigned char*>(partials_) + warp * Gemm::kLoadScratchBytes);
    sync_cta();  // the partial sums take the place of the scratch memory
  }

 protected:
  static FUSEDRNN_DEVICE int split() { return threadIdx.x / kWarp % kSplits; }

  template <template <class> class B>
  FUSEDRNN_DEVICE void multiply_rows(const Gemm& gemm, const Operand* rows, int stride,
                                     float (&results)[kPairs][kResults]) const {
    multiply_operand(gemm, B<Operand>{rows + split() * Gemm::kK, stride}, results);
  }
  /// Multiplies B's part of K that is the warp's own.
  template <class B>
  FUSEDRNN_DEVICE void multiply_operand(const Gemm& gemm, const B& b,
                                        float (&results)[kPairs][kResults]) const {
    const int warp = threadIdx.x / kWarp, block = warp / kSplits;
    gemm.template multiply<kChunkRows>(b, partials_ + split() * kSplitStride + block * kBlockStride,
                                       kRowStride, scratch_ + warp * Gemm::kScratchFloats);
    sync_cta();
    unroll<kPairs>([&](auto i) {
      const Pair p = pair(0, i);
      unroll<kResults>([&](auto g) { results[i][g] = 0; });
      if (!p.is_owned) return;
      const float* at = partials_ + p.chunk_row * kRowStride + p.unit / kBlockUnits * kBlockStride +
                        p.unit % kBlockUnits;
      unroll<kResults>([&](auto g) {
        float sum = at[16 * g];
#pragma unroll
        for (int s = 1; s < kSplits; ++s) sum += at[16 * g + s * kSplitStride];
        results[i][g] = sum;
      });
    });
  }

 private:
  float* partials_;
  float* scratch_;
  float* carried_memory_;
};

/// Rounds a pair's values to its operands in a row of the exchange. K has kParts equal parts;
/// values[i] belongs to the i-th. place(k): where the row has operand k.
template <class Traits, int kParts, class Place>
FUSEDRNN_DEVICE void store_operands(int unit, const float (&values)[kParts], const Place& place) {
  unroll<kParts>([&](auto part) {
    Traits::Gemm::set_operand(*place(part * (Traits::kK / kParts) + unit), values[part]);
  });
}

}  // namespace fusedrnn::cuda
