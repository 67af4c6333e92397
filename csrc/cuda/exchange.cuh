// How a persistent kernel's threads divide a layer, and how a step hands its results to the next
// step's GEMM: the exchanges' common parts.
//
// An exchange is a thread's view of its CTA. Traits has the sizes. All threads call
//
//   load<Weight>(gemm, ...)            reads the thread's part of weight_hh into registers
//   store(k, chunk, values)            the pairs' operands for the k-th GEMM: h or gate gradients
//   commit(gemm, k, chunk)             publishes a chunk whose stores are all done
//   wait(k, chunk)                     waits for a chunk's operands for the k-th GEMM
//   multiply(gemm, k, chunk, results)  the GEMM: adds to the pairs' results
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

/// p + count * size, one multiply-add if the bytes of `size` are 32 bits wide.
template <class T>
FUSEDRNN_DEVICE T* advance(T* p, unsigned count, unsigned size = 1) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  const unsigned bytes = size * unsigned(sizeof(T));
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(p) + uint64_t(count) * bytes);
}

/// The element of a thread's first pair in an array of tokens [N, stride].
template <class T>
class TokenPlace {
 public:
  /// p: null for an array that nobody uses. offset: of the element from its tile's first token.
  FUSEDRNN_DEVICE TokenPlace(T* p, int64_t offset, int64_t stride)
      : p_(kept(p ? p + offset : nullptr)), bytes_(kept(unsigned(stride * sizeof(T)))) {}
  /// In the tile that begins with `token`.
  FUSEDRNN_DEVICE T* at(int token) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(p_) + uint64_t(unsigned(token)) * bytes_);
  }

 private:
  T* p_;
  unsigned bytes_;  ///< a token
};

/// The gate and the unit in the CTA, or in the layer, that an operand in K belongs to.
struct KPlace {
  int gate, unit;
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
        first_unit(blockIdx.x * Traits::kUnits),
        rows_(kept(params.rows - first_row < params.tile_rows ? params.rows - first_row
                                                              : params.tile_rows)) {}

  static FUSEDRNN_DEVICE int tile_rows(const PersistentParams& params) {
    return Traits::kOneChunk ? Traits::kChunkRows : params.tile_rows;
  }
  /// The chunks that have batch rows.
  FUSEDRNN_DEVICE int chunks() const {
    return Traits::kOneChunk ? 1 : (rows_ + Traits::kChunkRows - 1) / Traits::kChunkRows;
  }
  FUSEDRNN_DEVICE int rows_of(int chunk) const {
    const int rows = rows_ - chunk * Traits::kChunkRows;
    return rows < Traits::kChunkRows ? rows : Traits::kChunkRows;
  }
  FUSEDRNN_DEVICE bool exists(const Pair& p) const {
    return p.is_owned && p.tile_row < rows_ && first_unit + p.unit < params_.hidden_size;
  }

