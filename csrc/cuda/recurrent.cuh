// All steps of a layer in one launch, weights in registers (kernels.h says how it is cut up).
//
// A CTA has kBlocks blocks of 16 units, and kSplits warps for each block, which share the depth of
// its product: a matrix of 16 * kTiles rows, in the warps' registers, by 16 rows of the batch at a
// time. Forward, the rows are the gates of the block's units (kTiles = G) and the depth is all
// units' h; backward, the rows are the units and the depth all units' gradients of the sums that
// weight_hh feeds. The sums of the splits meet in shared memory, where each thread takes those of
// one unit and row, in a fixed order, and applies the cell. What the next step's product reads is
// written to `exchange`, which has two halves: who writes one has seen all others arrive there, and
// so done with the step that read it.
#pragma once

#include "kernels.h"
#include "primitives.cuh"

namespace fusedrnn::cuda {

using host::unroll;

constexpr int kBlockUnits = 16;  ///< units of a block
constexpr int kWarp = 32;

// ---- products -----------------------------------------------------------------------------------
//
// partial [kRows, stride] = (the matrix of a warp [16 * kTiles, kDepth]) * (h [kRows, kDepth])^T,
// kRows a multiple of 8

/// Where a product reads h: rows `stride` apart, aligned to 16 bytes.
template <class S, bool kShared>
struct Operands {
  const S* data;
  int stride;

  FUSEDRNN_DEVICE Words load(int row, int at) const {
    const S* p = data + row * stride + at;
    if constexpr (kShared) {
      return *reinterpret_cast<const Words*>(p);
    } else {
      return load_shared_by_ctas(p);
    }
  }
};

/// By tensor cores: the half types, and float32 as TF32. The order of a product's depth is free, so
/// it is the one in which a thread's operands of two products lie together, 16 bytes.
template <class S_, int kTiles_, int kDepth_>
class TensorProduct {
 public:
  using S = S_;
  static constexpr int kTiles = kTiles_, kDepth = kDepth_, kScratch = 0;
  static constexpr int kLoadScratch = 1024;

  /// Weight::at(row, depth) is the matrix; kDepthFirst: neighbours in depth lie next to each other
  /// in memory, else neighbouring rows do. `scratch`: kLoadScratch bytes of a warp's own.
  template <class Weight>
  FUSEDRNN_DEVICE void load(const Weight& weight, void* scratch) {
    const int lane = threadIdx.x % kWarp, r = lane / 4, q = lane % 4;
    S* const tile = static_cast<S*>(scratch);  // [16, kPair]
    unroll<kTiles>([&](auto m) {
      unroll<kPairs>([&](auto j) {
#pragma unroll 8
        for (int i = lane; i < 16 * kPair; i += kWarp) {
          const int row = Weight::kDepthFirst ? i / kPair : i % 16;
          const int at = Weight::kDepthFirst ? i % kPair : i / 16;
          tile[row * kPair + at] = weight.at(16 * m + row, j * kPair + at);
        }
        sync_warp();
        unroll<2>([&](auto s) {
          unroll<4>([&](auto i) {
            const S* p = tile + (r + i % 2 * 8) * kPair + (4 * q + 2 * s + i / 2) * kPerWord;
            if constexpr (kPerWord == 2) {
              a_[m][j][s][i] = *reinterpret_cast<const uint32_t*>(p);
            } else {
              a_[m][j][s][i] = tf32_of(*p);
            }
          });
        });
        sync_warp();
      });
    });
  }

  /// h as a product reads it.
  static FUSEDRNN_DEVICE void set_operand(S& to, float h) {
    if constexpr (kPerWord == 2) {
      round_to(to, h);
    } else {
      to = host::bit_cast<float>(tf32_of(h));
    }
  }

