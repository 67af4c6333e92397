// GEMMs of a warp whose matrix A stays in registers.
//
// partials [kRows, stride] = B [kRows, kK] * (A [16 * kTiles, kK])^T, kRows a multiple of 8. A is
// the warp's part of weight_hh. B's rows are the batch rows' h or gate gradients.
#pragma once

#include "../target.h"
#include "ptx.cuh"

namespace fusedrnn::cuda {

using scalar::unroll;

constexpr int kWarp = 32;

/// Where a GEMM loads B: rows `stride` apart, aligned to 16 bytes.
template <class Element>
struct SharedOperand {
  const Element* data;
  int stride;
  FUSEDRNN_DEVICE Words load(int row, int k) const {
    return *reinterpret_cast<const Words*>(data + row * stride + k);
  }
};
template <class Element>
struct GlobalOperand {
  const Element* data;
  int stride;
  FUSEDRNN_DEVICE Words load(int row, int k) const { return load_cg(data + row * stride + k); }
};

/// A type's mma: K = 16 for the half types, 8 for TF32.
template <class Element>
FUSEDRNN_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(Element) == 2) {
    mma_m16n8k16<Element>(c, a, b0, b1);
  } else {
    mma_m16n8k8(c, a, b0, b1);
  }
}

/// By tensor cores: the half types, and float32 as TF32. A sum over k may take any order. This
/// order puts a thread's operands for two mma next to each other, 16 bytes.
template <class Element_, int kTiles_, int kK_>
class TensorCoreGemm {
 public:
  using Element = Element_;
  static constexpr int kTiles = kTiles_, kK = kK_;
  static constexpr int kScratchFloats = 0;        ///< per warp, for multiply()
  static constexpr int kLoadScratchBytes = 1024;  ///< per warp, for load()