  /// A pair's row is active in the steps before this time; in none if the pair does not exist.
  FUSEDRNN_DEVICE int length(const Pair& p) const {
    if (!exists(p)) return 0;
    const int row = first_row + p.tile_row;
    if (params_.lengths) {
      const int64_t length = params_.lengths[row];
      return length < 0 ? 0 : length < params_.steps ? int(length) : params_.steps;
    }
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
  /// The tile's first token in the i-th step; any number if there is no such step.
  FUSEDRNN_DEVICE int token(int i) const {
    if (!params_.step_offset) return time(i) * params_.rows + first_row;
    return i < 0 || i >= params_.steps ? 0 : int(params_.step_offset[time(i)]) + first_row;
  }

  /// The tokens of all rows.
  FUSEDRNN_DEVICE int tokens() const {
    return params_.step_offset ? int(params_.step_offset[params_.steps])
                               : params_.steps * params_.rows;
  }

  /// Set by the kernel, for the errors of waits.
  const char* kernel_name = "";

 protected:
  FUSEDRNN_DEVICE Waiter waiter() const { return {kernel_name, params_.hidden_size, params_.rows}; }
  const PersistentParams& params_;

 public:
  const int direction, first_row, first_unit;

 private:
  int rows_;  ///< of the tile, in the batch
};

/// So many steps ahead a kernel asks for its values in memory. A read from an H200's memory takes
/// 0.6 to 1 us, and a step with its values in L2 0.3 to 1.2 us.
constexpr int kPrefetchSteps = 4;

/// Brings a step's values to L2: of each token kSegments segments of H values in an array of T, and
/// H values in one of U, or none if U is void. A thread has one sector in every kRowsAtOnce rows.
/// It also asks for the tokens behind a tile's last row: a check would take longer.
template <class Traits, int kSegments, class T, class U = void>
class StepPrefetch {
 public:
  /// first, second: token 0's values, `stride` values a token; null for none.
  template <class Tile>
  FUSEDRNN_DEVICE StepPrefetch(const Tile& e, int hidden_size, const T* first, int64_t stride,
                               const U* second = nullptr, int64_t second_stride = 0) {
    const int sector = threadIdx.x % kRowSectors;
    int unit = sector % kSectors<T> * kSectorValues<T>, segment = sector / kSectors<T>;
    place_ = first ? first + (segment * hidden_size + e.first_unit + unit) : nullptr;
    bytes_ = unsigned(stride * sizeof(T));
    if constexpr (!std::is_void_v<U>) {
      if (segment >= kSegments) {
        unit = (sector - kSegments * kSectors<T>)*kSectorValues<U>;
        place_ = second ? second + (e.first_unit + unit) : nullptr;
        bytes_ = unsigned(second_stride * sizeof(U));
      }
    }
    const bool has_sector =
        place_ && e.first_unit + unit < hidden_size && threadIdx.x < kRowsAtOnce * kRowSectors;
    row_ = kept(int(threadIdx.x) / kRowSectors);
    place_ = kept(place_);
    bytes_ = kept(bytes_);
    tokens_ = kept(has_sector ? e.tokens() : 0);
  }
  /// token: the chunk's first in the step; a negative one is a large number.
  FUSEDRNN_DEVICE void operator()(int token) const {
    unroll<kCount>([&](auto i) {
      const unsigned at = unsigned(token + row_ + i * kRowsAtOnce);
      if (at < unsigned(tokens_)) {
        prefetch_l2(static_cast<const char*>(place_) + uint64_t(at) * bytes_);
      }
    });
  }

 private:
  template <class Of>
  static constexpr int kSectorValues = 32 / sizeof(Of);
  template <class Of>
  static constexpr int kSectors = (Traits::kUnits + kSectorValues<Of> - 1) / kSectorValues<Of>;
  static constexpr int row_sectors() {
    if constexpr (std::is_void_v<U>)
      return kSegments * kSectors<T>;
    else
      return kSegments * kSectors<T> + kSectors<U>;
  }
  static constexpr int kRowSectors = row_sectors();
  static constexpr int kRowsAtOnce = Traits::kThreads / kRowSectors;
  static_assert(kRowsAtOnce > 0);
  static constexpr int kCount = (Traits::kChunkRows + kRowsAtOnce - 1) / kRowsAtOnce;

  const void* place_;
  int row_, tokens_;
  unsigned bytes_;  ///< a token
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
///
/// A tile of 4 / kBlocks rows or less (kFewRows) leaves columns of B free. They repeat its rows, so
/// that each of a row's four lanes gets another pair, instead of one lane all.
template <class Gemm_, int kResults_, int kBlocks_, int kGroups_, int kSplits_, int kChunkRows_,
          bool kOneChunk_>
struct FragmentTraits {
  using Gemm = Gemm_;
  using Element = typename Gemm::Element;
  using Operand = typename Gemm::Operand;
  static constexpr int kResults = kResults_, kBlocks = kBlocks_, kGroups = kGroups_;
  static constexpr int kSplits = kSplits_, kChunkRows = kChunkRows_;
  static constexpr bool kOneChunk = kOneChunk_, kOwnUnitsAlone = false, kInFragments = true;
  static constexpr int kThreads = kWarp * kGroups * kSplits;
  static constexpr int kUnits = 8 * kBlocks * kGroups;
  static constexpr int kK = kSplits * Gemm::kK;
  static constexpr bool kFewRows = kChunkRows < 8;
  static constexpr int kRowTiles = kFewRows ? 1 : kChunkRows / 8;
  static constexpr int kFragmentPairs = kBlocks * 2 * kRowTiles;
  static constexpr int kPairs = kFewRows || kFragmentPairs < kSplits ? 1 : kFragmentPairs / kSplits;
  static constexpr int kThreadUnits = kPairs == 1 ? 1 : kBlocks;  ///< that a thread works on
  /// Whether a lane's operands in a row are neighbours in K: all units' gate gradients.
  static constexpr bool kOperandsAreNeighbours = Gemm::kLoadScratchBytes > 0 && kSplits == 1;
  /// Whether half of the warps multiply first and half prepare first: nobody waits for other CTAs.
  static constexpr bool kHalvesTakeTurns = kOperandsAreNeighbours && kOneChunk;
  static_assert(Gemm::kRowGroups == kBlocks * kResults);
  static_assert(kFewRows ? kChunkRows * kBlocks == 4 && kSplits == 1 : kChunkRows % 8 == 0);
  static_assert(kSplits == 1 || kPairs == 1);