  template <int kRows, class H>
  FUSEDRNN_DEVICE void multiply(const H& h, float* partial, int stride, void*) const {
    constexpr int N = kRows / 8;
    const int lane = threadIdx.x % kWarp, r = lane / 4, q = lane % 4;
    float c[N][kTiles][4] = {};
    unroll<kPairs>([&](auto j) {
      Words b[N];
      unroll<N>([&](auto n) { b[n] = h.load(8 * n + r, j * kPair + 4 * q * kPerWord); });
      unroll<kTiles>([&](auto m) {
        unroll<N>([&](auto n) {
          multiply_add_16x8<S>(c[n][m], a_[m][j][0], b[n].word[0], b[n].word[1]);
          multiply_add_16x8<S>(c[n][m], a_[m][j][1], b[n].word[2], b[n].word[3]);
        });
      });
    });
    unroll<N>([&](auto n) {
      unroll<kTiles>([&](auto m) {
        unroll<4>([&](auto i) {
          partial[(8 * n + 2 * q + i % 2) * stride + 16 * m + r + i / 2 * 8] = c[n][m][i];
        });
      });
    });
  }

 private:
  static constexpr int kPerWord = 4 / sizeof(S), kPair = 16 * kPerWord, kPairs = kDepth / kPair;
  static_assert(kDepth % kPair == 0 && 16 * kPair * sizeof(S) == kLoadScratch);
  uint32_t a_[kTiles][kPairs][2][4];
};

/// By multiply-adds of float32. A lane has a row or two of the matrix, half the depth where there
/// are but 16 rows; h goes through scratch memory, a few rows at a time.
template <int kTiles_, int kDepth_>
class PlainProduct {
 public:
  using S = float;
  static constexpr int kTiles = kTiles_, kDepth = kDepth_;
  static constexpr int kStaged = 4;                        ///< rows of h at a time
  static constexpr int kScratch = kStaged * (kDepth + 4);  ///< elements of a warp
  static constexpr int kLoadScratch = 0;

  template <class Weight>
  FUSEDRNN_DEVICE void load(const Weight& weight, void*) {
    unroll<kOwnRows>([&](auto i) {
      unroll<kOwnDepth>(
          [&](auto k) { a_[i][k] = row(i) < 16 * kTiles ? weight.at(row(i), depth() + k) : 0.f; });
    });
  }

  static FUSEDRNN_DEVICE void set_operand(float& to, float h) { to = h; }

  template <int kRows, class H>
  FUSEDRNN_DEVICE void multiply(const H& h, float* partial, int stride, void* scratch) const {
    const int lane = threadIdx.x % kWarp;
    float* const staged = static_cast<float*>(scratch);
#pragma unroll 1
    for (int first = 0; first < kRows; first += kStaged) {
      for (int i = lane; i < kStaged * kDepth / 4; i += kWarp) {
        const int n = i / (kDepth / 4), at = i % (kDepth / 4) * 4;
        *reinterpret_cast<Words*>(staged + n * (kDepth + 4) + at) = h.load(first + n, at);
      }
      sync_warp();
      float c[kOwnRows][kStaged] = {};
      unroll<kOwnDepth / 4>([&](auto k) {
        unroll<kStaged>([&](auto n) {
          const Words w =
              *reinterpret_cast<const Words*>(staged + n * (kDepth + 4) + depth() + 4 * k);
          unroll<4>([&](auto j) {
            const float b = host::bit_cast<float>(w.word[j]);
            unroll<kOwnRows>([&](auto i) { c[i][n] += a_[i][4 * k + j] * b; });
          });
        });
      });
      unroll<kOwnRows>([&](auto i) {
        unroll<kStaged>([&](auto n) {
          float sum = c[i][n];
          if constexpr (kHalves == 2) sum += shuffle_xor(sum, 16);
          const bool own = kHalves == 2 ? lane < 16 : row(i) < 16 * kTiles;
          if (own) partial[(first + n) * stride + row(i)] = sum;
        });
      });
      sync_warp();
    }
  }

