// The exchange among a group's resident CTAs: an all-gather through global memory, which stays in
// L2. Data is its own flag, as in NCCL's LL protocol: no counter, no barrier.
//
// A word of the exchange is kMissing until it has come. A reader polls the words that its lane
// multiplies. Step k uses slot k % kExchangeSlots. All slots are missing on entry. Every word has
// one writer, a thread, and the same readers in all steps. A word's thread stores step k to it and
// then clears its word of step k - 2:
//
// - No reader still wants a word that is cleared. The thread has all of its CTA's words of step
//   k - 1, by the barrier between GEMM and store. Each comes from a CTA that had read all its words
//   of step k - 2, by the same barrier there.
// - A step's word is never lost by a late clear: stores of one thread to one word keep their order.
// - No reader takes a word of step m - kExchangeSlots for one of step m. Every thread has a fence
//   in each kFenceSteps-th step, at k = f, f + kFenceSteps and so on. The writer clears step f - 2
//   and all before, has its fence f, and stores step f + 1. The reader finds that store, and has
//   its fence f + kFenceSteps. From then on it sees the clears. Until the next fence it reads
//   steps up to f + 2 kFenceSteps - 1. So kExchangeSlots > 2 kFenceSteps suffices.
//
// Fences follow the stores, when a warp would wait for other CTAs in any case.
#pragma once

#include "exchange.cuh"
#include "plan.h"

namespace fusedrnn::cuda {

constexpr uint32_t kMissing = 0xffffffff;
constexpr int kFenceSteps = 3;
static_assert(kFenceSteps > 1 && kExchangeSlots > 2 * kFenceSteps);

/// Where a slot has an operand. A part is 16 bytes. A slot has blocks of eight rows, of four parts
/// in each row. So a warp's loads for an mma are 512 bytes in a row.
template <class Operand>
FUSEDRNN_INLINE constexpr int exchange_offset(int row, int k, int row_k) {
  constexpr int n = kPerWords<Operand>;
  return row / 8 * 8 * row_k + k / (4 * n) * (32 * n) + row % 8 * (4 * n) + k % (4 * n);
}

/// A chunk's B in a slot, from a warp's first k on. A load waits until all its words have come.
template <class Operand>
class PolledOperand {
 public:
  /// row_flip: bits of a lane's rows to flip. rows and row_k: the rows and operands that come.
  /// Other rows are copies of the last, other operands are zero. max_k: a row's operands in the
  /// slot.
  FUSEDRNN_DEVICE PolledOperand(const Operand* slot, int rows, int row_flip, int first_k, int row_k,
                                int max_k, const Waiter& waiter)
      : slot_(slot),
        rows_(rows),
        row_flip_(row_flip),
        first_k_(first_k),
        row_k_(row_k),
        max_k_(max_k),
        waiter_(waiter) {}

  FUSEDRNN_DEVICE Words load(int row, int k) const {
    Words w = {};
    if (first_k_ + k >= row_k_) return w;
    const Operand* const from = at(row, first_k_ + k);
    poll(
        [&] {
          w = load_relaxed(from);
          return largest(w) != kMissing;
        },
        waiter_);
    return w;
  }

  /// Calls f(j, words) for all j < kParts. A lane's j-th words are 16 bytes of each of N rows.
  template <int kParts, int N, class F>
  FUSEDRNN_DEVICE void for_each(const F& f) const {
    // 32 registers hold all words, or two waves: one is loaded while the other is multiplied.
    constexpr int kWave = kParts * N <= 8 ? kParts : 4 / N;
    constexpr int kWaves = (kParts + kWave - 1) / kWave;
    const int lane = threadIdx.x % kWarp, k = first_k_ + lane % 4 * kPerWords<Operand>;
    const int parts = (row_k_ - k + kBlockK - 1) / kBlockK;  // of the lane; may be negative
    const Operand* from[N];
    unroll<N>([&](auto n) { from[n] = at((8 * n + lane / 4) ^ row_flip_, k); });
    Words waves[kWaves == 1 ? 1 : 2][kWave][N];
    const auto load_wave = [&](auto w) {
      unroll<kWave>([&](auto i) {
        constexpr int j = w * kWave + i;
        unroll<N>([&](auto n) {
          Words& to = waves[w % 2][i][n];
          to = Words{};
          if constexpr (j < kParts) {
            if (j < parts) to = load_relaxed(from[n] + j * kBlock);
          }
        });
      });
    };
    load_wave(std::integral_constant<int, 0>{});
    unroll<kWaves>([&](auto w) {
      if constexpr (w + 1 < kWaves) load_wave(std::integral_constant<int, w + 1>{});
      Words(&wave)[kWave][N] = waves[w % 2];
      uint32_t largest_of_all = 0;
      unroll<kWave>([&](auto i) {
        unroll<N>([&](auto n) { largest_of_all = larger(largest_of_all, largest(wave[i][n])); });
      });
      if (largest_of_all == kMissing) {
        poll(
            [&] {
              bool is_done = true;
              unroll<kWave>([&](auto i) {
                unroll<N>([&](auto n) {
                  if (largest(wave[i][n]) != kMissing) return;
                  wave[i][n] = load_relaxed(from[n] + (w * kWave + i) * kBlock);
                  is_done = false;
                });
              });
              return is_done;
            },
            waiter_);
      }
      sync_warp();
      unroll<kWave>([&](auto i) {
        constexpr int j = w * kWave + i;
        if constexpr (j < kParts) f(std::integral_constant<int, j>{}, wave[i]);
      });
    });
  }