  using Carried = cuda::Carried<kPairs, kThreads, kOneChunk>;

  /// Rows and units from a thread's first pair to its i-th.
  static FUSEDRNN_INLINE constexpr int pair_row(int i) { return i / 2 / kBlocks * 8 + i % 2; }
  static FUSEDRNN_INLINE constexpr int pair_unit(int i) { return i / 2 % kBlocks * 8; }

  /// The part of K that belongs to a lane's units, and its inverse. Lanes change places so that
  /// their stores of 16 bytes use all banks.
  template <int kParts>
  static FUSEDRNN_INLINE constexpr int k_of(int group, int r) {
    return (group * 8 + r % 2 * 4 + r / 2) * kBlocks * kParts;
  }
  template <int kParts>
  static FUSEDRNN_INLINE constexpr KPlace place_of(int k) {
    static_assert(kOperandsAreNeighbours && kK == kUnits * kParts && kSplits == 1);
    const int lane = k / (kBlocks * kParts), r = lane % 4 * 2 + lane % 8 / 4;
    return {k % kParts, (lane / 8 * kBlocks + k / kParts % kBlocks) * 8 + r};
  }

  /// A pair's results on their way to the warp that owns the pair.
  struct alignas(kResults == 1 ? 4 : kResults == 2 ? 8 : 16) Traded {
    float result[kResults == 3 ? 4 : kResults];
  };
  /// Two buffers: the warps of a group may be one GEMM apart.
  static constexpr int kTraded = kSplits == 1 ? 0 : kThreads * kSplits * kPairs;

  struct WorkStorage : SharedLayout {
    FUSEDRNN_INLINE explicit WorkStorage(int tile_rows)
        : load_scratch(add<unsigned char>(kThreads / kWarp * Gemm::kLoadScratchBytes)),
          traded(add<Traded>(2 * kTraded)),
          carried(add<float>(Carried::floats(tile_rows / kChunkRows))) {}
    int load_scratch;
    int traded;  ///< [2, kGroups, kSplits (to), kSplits (from), kWarp]
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
        memory_(memory),
        load_scratch_(at.load_scratch),
        carried_(at.carried) {
    const int lane = threadIdx.x % kWarp;
    unroll<kRowTiles>([&](auto n) {
      const int row = kFewRows ? lane / 8 % kChunkRows : (8 * n + lane / 4) ^ row_flip();
      b_offset_[n] = kept(Traits::b_offset(row, lane % 4) + split() * Gemm::kK);
    });
    // traded [kGroups, kSplits (to), kSplits (from), kWarp]. from: relative to the owner's number.
    const auto traded = [&](int to, int from) {
      const int index = ((group() * kSplits + to) * kSplits + from) * kWarp + lane;
      return kept(at.traded + index * int(sizeof(Traded)));
    };
    if constexpr (kSplits > 1) {
      unroll<kSplits - 1>([&](auto n) { given_[n] = traded(split() ^ (n + 1), n + 1); });
      taken_ = traded(split(), 1);
    }
  }

  FUSEDRNN_DEVICE float* carried_memory() const {
    return reinterpret_cast<float*>(memory_ + carried_);
  }

  /// The thread's i-th pair in a chunk, i < kPairs.
  FUSEDRNN_DEVICE Pair pair(int chunk, int i) const {
    const int lane = threadIdx.x % kWarp, v = kSplits == 1 ? i : split();
    const int block = kFewRows ? lane % 4 / kChunkRows : v / 2 % kBlocks;
    Pair p;
    p.chunk_row = kFewRows ? lane % 4 % kChunkRows : v / 2 / kBlocks * 8 + lane % 4 * 2 + v % 2;
    p.tile_row = chunk * kChunkRows + p.chunk_row;
    p.unit = (group() * kBlocks + block) * 8 + lane / 4;
    p.is_owned = v < kFragmentPairs;
    return p;
  }