 private:
  static constexpr int kHalves = kTiles == 1 ? 2 : 1;
  static constexpr int kOwnDepth = kDepth / kHalves;
  static constexpr int kOwnRows = kHalves == 2 ? 1 : (16 * kTiles + kWarp - 1) / kWarp;
  static FUSEDRNN_DEVICE int row(int i) {
    const int lane = threadIdx.x % kWarp;
    return kHalves == 2 ? lane % 16 : lane + kWarp * i;
  }
  /// Where this lane's part of the depth begins.
  static FUSEDRNN_DEVICE int depth() {
    return kHalves == 2 ? int(threadIdx.x % kWarp / 16) * kOwnDepth : 0;
  }
  float a_[kOwnRows][kOwnDepth];
};

// ---- what both directions of time share ---------------------------------------------------------

/// The last arguments of the kernels: how the products are shared out.
template <class Product_, int kBlocks_, int kSplits_>
struct Sharing {
  using Product = Product_;
  using S = typename Product::S;
  static constexpr int kBlocks = kBlocks_, kSplits = kSplits_;
  static constexpr bool kAlone = kSplits == 1;  ///< one CTA has all units
  static constexpr int kThreads = kWarp * kBlocks * kSplits;
  static constexpr int kUnits = kBlockUnits * kBlocks;
  static constexpr int kDepth = kSplits * Product::kDepth;
  static constexpr int kTileRows = 16 * Product::kTiles;
  /// Between the rows of the sums: threads that store a product's sums use all banks.
  static constexpr int kStride = kBlocks * kTileRows + 4;
  /// Batch rows of a product. Alone, fewer: there can be as many CTAs, and each is done sooner.
  static constexpr int kRows = kAlone ? 8 : 16;
  static constexpr int kPairs = kRows * kUnits / kThreads;  ///< (unit, row) of a thread at a time
  static_assert(kRows * kUnits % kThreads == 0 && kThreads % kUnits == 0);
  /// Between the rows of exchanged operands: in shared memory those of neighbouring rows are in
  /// other banks.
  static constexpr int kExchangeStride = kAlone ? kDepth + int(16 / sizeof(S)) : kDepth;

  // Shared memory, in floats: the sums, before them the weights on their way, scratch of the warps,
  // `kept` floats for each (row, unit), and, alone, the exchange.
  static constexpr int kOfLoading = kBlocks * kSplits * Product::kLoadScratch / int(sizeof(float));
  static constexpr int kOfProducts = kSplits * kRows * kStride;
  static constexpr int kSums = kOfProducts > kOfLoading ? kOfProducts : kOfLoading;
  static constexpr int kScratch = kBlocks * kSplits * Product::kScratch;
  static size_t shared_bytes(int64_t tile_rows, int kept) {
    return sizeof(float) * size_t(kSums + kScratch + kept * tile_rows * kUnits) +
           (kAlone ? 2 * tile_rows * kExchangeStride * sizeof(S) : 0);
  }
};

/// A thread's view of its CTA, and the exchange with the others of the group.
template <class Shared>
class Worker {
 public:
  using S = typename Shared::S;

  FUSEDRNN_DEVICE Worker(const Recurrence& run, S* exchange, unsigned char* memory, int kept)
      : run_(run),
        direction(blockIdx.z),
        first_row(blockIdx.y * run.tile_rows),
        first_unit(blockIdx.x * Shared::kUnits),
        sums_(reinterpret_cast<float*>(memory)),
        kept_(sums_ + Shared::kSums + Shared::kScratch),
        arrivals_(run.arrivals + direction * gridDim.y + blockIdx.y) {
    if constexpr (Shared::kAlone) {
      exchange_ = reinterpret_cast<S*>(kept_ + kept * run.tile_rows * Shared::kUnits);
      half_ = run.tile_rows * Shared::kExchangeStride;
      for (int i = threadIdx.x; i < 2 * half_; i += Shared::kThreads) exchange_[i] = S{};
      sync_cta();
    } else {
      exchange_ = exchange + first_row * Shared::kExchangeStride;
      half_ = gridDim.y * run.tile_rows * Shared::kExchangeStride;
    }
  }