  /// Reads A from weight.at(row, k). Weight::kContiguousK: neighbours in k, not in row, are
  /// neighbours in memory.
  template <class Weight>
  FUSEDRNN_DEVICE void load(const Weight& weight, void* scratch) {
    const int lane = threadIdx.x % kWarp, r = lane / 4, q = lane % 4;
    Element* const tile = static_cast<Element*>(scratch);  // [16, kPairK]
    unroll<kTiles>([&](auto m) {
      unroll<kPairs>([&](auto j) {
#pragma unroll 8
        for (int i = lane; i < 16 * kPairK; i += kWarp) {
          const int row = Weight::kContiguousK ? i / kPairK : i % 16;
          const int k = Weight::kContiguousK ? i % kPairK : i / 16;
          tile[row * kPairK + k] = weight.at(16 * m + row, j * kPairK + k);
        }
        sync_warp();
        unroll<2>([&](auto s) {
          unroll<4>([&](auto i) {
            const Element* p = tile + (r + i % 2 * 8) * kPairK + (4 * q + 2 * s + i / 2) * kPerWord;
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

  /// Rounds a value to B's element type.
  static FUSEDRNN_DEVICE void set_operand(Element& to, float value) {
    if constexpr (kPerWord == 2) {
      round_to(to, value);
    } else {
      to = scalar::bit_cast<float>(tf32_of(value));
    }
  }

  /// c += A B^T in mma's layout. With lane = 4 r + q, c[n][m][i] is the result for B's row
  /// 8 n + 2 q + i % 2 and A's row 16 m + r + 8 (i / 2). c must be zero on entry.
  template <int N, class Operand>
  FUSEDRNN_DEVICE void accumulate(const Operand& b_operand, float (&c)[N][kTiles][4]) const {
    const int lane = threadIdx.x % kWarp, r = lane / 4, q = lane % 4;
    // An mma waits for the one before it in its chain. Few tiles get two chains each.
    constexpr bool kTwoChains = N * kTiles < 3;
    float other[kTwoChains ? N : 1][kTwoChains ? kTiles : 1][4] = {};
    unroll<kPairs>([&](auto j) {
      Words b[N];
      unroll<N>([&](auto n) { b[n] = b_operand.load(8 * n + r, j * kPairK + 4 * q * kPerWord); });
      unroll<kTiles>([&](auto m) {
        unroll<N>([&](auto n) {
          float (&second)[4] = kTwoChains ? other[kTwoChains ? n : 0][kTwoChains ? m : 0] : c[n][m];
          mma<Element>(c[n][m], a_[m][j][0], b[n].word[0], b[n].word[1]);
          mma<Element>(second, a_[m][j][1], b[n].word[2], b[n].word[3]);
        });
      });
    });
    if constexpr (kTwoChains) {
      unroll<N>([&](auto n) {
        unroll<kTiles>([&](auto m) { unroll<4>([&](auto i) { c[n][m][i] += other[n][m][i]; }); });
      });
    }
  }

  template <int kRows, class Operand>
  FUSEDRNN_DEVICE void multiply(const Operand& b, float* partials, int stride, void*) const {
    constexpr int N = kRows / 8;
    const int lane = threadIdx.x % kWarp, r = lane / 4, q = lane % 4;
    float c[N][kTiles][4] = {};
    accumulate(b, c);
    unroll<N>([&](auto n) {
      unroll<kTiles>([&](auto m) {
        unroll<4>([&](auto i) {
          partials[(8 * n + 2 * q + i % 2) * stride + 16 * m + r + i / 2 * 8] = c[n][m][i];
        });
      });
    });
  }

 private:
  static constexpr int kPerWord = 4 / sizeof(Element);
  static constexpr int kPairK = 16 * kPerWord;  ///< K of two mma
  static constexpr int kPairs = kK / kPairK;
  static_assert(kK % kPairK == 0 && 16 * kPairK * sizeof(Element) == kLoadScratchBytes);
  uint32_t a_[kTiles][kPairs][2][4];
};

/// By float32 multiply-adds. A lane has one or two rows of A; if A has only 16 rows, half a row's
/// K. B goes through scratch memory, a few rows at a time.
template <int kTiles_, int kK_>
class FmaGemm {
 public:
  using Element = float;
  static constexpr int kTiles = kTiles_, kK = kK_;
  static constexpr int kStagedRows = 4;  ///< of B at a time
  static constexpr int kScratchFloats = kStagedRows * (kK + 4);
  static constexpr int kLoadScratchBytes = 0;

  template <class Weight>
  FUSEDRNN_DEVICE void load(const Weight& weight, void*) {
    unroll<kOwnRows>([&](auto i) {
      unroll<kOwnK>([&](auto k) {
        a_[i][k] = own_row(i) < 16 * kTiles ? weight.at(own_row(i), first_k() + k) : 0.f;
      });
    });
  }

  static FUSEDRNN_DEVICE void set_operand(float& to, float value) { to = value; }

  template <int kRows, class Operand>
  FUSEDRNN_DEVICE void multiply(const Operand& b, float* partials, int stride,
                                void* scratch) const {
    const int lane = threadIdx.x % kWarp;
    float* const staged = static_cast<float*>(scratch);  // [kStagedRows, kK + 4]
#pragma unroll 1
    for (int first = 0; first < kRows; first += kStagedRows) {
      for (int i = lane; i < kStagedRows * kK / 4; i += kWarp) {
        const int n = i / (kK / 4), k = i % (kK / 4) * 4;
        *reinterpret_cast<Words*>(staged + n * (kK + 4) + k) = b.load(first + n, k);
      }
      sync_warp();
      float c[kOwnRows][kStagedRows] = {};
      unroll<kOwnK / 4>([&](auto k) {
        unroll<kStagedRows>([&](auto n) {
          const Words w =
              *reinterpret_cast<const Words*>(staged + n * (kK + 4) + first_k() + 4 * k);
          unroll<4>([&](auto j) {
            const float value = scalar::bit_cast<float>(w.word[j]);
            unroll<kOwnRows>([&](auto i) { c[i][n] += a_[i][4 * k + j] * value; });
          });
        });
      });
      unroll<kOwnRows>([&](auto i) {
        unroll<kStagedRows>([&](auto n) {
          float sum = c[i][n];
          if constexpr (kLanesPerRow == 2) sum += shuffle_xor(sum, 16);
          const bool stores = kLanesPerRow == 2 ? lane < 16 : own_row(i) < 16 * kTiles;
          if (stores) partials[(first + n) * stride + own_row(i)] = sum;
        });
      });
      sync_warp();
    }
  }

 private:
  static constexpr int kLanesPerRow = kTiles == 1 ? 2 : 1;
  static constexpr int kOwnK = kK / kLanesPerRow;
  static constexpr int kOwnRows = kLanesPerRow == 2 ? 1 : (16 * kTiles + kWarp - 1) / kWarp;
  static_assert(kOwnK % 4 == 0);
  static FUSEDRNN_DEVICE int own_row(int i) {
    const int lane = threadIdx.x % kWarp;
    return kLanesPerRow == 2 ? lane % 16 : lane + kWarp * i;
  }
  static FUSEDRNN_DEVICE int first_k() {
    return kLanesPerRow == 2 ? int(threadIdx.x % kWarp / 16) * kOwnK : 0;
  }
  float a_[kOwnRows][kOwnK];
};

}  // namespace fusedrnn::cuda