  /// weight.row(unit, result): a row of A. weight.words(unit, k): of a column, as in
  /// TransposedGemm.
  template <class Weight>
  FUSEDRNN_DEVICE void load(Gemm& gemm, const Weight& weight) const {
    const int first = this->first_unit + group() * kBlocks * 8;
    if constexpr (Gemm::kLoadScratchBytes > 0) {
      gemm.load(Part<Weight>{weight, split() * Gemm::kK, block_flip() * 8, weight.is_aligned},
                first, memory_ + load_scratch_ + threadIdx.x / kWarp * Gemm::kLoadScratchBytes);
    } else {
      const int own = first + threadIdx.x % kWarp / 4;
      gemm.load(
          [&](auto row_group) {
            return weight.row(own + (row_group / kResults ^ block_flip()) * 8,
                              row_group % kResults);
          },
          split() * Gemm::kK);
    }
  }

 protected:
  /// The k of a thread's first operand.
  template <int kParts>
  FUSEDRNN_DEVICE int own_k() const {
    const int k = k_of<kParts>(group(), threadIdx.x % kWarp / 4);
    return kFewRows ? k + pair(0, 0).unit / 8 % kBlocks * kParts : k;
  }
  /// Where a thread's first operand lies from the beginning of a chunk's.
  FUSEDRNN_DEVICE int first_offset(int stride) const {
    return operand_offset<Operand>(pair(0, 0).chunk_row, own_k<kK / kUnits>(), stride);
  }
  /// Stores a chunk's operands, whose rows begin at `rows`. first: first_offset().
  template <int kParts>
  FUSEDRNN_DEVICE void store_rows(const float (&values)[kPairs][kParts], Operand* rows, int stride,
                                  int first) const {
    const int chunk_row = pair(0, 0).chunk_row, k = own_k<kParts>();
    if constexpr (kFewRows) {
      store_neighbours(values[0], rows, chunk_row, k, stride, first);
    } else {
      static_assert(kPairs == 2 * kBlocks);
      unroll<2>([&](auto row) {
        float of_row[kBlocks * kParts];
        unroll<kBlocks * kParts>(
            [&](auto i) { of_row[i] = values[i / kParts * 2 + row][i % kParts]; });
        // Two neighbours from an even row on place their parts alike.
        store_neighbours(of_row, rows + row * stride, chunk_row, k, stride, first);
      });
    }
  }

  static FUSEDRNN_DEVICE int split() { return threadIdx.x / kWarp % kSplits; }
  static FUSEDRNN_DEVICE int group() { return threadIdx.x / kWarp / kSplits; }

  /// Warps that share K get their rows of B and blocks of A in other places: bits of their indices
  /// are flipped, so that the first of a lane's pairs is its own.
  static FUSEDRNN_DEVICE int row_flip() {
    return kSplits == 1 ? 0 : split() / 2 / kBlocks % kRowTiles * 8 + split() % 2;
  }
  static FUSEDRNN_DEVICE int block_flip() { return kSplits == 1 ? 0 : split() / 2 % kBlocks; }

  /// Multiplies a chunk whose operands begin at `rows` in shared memory.
  FUSEDRNN_DEVICE void multiply_rows(const Gemm& gemm, const Operand* rows,
                                     float (&results)[kPairs][kResults]) {
    const auto load = [&](auto j, auto n) {
      return SharedOperand<Operand>::load(rows + b_offset_[n] + j * Gemm::kPairK);
    };
    multiply_operand(gemm, EachOperand{load}, results);
  }
  /// Multiplies the warp's part of B.
  template <class B>
  FUSEDRNN_DEVICE void multiply_operand(const Gemm& gemm, const B& b,
                                        float (&results)[kPairs][kResults]) {
    float c[kRowTiles][Gemm::kTiles][4] = {};
    const auto each_pair = [&](const auto& f) {
      unroll<kPairs>(
          [&](auto v) { unroll<kResults>([&](auto g) { f(results[v][g], result_at(c, v, g)); }); });
    };
    constexpr bool kStartsFromResults = kSplits == 1 && !kFewRows && !Gemm::kScaled;
    if constexpr (kStartsFromResults) each_pair([](float r, float& sum) { sum = r; });
    gemm.accumulate(b, c);
    gemm.unscale(c);
    if constexpr (kSplits > 1) trade(c);
    if constexpr (kFewRows && kBlocks == 2) {
      const bool is_second = threadIdx.x % 4 / 2;
      unroll<kResults>([&](auto g) {
        result_at(c, 0, g) = is_second ? result_at(c, 2, g) : result_at(c, 0, g);
      });
    }
    each_pair([](float& r, float sum) { r = kStartsFromResults ? sum : r + sum; });
  }

 private:
  /// A warp's part of K, for TransposedGemm.
  template <class Weight>
  struct Part {
    const Weight& weight;
    int first_k, unit_flip;
    bool is_aligned;
    template <bool kAligned>
    FUSEDRNN_DEVICE Words words(int unit, int k) const {
      return weight.template words<kAligned>(unit ^ unit_flip, first_k + k);
    }
  };