  /// What a thread has to do of `chunk`: its p-th pair of a row of the batch and a unit.
  struct Pair {
    int row_of_chunk;
    int row_of_tile, row;  ///< row: of the batch
    int unit;              ///< always the same for a thread
    bool exists;
  };
  FUSEDRNN_DEVICE Pair pair(int chunk, int p) const {
    Pair pair;
    pair.row_of_chunk = (threadIdx.x + p * Shared::kThreads) / Shared::kUnits;
    pair.row_of_tile = chunk * Shared::kRows + pair.row_of_chunk;
    pair.row = first_row + pair.row_of_tile;
    pair.unit = first_unit + threadIdx.x % Shared::kUnits;
    pair.exists = pair.row < run_.rows && pair.unit < run_.hidden_size;
    return pair;
  }
  FUSEDRNN_DEVICE int chunks() const { return run_.tile_rows / Shared::kRows; }

  /// The i-th value that the CTA keeps for a pair from step to step.
  FUSEDRNN_DEVICE float& kept(const Pair& p, int i) const {
    return kept_[(i * run_.tile_rows + p.row_of_tile) * Shared::kUnits +
                 threadIdx.x % Shared::kUnits];
  }

  /// Where the pair's unit, or its `part` of several, is in a row of the exchange.
  FUSEDRNN_DEVICE S& operand(int half, const Pair& p, int part = 0, int part_size = 0) const {
    return exchange_[half * half_ + p.row_of_tile * Shared::kExchangeStride + part * part_size +
                     p.unit];
  }

  /// Reads the weights that this thread keeps. Weight is made of (first unit, first depth) of the
  /// warp's part. It uses the memory of the sums: all must arrive() before the first product.
  template <class Weight, class... Args>
  FUSEDRNN_DEVICE void load(typename Shared::Product& product, const Args&... args) const {
    const int warp = threadIdx.x / kWarp;
    const Weight weight{first_unit + warp / Shared::kSplits * kBlockUnits,
                        warp % Shared::kSplits * Shared::Product::kDepth, args...};
    product.load(weight,
                 reinterpret_cast<unsigned char*>(sums_) + warp * Shared::Product::kLoadScratch);
  }

  /// The product of a chunk, from a half of the exchange; sum() then has it.
  FUSEDRNN_DEVICE void multiply(const typename Shared::Product& product, int half,
                                int chunk) const {
    const int warp = threadIdx.x / kWarp, block = warp / Shared::kSplits;
    const int split = warp % Shared::kSplits;
    const Operands<S, Shared::kAlone> h{exchange_ + half * half_ +
                                            chunk * Shared::kRows * Shared::kExchangeStride +
                                            split * Shared::Product::kDepth,
                                        Shared::kExchangeStride};
    product.template multiply<Shared::kRows>(
        h, sums_ + split * Shared::kRows * Shared::kStride + block * Shared::kTileRows,
        Shared::kStride, sums_ + Shared::kSums + warp * Shared::Product::kScratch);
    sync_cta();
  }
  FUSEDRNN_DEVICE float sum(const Pair& p, int tile) const {
    const int unit = threadIdx.x % Shared::kUnits, block = unit / kBlockUnits;
    const float* at = sums_ + p.row_of_chunk * Shared::kStride + block * Shared::kTileRows +
                      tile * 16 + unit % kBlockUnits;
    float sum = at[0];
#pragma unroll
    for (int split = 1; split < Shared::kSplits; ++split) {
      sum += at[split * Shared::kRows * Shared::kStride];
    }
    return sum;
  }

