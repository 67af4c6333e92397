// Products with a matrix that stays in the registers of a warp.
//
// partial [kRows, stride] = (the matrix of a warp [16 * kTiles, kDepth]) * (h [kRows, kDepth])^T,
// kRows a multiple of 8
#pragma once

#include "kernels.h"
#include "primitives.cuh"

namespace fusedrnn::cuda {

using scalar::unroll;

constexpr int kWarp = 32;

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
      to = scalar::bit_cast<float>(tf32_of(h));
    }
  }

  /// The sums as they come: with lane = 4 r + q, c[n][m][i] is of row 8 n + 2 q + i % 2 of h and
  /// row 16 m + r + 8 (i / 2) of the matrix. c is zero on entry.
  template <int N, class H>
  FUSEDRNN_DEVICE void sums(const H& h, float (&c)[N][kTiles][4]) const {
    const int lane = threadIdx.x % kWarp, r = lane / 4, q = lane % 4;
    // Each product waits for the one before it in its chain: where tiles are few, two chains each.
    constexpr bool kTwo = N * kTiles < 3;
    float other[kTwo ? N : 1][kTwo ? kTiles : 1][4] = {};
    unroll<kPairs>([&](auto j) {
      Words b[N];
      unroll<N>([&](auto n) { b[n] = h.load(8 * n + r, j * kPair + 4 * q * kPerWord); });
      unroll<kTiles>([&](auto m) {
        unroll<N>([&](auto n) {
          float (&second)[4] = kTwo ? other[kTwo ? n : 0][kTwo ? m : 0] : c[n][m];
          mma_m16n8<S>(c[n][m], a_[m][j][0], b[n].word[0], b[n].word[1]);
          mma_m16n8<S>(second, a_[m][j][1], b[n].word[2], b[n].word[3]);
        });
      });
    });
    if constexpr (kTwo) {
      unroll<N>([&](auto n) {
        unroll<kTiles>([&](auto m) { unroll<4>([&](auto i) { c[n][m][i] += other[n][m][i]; }); });
      });
    }
  }

  template <int kRows, class H>
  FUSEDRNN_DEVICE void multiply(const H& h, float* partial, int stride, void*) const {
    constexpr int N = kRows / 8;
    const int lane = threadIdx.x % kWarp, r = lane / 4, q = lane % 4;
    float c[N][kTiles][4] = {};
    sums(h, c);
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
            const float b = scalar::bit_cast<float>(w.word[j]);
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

}  // namespace fusedrnn::cuda