  using Fragments = float[kRowTiles][Gemm::kTiles][4];
  /// Result g of the lane's pair v.
  static FUSEDRNN_DEVICE float& result_at(Fragments& c, int v, int g) {
    const int group = v / 2 % kBlocks * kResults + g;
    return c[v / 2 / kBlocks][group / 2][group % 2 * 2 + v % 2];
  }

  /// Each warp of a group owns one of a lane's pairs: its first. The others add to its results.
  FUSEDRNN_DEVICE void trade(Fragments& c) {
    unroll<kSplits - 1>([&](auto n) {
      constexpr int d = n + 1;
      if (kFragmentPairs < kSplits && (split() ^ d) >= kFragmentPairs) return;
      Traded t;
      unroll<kResults>([&](auto g) { t.result[g] = result_at(c, d % kFragmentPairs, g); });
      *reinterpret_cast<Traded*>(memory_ + given_[n] + buffer_) = t;
    });
    sync_threads(1 + group(), kSplits * kWarp);
    unroll<kSplits - 1>([&](auto n) {
      const Traded t = reinterpret_cast<const Traded*>(memory_ + taken_ + buffer_)[n * kWarp];
      unroll<kResults>([&](auto g) { result_at(c, 0, g) += t.result[g]; });
    });
    buffer_ ^= kTraded * int(sizeof(Traded));  // the other one is for the next GEMM
  }

  unsigned char* memory_;
  int load_scratch_, carried_;
  int b_offset_[kRowTiles];  ///< the lane's operands, from a chunk's first
  int given_[kSplits], taken_, buffer_ = 0;
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
  static constexpr bool kOneChunk = kOneChunk_, kOwnUnitsAlone = false, kInFragments = false;
  static constexpr int kBlockUnits = 16;
  static constexpr int kThreads = kWarp * kBlocks * kSplits;
  static constexpr int kUnits = kBlockUnits * kBlocks;
  static constexpr int kK = kSplits * Gemm::kK;
  /// Per thread and chunk. With few rows some threads own none.
  static constexpr int kPairs = (kChunkRows * kUnits + kThreads - 1) / kThreads;
  static constexpr int kThreadUnits = 1;
  static constexpr bool kOperandsAreNeighbours = false, kHalvesTakeTurns = false;
  static_assert((kPairs == 1 || kChunkRows * kUnits % kThreads == 0) && kThreads % kUnits == 0);

  using Carried = cuda::Carried<kPairs, kThreads, kOneChunk>;

  /// Rows and units from a thread's first pair to its i-th.
  static FUSEDRNN_INLINE constexpr int pair_row(int i) { return i * kThreads / kUnits; }
  static FUSEDRNN_INLINE constexpr int pair_unit(int) { return 0; }

  /// The gate and the unit of an operand in K.
  template <int kParts>
  static FUSEDRNN_INLINE constexpr KPlace place_of(int k) {
    return {k / (kK / kParts), k % (kK / kParts)};
  }

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
  static FUSEDRNN_DEVICE int row_flip() { return 0; }

  FUSEDRNN_DEVICE void multiply_rows(const Gemm& gemm, const Operand* rows,
                                     float (&results)[kPairs][kResults]) const {
    multiply_operand(
        gemm, SharedOperand<Operand>{rows + split() * Gemm::kK, Traits::kOperandStride}, results);
  }
  template <class B>
  FUSEDRNN_DEVICE void multiply_operand(const Gemm& gemm, const B& b,
                                        float (&results)[kPairs][kResults]) const {
    const int warp = threadIdx.x / kWarp, block = warp / kSplits;
    gemm.template multiply<kChunkRows>(b, partials_ + split() * kSplitStride + block * kBlockStride,
                                       kRowStride, scratch_ + warp * Gemm::kScratchFloats);
    sync_cta();
    unroll<kPairs>([&](auto i) {
      const Pair p = pair(0, i);
      if (!p.is_owned) return;
      const float* at = partials_ + p.chunk_row * kRowStride + p.unit / kBlockUnits * kBlockStride +
                        p.unit % kBlockUnits;
      unroll<kResults>([&](auto g) {
        float sum = at[16 * g];
#pragma unroll
        for (int s = 1; s < kSplits; ++s) sum += at[16 * g + s * kSplitStride];
        results[i][g] += sum;
      });
    });
  }

 private:
  float* partials_;
  float* scratch_;
  float* carried_memory_;
};

}  // namespace fusedrnn::cuda