  /// This CTA has written its part of a half of the exchange.
  FUSEDRNN_DEVICE void arrive() const {
    sync_cta();
    if constexpr (!Shared::kAlone) {
      if (threadIdx.x == 0) add_release(arrivals_, 1);
    }
  }
  /// All CTAs of the group have arrived `times` times.
  FUSEDRNN_DEVICE void wait(int times) const {
    if constexpr (!Shared::kAlone) {
      if (threadIdx.x == 0) {
        while (load_acquire(arrivals_) < uint32_t(times) * gridDim.x) pause();
      }
      sync_cta();
    }
  }

  /// The time of the i-th step of this direction.
  FUSEDRNN_DEVICE int time(int i) const { return direction ? run_.steps - 1 - i : i; }
  FUSEDRNN_DEVICE int64_t position(int t) const {
    return run_.position ? run_.position[t] : int64_t(t) * run_.rows;
  }
  FUSEDRNN_DEVICE bool takes_part(int row, int t) const {
    if (t < 0 || t >= run_.steps) return false;
    if (run_.lengths) return t < run_.lengths[row];
    return !run_.position || row < run_.position[t + 1] - run_.position[t];
  }

 private:
  const Recurrence& run_;

 public:
  const int direction, first_row, first_unit;

 private:
  float *sums_, *kept_;
  S* exchange_;
  int half_;  ///< elements of a half of the exchange
  uint32_t* arrivals_;
};

template <class T>
FUSEDRNN_DEVICE T value_or_zero(const T* p, int64_t at) {
  return p ? p[at] : T(0);
}

// ---- forward ------------------------------------------------------------------------------------

template <class Cell, class Shared>
struct RecurrentForwardKernel : Shared {
  using S = typename Shared::S;
  using Pair = typename Worker<Shared>::Pair;
  static constexpr int kKept = 2;  ///< state and h
  RecurrentForward<S> run;

  /// Rows: the gates of 16 units; depth: all units.
  struct Weight {
    static constexpr bool kDepthFirst = true;
    int first_unit, first_depth;
    const S* weight_hh;
    int H;
    FUSEDRNN_DEVICE S at(int row, int depth) const {
      const int unit = first_unit + row % kBlockUnits, k = first_depth + depth;
      return unit < H && k < H ? weight_hh[(row / kBlockUnits * H + unit) * H + k] : S{};
    }
  };

  /// What a step needs besides the product.
  struct Inputs {
    bool takes_part;
    int64_t position;
    float x[Cell::kGates];
  };

  FUSEDRNN_DEVICE Inputs load(const Worker<Shared>& w, const Pair& p, int t) const {
    Inputs in;
    in.takes_part = p.exists && w.takes_part(p.row, t);
    if (!in.takes_part) return in;
    const int H = run.hidden_size;
    in.position = w.position(t) + p.row;
    const float* x = run.direction[w.direction].x_product + in.position * Cell::kGates * H + p.unit;
    unroll<Cell::kGates>([&](auto g) { in.x[g] = x[g * H]; });
    return in;
  }