 private:
  static constexpr int kBlockK = 4 * kPerWords<Operand>;  ///< a block's operands in a row
  static constexpr int kBlock = 8 * kBlockK;

  static FUSEDRNN_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
  static FUSEDRNN_DEVICE uint32_t largest(const Words& w) {
    return larger(larger(w.word[0], w.word[1]), larger(w.word[2], w.word[3]));
  }
  FUSEDRNN_DEVICE const Operand* at(int row, int k) const {
    return slot_ + exchange_offset<Operand>(row < rows_ ? row : rows_ - 1, k, max_k_);
  }

  const Operand* slot_;
  int rows_, row_flip_, first_k_, row_k_, max_k_;
  Waiter waiter_;
};

template <class Traits>
class GridExchange;

/// WorkTraits: FragmentTraits or PartialSumTraits. kValues: operands per unit, 1 for h or G for the
/// gate gradients. K has 16 bytes of each in turn, so that existing units come first.
template <class WorkTraits, int kValues_>
struct GridTraits : WorkTraits {
  using Exchange = GridExchange<GridTraits>;
  static constexpr int kValues = kValues_;

  /// The gate and the unit of an operand in K.
  template <int kParts>
  static FUSEDRNN_INLINE constexpr KPlace place_of(int k) {
    constexpr int n = kPerWords<typename WorkTraits::Operand>;
    return {k / n % kParts, k / (n * kParts) * n + k % n};
  }
  /// Not in shared memory.
  static FUSEDRNN_DEVICE int b_offset(int, int) { return 0; }

  struct Storage : WorkTraits::WorkStorage {
    FUSEDRNN_INLINE Storage(int tile_rows, int) : WorkTraits::WorkStorage(tile_rows) {}
  };
};

template <class Traits>
class GridExchange : public Traits::template Work<Traits> {
 public:
  using Base = typename Traits::template Work<Traits>;
  using Gemm = typename Traits::Gemm;
  using Operand = typename Traits::Operand;
  static constexpr int kValues = Traits::kValues;

  /// exchange: Operand [kExchangeSlots, groups * tile_rows, kK] of the direction.
  FUSEDRNN_DEVICE GridExchange(const PersistentParams& params, uint32_t* exchange,
                               unsigned char* memory)
      : Base(params, memory, typename Traits::Storage(Tile<Traits>::tile_rows(params), gridDim.x)),
        slots_(reinterpret_cast<Operand*>(exchange) + this->first_row * Traits::kK),
        slot_stride_(gridDim.y * params.tile_rows * Traits::kK) {}

  /// Stores the operands of the CTA's units, existing or not, for existing rows.
  FUSEDRNN_DEVICE void store(int k, int chunk,
                             const float (&values)[Traits::kPairs][kValues]) const {
    if (k == this->params_.steps) return;
    unroll<Traits::kPairs>([&](auto i) {
      const Pair p = this->pair(chunk, i);
      uint32_t words[kValues];
      unroll<kValues>([&](auto v) { words[v] = word_of(values[i][v]); });
      // Of two half operands in a word, the even unit's thread stores both.
      const bool stores = p.is_owned && p.chunk_row < this->rows_of(chunk) &&
                          (sizeof(Operand) == 4 || p.unit % 2 == 0);
      if (!stores) return;
      constexpr int n = kPerWords<Operand>;
      const int unit = this->first_unit + p.unit;
      const auto word = [&](int step, int v) {
        const int operand = unit / n * n * kValues + v * n + unit % n;
        return reinterpret_cast<uint32_t*>(
            slot(step) + exchange_offset<Operand>(p.tile_row, operand, Traits::kK));
      };
      unroll<kValues>([&](auto v) { store_relaxed(words[v], word(k, v)); });
      unroll<kValues>([&](auto v) { store_relaxed(kMissing, word(k - 2, v)); });
    });
  }
  FUSEDRNN_DEVICE void commit(const Gemm&, int k, int chunk) const {
    // A CTA's partial sums have been read before those of the next GEMM are written.
    if constexpr (!Traits::kInFragments) sync_cta();
    if (chunk + 1 == this->chunks() && k % kFenceSteps == 0) fence_device();
  }
  FUSEDRNN_DEVICE void wait(int, int) const {}
  FUSEDRNN_DEVICE void multiply(const Gemm& gemm, int k, int chunk,
                                float (&results)[Traits::kPairs][Traits::kResults]) {
    this->multiply_operand(
        gemm,
        PolledOperand<Operand>(slot(k) + chunk * Traits::kChunkRows * Traits::kK,
                               this->rows_of(chunk), this->row_flip(), this->split() * Gemm::kK,
                               gridDim.x * Traits::kUnits * kValues, Traits::kK, this->waiter()),
        results);
  }

 private:
  /// k may be -2 or -1, for a slot that is still clear.
  FUSEDRNN_DEVICE Operand* slot(int k) const {
    return slots_ + unsigned(k) % kExchangeSlots * slot_stride_;
  }
  /// An operand as a word, with the next unit's if it has half a word. Never kMissing.
  static FUSEDRNN_DEVICE uint32_t word_of(float value) {
    Operand own;
    Gemm::set_operand(own, value);
    uint32_t bits;
    if constexpr (sizeof(Operand) == 2) {
      bits = own.bits;
      bits |= shuffle_xor(bits, 4) << 16;
    } else {
      bits = scalar::bit_cast<uint32_t>(own);
    }
    return bits < kMissing ? bits : kMissing - 1;  // NaN stays NaN
  }

  Operand* slots_;
  int slot_stride_;
};

}  // namespace fusedrnn::cuda