  FUSEDRNN_DEVICE void operator()(unsigned char* memory) const {
    const int H = run.hidden_size;
    const auto& of = run.direction[blockIdx.z];
    const Worker<Shared> w(run, of.exchange, memory, kKept);

    typename Shared::Product product;
    w.template load<Weight>(product, of.weight_hh, H);
    float bias[Cell::kSums] = {};
    const int own_unit = w.pair(0, 0).unit;
    if (of.bias_ih && own_unit < H) {
      unroll<Cell::kGates>([&](auto g) {
        constexpr int in = Cell::input_sum[g], hidden = Cell::hidden_sum[g];
        bias[in] += value_of(of.bias_ih[g * H + own_unit]);
        bias[hidden] += value_of(of.bias_hh[g * H + own_unit]);
      });
    }
    for (int chunk = 0; chunk < w.chunks(); ++chunk) {
      for (int i = 0; i < Shared::kPairs; ++i) {
        const Pair p = w.pair(chunk, i);
        if (!p.exists) continue;
        const float h = value_or_zero(of.h0, p.row * run.h0_stride + p.unit);
        w.kept(p, 0) =
            Cell::kStateIsOutput ? h : value_or_zero(of.c0, p.row * run.c0_stride + p.unit);
        w.kept(p, 1) = h;
        Shared::Product::set_operand(w.operand(0, p), h);
      }
    }
    w.arrive();

    for (int i = 0; i < run.steps; ++i) {
      const int t = w.time(i);
      for (int chunk = 0; chunk < w.chunks(); ++chunk) {
        // Asked for before the wait for the others.
        Inputs in[Shared::kPairs];
        unroll<Shared::kPairs>([&](auto n) { in[n] = load(w, w.pair(chunk, n), t); });
        if (chunk == 0) w.wait(i + 1);
        w.multiply(product, i % 2, chunk);
        unroll<Shared::kPairs>([&](auto n) {
          const Pair p = w.pair(chunk, n);
          if (!p.exists) return;
          if (in[n].takes_part) apply(w, p, in[n], bias);
          Shared::Product::set_operand(w.operand((i + 1) % 2, p), w.kept(p, 1));
        });
        if (chunk + 1 < w.chunks()) sync_cta();  // the sums are read before they are written again
      }
      w.arrive();
    }

    for (int chunk = 0; chunk < w.chunks(); ++chunk) {
      for (int i = 0; i < Shared::kPairs; ++i) {
        const Pair p = w.pair(chunk, i);
        if (!p.exists) continue;
        round_to(of.h_n[p.row * H + p.unit], w.kept(p, 1));
        if (of.c_n) of.c_n[p.row * H + p.unit] = w.kept(p, 0);
      }
    }
  }

  FUSEDRNN_DEVICE void apply(const Worker<Shared>& w, const Pair& p, const Inputs& in,
                             const float (&bias)[Cell::kSums]) const {
    const auto& of = run.direction[w.direction];
    const int H = run.hidden_size;
    float sum[Cell::kSums], saved[Cell::kSaved];
    unroll<Cell::kSums>([&](auto k) { sum[k] = bias[k]; });
    unroll<Cell::kGates>([&](auto g) {
      constexpr int input = Cell::input_sum[g], hidden = Cell::hidden_sum[g];
      sum[input] += in.x[g];
      sum[hidden] += w.sum(p, g);
    });
    const float h = Cell::forward(sum, w.kept(p, 0), saved);
    w.kept(p, 1) = h;
    round_to(of.y[in.position * run.y_stride + p.unit], h);
    if (of.saved) {
      unroll<Cell::kSaved>(
          [&](auto a) { of.saved[(in.position * Cell::kSaved + a) * H + p.unit] = saved[a]; });
    }
  }
};

// ---- backward -----------------------------------------------------------------------------------

template <class Cell, class Shared>
struct RecurrentBackwardKernel : Shared {
  using S = typename Shared::S;
  using Pair = typename Worker<Shared>::Pair;
  static constexpr int kKept = 2;  ///< dstate, and what a row that takes no part keeps of dh
  static constexpr int kGateDepth = Shared::kDepth / Cell::kGates;  ///< of the exchange, a gate's
  RecurrentBackward<S> run;

  /// Rows: 16 units; depth: the gates of all units.
  struct Weight {
    static constexpr bool kDepthFirst = false;
    int first_unit, first_depth;
    const S* weight_hh;
    int H;
    FUSEDRNN_DEVICE S at(int row, int depth) const {
      const int unit = first_unit + row, gate = (first_depth + depth) / kGateDepth;
      const int k = (first_depth + depth) % kGateDepth;
      return unit < H && k < H ? weight_hh[(gate * H + k) * H + unit] : S{};
    }
  };

  struct Inputs {
    bool takes_part;
    int64_t position;
    float dy, state, h, saved[Cell::kSaved];
  };

  FUSEDRNN_DEVICE Inputs load(const Worker<Shared>& w, const Pair& p, int i) const {
    const auto& of = run.direction[w.direction];
    const int H = run.hidden_size, t = w.time(i);
    Inputs in;
    in.takes_part = p.exists && w.takes_part(p.row, t);
    if (!in.takes_part) return in;
    in.position = w.position(t) + p.row;
    const auto load_saved = [&](float (&to)[Cell::kSaved], int64_t position) {
      unroll<Cell::kSaved>(
          [&](auto a) { to[a] = of.saved[(position * Cell::kSaved + a) * H + p.unit]; });
    };
    const int before = w.time(i - 1);
    if (w.takes_part(p.row, before)) {
      float saved[Cell::kSaved];
      load_saved(saved, w.position(before) + p.row);
      in.state = saved[Cell::kSavedState];
      in.h = Cell::output(saved);
    } else {
      in.h = value_or_zero(of.h0, p.row * run.h0_stride + p.unit);
      in.state = Cell::kStateIsOutput ? in.h : value_or_zero(of.c0, p.row * run.c0_stride + p.unit);
    }
    in.dy = value_or_zero(of.dy, in.position * run.dy_stride + p.unit);
    load_saved(in.saved, in.position);
    return in;
  }

  FUSEDRNN_DEVICE void operator()(unsigned char* memory) const {
    const int H = run.hidden_size;
    const auto& of = run.direction[blockIdx.z];
    const Worker<Shared> w(run, of.exchange, memory, kKept);

    typename Shared::Product product;
    w.template load<Weight>(product, of.weight_hh, H);
    for (int chunk = 0; chunk < w.chunks(); ++chunk) {
      for (int i = 0; i < Shared::kPairs; ++i) {
        const Pair p = w.pair(chunk, i);
        if (!p.exists) continue;
        w.kept(p, 0) = value_or_zero(of.dc_n, p.row * H + p.unit);
        w.kept(p, 1) = value_or_zero(of.dh_n, p.row * H + p.unit);
      }
    }

    // Back from the last step; after the first there is one more product, for the gradient of h0.
    for (int n = 0; n <= run.steps; ++n) {
      const int i = run.steps - 1 - n;
      for (int chunk = 0; chunk < w.chunks(); ++chunk) {
        Inputs in[Shared::kPairs];
        unroll<Shared::kPairs>([&](auto m) { in[m] = load(w, w.pair(chunk, m), i); });
        if (n > 0) {
          if (chunk == 0) w.wait(n);
          w.multiply(product, (n + 1) % 2, chunk);
        }
        unroll<Shared::kPairs>([&](auto m) {
          const Pair p = w.pair(chunk, m);
          if (!p.exists) return;
          if (n > 0) w.kept(p, 1) += w.sum(p, 0);
          if (i >= 0) apply(w, p, in[m], n % 2);
        });
        if (chunk + 1 < w.chunks()) sync_cta();
      }
      if (i >= 0) w.arrive();
    }

    for (int chunk = 0; chunk < w.chunks(); ++chunk) {
      for (int i = 0; i < Shared::kPairs; ++i) {
        const Pair p = w.pair(chunk, i);
        if (!p.exists) continue;
        const float dstate = w.kept(p, 0), dh = w.kept(p, 1);
        of.dh0[p.row * H + p.unit] = Cell::kStateIsOutput ? dh + dstate : dh;
        if (of.dc0) of.dc0[p.row * H + p.unit] = dstate;
      }
    }
  }

  FUSEDRNN_DEVICE void apply(const Worker<Shared>& w, const Pair& p, const Inputs& in,
                             int half) const {
    const auto& of = run.direction[w.direction];
    const int H = run.hidden_size;
    if (!in.takes_part) {
      unroll<Cell::kGates>([&](auto g) { w.operand(half, p, g, kGateDepth) = S{}; });
      return;
    }
    float dsum[Cell::kSums];
    const float dh = w.kept(p, 1) + in.dy;
    w.kept(p, 1) = 0;
    Cell::backward(in.saved, in.state, dh, w.kept(p, 0), dsum);
    round_to(of.h_previous[in.position * H + p.unit], in.h);
    unroll<Cell::kSums>(
        [&](auto k) { round_to(of.dsums[(in.position * Cell::kSums + k) * H + p.unit], dsum[k]); });
    unroll<Cell::kGates>([&](auto g) {
      constexpr int hidden = Cell::hidden_sum[g];
      Shared::Product::set_operand(w.operand(half, p, g, kGateDepth), dsum[hidden]);
    });
  }
};

// ---- launching ----------------------------------------------------------------------------------

/// Blocks, splits and a warp's depth in units of a variant (Cut), for operands of so many bytes:
/// the weights of a thread fill 128 registers, or half of them.
struct Variant {
  int blocks, splits, depth;
  constexpr int units() const { return splits * depth; }
};
constexpr Variant variant_of(int variant, int64_t operand_bytes) {
  const int most = operand_bytes == 2 ? 128 : 64;
  if (variant == 0) return {most / kBlockUnits, 1, most};
  return {1, 8, variant == 1 ? most / 2 : most};
}

template <class Kernel, class Run>
int launch_recurrent(const Run& run, const Cut& cut, void* stream) {
  Kernel kernel;
  kernel.run = run;
  const Grid grid{unsigned(cut.ctas), unsigned(cut.groups), unsigned(run.directions),
                  Kernel::shared_bytes(cut.tile_rows, Kernel::kKept), !Kernel::kAlone};
  return launch(kernel, grid, stream);
}

/// Calls launch(the product's type, the variant) for the cut and the precision.
template <class Cell, class S, bool kBackward, template <class, class> class Kernel, class Run>
int launch_variant(const Run& run, const Cut& cut, Precision precision, void* stream) {
  const auto with = [&](auto variant, auto tensor) {
    constexpr Variant v = variant_of(variant, sizeof(S));
    constexpr int tiles = kBackward ? 1 : Cell::kGates;
    constexpr int depth = kBackward ? v.depth * Cell::kGates : v.depth;
    using Tensor = TensorProduct<S, tiles, depth>;
    using Product = std::conditional_t<tensor, Tensor, PlainProduct<tiles, depth>>;
    return launch_recurrent<Kernel<Cell, Sharing<Product, v.blocks, v.splits>>>(run, cut, stream);
  };
  const auto of_variant = [&](auto tensor) {
    return cut.variant == 0   ? with(std::integral_constant<int, 0>{}, tensor)
           : cut.variant == 1 ? with(std::integral_constant<int, 1>{}, tensor)
                              : with(std::integral_constant<int, 2>{}, tensor);
  };
  if constexpr (sizeof(S) == 4) {
    if (precision == Precision::ieee) return of_variant(std::false_type{});
  }
  return of_variant(std::true_type{});
}

template <class Cell, class S>
int recurrent_forward(const RecurrentForward<S>& run, const Cut& cut, Precision precision,
                      void* stream) {
  return launch_variant<Cell, S, false, RecurrentForwardKernel>(run, cut, precision, stream);
}
template <class Cell, class S>
int recurrent_backward(const RecurrentBackward<S>& run, const Cut& cut, Precision precision,
                       void* stream) {
  return launch_variant<Cell, S, true, RecurrentBackwardKernel>(run, cut, precision, stream);
}

#define FUSEDRNN_RECURRENT_OF(Cell, S)                                                         \
  template int recurrent_forward<Cell, S>(const RecurrentForward<S>&, const Cut&, Precision,   \
                                          void*);                                              \
  template int recurrent_backward<Cell, S>(const RecurrentBackward<S>&, const Cut&, Precision, \
                                           void*);

}  // namespace fusedrnn::cuda
