// GEMMs of a warp whose matrix A stays in registers.
//
// partials [kRows, stride] = B [kRows, kK] * (A [16 * kTiles, kK])^T, kRows a multiple of 8. A is
// the warp's part of weight_hh. B's rows are the batch rows' h or gate gradients.
#pragma once

#include "../target.h"
#include "approximations.cuh"

namespace fusedrnn::cuda {

using scalar::unroll;

constexpr int kWarp = 32;

/// Elements in 16 bytes, which one load takes.
template <class Element>
constexpr int kPerWords = 16 / int(sizeof(Element));

/// Where an operand lies in shared memory, in rows `stride` elements apart.
///
/// The 16-byte parts of a row change places by the row. A warp's loads for an mma use all banks,
/// and so do its stores of eight units and four rows.
template <class Element>
FUSEDRNN_INLINE constexpr int operand_offset(int row, int k, int stride) {
  constexpr int n = kPerWords<Element>;
  return row * stride + (k / n ^ row / 2 % 4) * n + k % n;
}

/// Where a GEMM loads B, aligned to 16 bytes.
template <class Element>
struct SharedOperand {
  const Element* data;
  int stride;
  FUSEDRNN_DEVICE Words load(int row, int k) const {
    return load(data + operand_offset<Element>(row, k, stride));
  }
  static FUSEDRNN_DEVICE Words load(const Element* p) { return *reinterpret_cast<const Words*>(p); }
};
/// B as what load(j, n) gives: the lane's 16 bytes for the j-th two mma, of rows 8 n to 8 n + 7.
template <class Load>
struct EachOperand {
  Load load;
  /// Calls f(j, words) for all j < kParts; words: of N rows.
  template <int kParts, int N, class F>
  FUSEDRNN_DEVICE void for_each(const F& f) const {
    unroll<kParts>([&](auto j) {
      Words words[N];
      unroll<N>([&](auto n) { words[n] = load(j, n); });
      f(j, words);
    });
  }
};
template <class Load>
EachOperand(Load) -> EachOperand<Load>;

/// The activations behind a GEMM by tensor cores.
template <class Element>
using TensorCoreActivations =
    std::conditional_t<std::is_same_v<Element, BFloat16>, RoughActivations, ApproximateActivations>;

/// A type's mma: K = 16 for the half types, 8 for TF32.
template <class Element>
FUSEDRNN_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(Element) == 2) {
    mma_m16n8k16<Element>(c, a, b0, b1);
  } else {
    mma_m16n8k8(c, a, b0, b1);
  }
}

/// Values rounded to nearest, ties to even; two of a half type in a register.
template <class Element, int count>
class Rounded {
 public:
  FUSEDRNN_DEVICE void set(const float (&values)[count]) {
    unroll<kWords>([&](auto i) {
      if constexpr (sizeof(Element) == 4) {
        word_[i] = scalar::bit_cast<uint32_t>(values[i]);
      } else if constexpr (2 * i + 1 < count) {
        word_[i] = pack<Element>(values[2 * i], values[2 * i + 1]);
      } else {
        Element last;
        round_to(last, values[2 * i]);
        word_[i] = last.bits;
      }
    });
  }
  FUSEDRNN_DEVICE Element at(int i) const {
    if constexpr (sizeof(Element) == 4) {
      return scalar::bit_cast<Element>(word_[i]);
    } else {
      return {uint16_t(word_[i / 2] >> i % 2 * 16)};
    }
  }

 private:
  static constexpr int kWords = sizeof(Element) == 4 ? count : (count + 1) / 2;
  uint32_t word_[kWords] = {};
};

/// How a lane reads a row of weights: 16 bytes at a time where all rows are aligned.
template <class Element>
class WeightRow {
 public:
  /// `row`: null for zeros. `end`: the row's elements.
  FUSEDRNN_DEVICE WeightRow(const Element* row, int end, bool is_aligned)
      : row_(row), end_(row ? end : 0), is_aligned_(is_aligned) {}

  FUSEDRNN_DEVICE bool is_aligned() const { return is_aligned_; }

  /// Elements [k, k + count), zeros past the end.
  template <int count>
  FUSEDRNN_DEVICE void load(int k, Element (&to)[count]) const {
    is_aligned_ ? load_as<true>(k, to) : load_as<false>(k, to);
  }

  /// 16 bytes from element k on, zeros past the end, which is a multiple of 16 bytes in an aligned
  /// row.
  template <bool kAligned>
  FUSEDRNN_DEVICE Words words(int k) const {
    if constexpr (kAligned) {
      return load_words_if(k < end_, row_ + k);
    } else {
      Element values[kPerWords<Element>];
      unroll<kPerWords<Element>>(
          [&](auto i) { values[i] = k + i < end_ ? row_[k + i] : Element{}; });
      Words w = scalar::bit_cast<Words>(values);
      // Packed here, or a kernel's registers would hold all weights unpacked until both ways meet.
      unroll<4>([&](auto i) { w.word[i] = kept(w.word[i]); });
      return w;
    }
  }

 private:
  template <bool kAligned, int count>
  FUSEDRNN_DEVICE void load_as(int k, Element (&to)[count]) const {
    constexpr int n = kPerWords<Element>;
    static_assert(count % n == 0);
    unroll<count / n>([&](auto i) {
      const Words w = words<kAligned>(k + i * n);
      __builtin_memcpy(&to[i * n], &w, sizeof(w));
    });
  }

  const Element* row_;
  int end_;
  bool is_aligned_;
};

/// By tensor cores, with results that stay in the lanes' fragments.
///
/// A has kRowGroups groups of eight rows. With lane = 4 r + q, the lane gets row r of each group
/// for B's rows 2 q and 2 q + 1. A sum over k may take any order. This order puts a lane's operands
/// for two mma next to each other, 16 bytes, in memory too.
///
/// Operand is the type that tensor cores multiply, Element that of the weights in memory. TF32 and
/// float16 have the same mantissa: where B is at most 1, float32 weights become float16, each row
/// scaled by a power of two.
template <class Operand_, class Element_, int kRowGroups_, int kK_>
class FragmentGemm {
 public:
  using Operand = Operand_;
  using Element = Element_;
  using Activations = TensorCoreActivations<Operand>;
  static constexpr int kRowGroups = kRowGroups_, kK = kK_;
  static constexpr int kTiles = (kRowGroups + 1) / 2;
  static constexpr int kLoadScratchBytes = 0;  ///< per warp, for load()
  static constexpr bool kScaled = sizeof(Element) == 4 && sizeof(Operand) == 2;
  static constexpr int kPerPair = kScaled ? 2 : 1;  ///< loads of 16 bytes for two mma

  /// row(group): the lane's row as a WeightRow. first_k: of the warp.
  ///
  /// A batch is on its way while the one before it is set: 8 loads or more, where A has so many.
  /// There is a branch in each. Without branches the compiler asks for all at once, and spills.
  template <class Row>
  FUSEDRNN_DEVICE void load(const Row& row, int first_k) {
    constexpr int kLoads = kPairs * kPerPair, kGroups = kLoads < 8 ? 8 / kLoads : 1;
    const int k = first_k + threadIdx.x % 4 * kPerWords<Operand>;
    Words next[kGroups][kLoads], now[kGroups][kLoads];
    const auto each = [](auto batch, const auto& f) {
      unroll<kGroups>([&](auto i) {
        if constexpr (batch * kGroups + i < kRowGroups) {
          f(std::integral_constant<int, batch * kGroups + i>{}, i);
        }
      });
    };
    const auto load_as = [&](auto batch, auto is_aligned) {
      each(batch, [&](auto group, auto i) {
        unroll<kLoads>([&](auto j) {
          constexpr int offset = j / kPerPair * kPairK + j % kPerPair * kPerWords<Element>;
          next[i][j] = row(group).template words<is_aligned>(k + offset);
        });
      });
    };
    const auto load_batch = [&](auto batch) {
      if (row(std::integral_constant<int, 0>{}).is_aligned()) {
        load_as(batch, std::true_type{});
      } else {
        load_as(batch, std::false_type{});
      }
    };
    load_batch(std::integral_constant<int, 0>{});
    unroll<(kRowGroups + kGroups - 1) / kGroups>([&](auto batch) {
      each(batch, [&](auto, auto i) { unroll<kLoads>([&](auto j) { now[i][j] = next[i][j]; }); });
      load_batch(std::integral_constant<int, batch + 1>{});
      each(batch, [&](auto group, auto i) { set_row(group, now[i]); });
    });
    if constexpr (kRowGroups % 2) {
      unroll<kPairs>([&](auto j) { set(kRowGroups, j, Words{}); });
    }
  }

  /// Rounds a value to B's type.
  static FUSEDRNN_DEVICE void set_operand(Operand& to, float value) {
    if constexpr (sizeof(Operand) == 4) {
      to = scalar::bit_cast<float>(tf32_of(value));
    } else {
      to.bits = uint16_t(pack<Operand>(kScaled ? value * kOperandScale : value, 0));
    }
  }

  /// c += A B^T. c[n][group / 2][2 (group % 2) + i] is the result for B's row 8 n + 2 q + i.
  /// b: B, as EachOperand.
  template <int N, class B>
  FUSEDRNN_DEVICE void accumulate(const B& b, float (&c)[N][kTiles][4]) const {
    accumulate_tiles<0>(b, c);
  }

  /// The same for some of A's tiles, from kFirst on.
  template <int kFirst, int N, int kCount, class B>
  FUSEDRNN_DEVICE void accumulate_tiles(const B& b, float (&c)[N][kCount][4]) const {
    // An mma waits for the one before it in its chain. Few tiles get two chains each, or four.
    constexpr int kShort = N * kCount >= 3 ? 1 : 2;
    constexpr int kChains = N * kCount == 1 && kPairs >= 8 ? 4 : kShort;
    float other[kChains][N][kCount][4] = {};
    b.template for_each<kPairs, N>([&](auto j, const Words(&words)[N]) {
      unroll<2>([&](auto s) {
        constexpr int chain = (2 * j + s) % kChains;
        unroll<kCount>([&](auto m) {
          unroll<N>([&](auto n) {
            float (&sum)[4] = chain ? other[chain][n][m] : c[n][m];
            mma<Operand>(sum, a_[kFirst + m][j][s], words[n].word[2 * s], words[n].word[2 * s + 1]);
          });
        });
      });
    });
    unroll<kChains / 2>([&](auto pair) {  // two chains, or four as (0 + 1) + (2 + 3)
      if constexpr (pair > 0) {
        unroll<N>([&](auto n) {
          unroll<kCount>(
              [&](auto m) { unroll<4>([&](auto i) { other[2][n][m][i] += other[3][n][m][i]; }); });
        });
      }
    });
    if constexpr (kChains > 1) {
      unroll<N>([&](auto n) {
        unroll<kCount>([&](auto m) {
          unroll<4>([&](auto i) {
            c[n][m][i] += other[1][n][m][i];
            if constexpr (kChains > 2) c[n][m][i] += other[2][n][m][i];
          });
        });
      });
    }
  }

  /// Undoes the scales of sums.
  template <int N>
  FUSEDRNN_DEVICE void unscale(float (&c)[N][kTiles][4]) const {
    if constexpr (kScaled) {
      unroll<N>([&](auto n) {
        unroll<kRowGroups>([&](auto group) {
          unroll<2>([&](auto i) { c[n][group / 2][group % 2 * 2 + i] *= unscale_[group]; });
        });
      });
    }
  }

  static constexpr int kPairK = 64 / int(sizeof(Operand));  ///< K of two mma
  static constexpr int kPairs = kK / kPairK;
  static_assert(kK % kPairK == 0);

 protected:
  FUSEDRNN_DEVICE void set(int group, int j, const Words& w) {
    unroll<4>([&](auto i) { a_[group / 2][j][i / 2][group % 2 + i % 2 * 2] = w.word[i]; });
  }

 private:
  /// B's scale, 2^14: 1 is far from float16's smallest and largest then.
  static constexpr int kOperandExponent = 14;
  static constexpr float kOperandScale = 1 << kOperandExponent;

  /// Sets the lane's part of a row, from its 16 bytes in memory.
  template <int kLoads>
  FUSEDRNN_DEVICE void set_row(int group, const Words (&words)[kLoads]) {
    const auto value = [&](int i) { return scalar::bit_cast<float>(words[i / 4].word[i % 4]); };
    if constexpr (!kScaled) {
      unroll<kPairs>([&](auto j) {
        Words w = words[j];
        if constexpr (sizeof(Element) == 4) {
          unroll<4>([&](auto i) { w.word[i] = tf32_of(value(4 * j + i)); });
        }
        set(group, j, w);
      });
    } else {
      const float scale = row_scale<8 * kPairs>(value);
      unscale_[group] = scalar::bit_cast<float>(((254u - kOperandExponent) << 23) -
                                                scalar::bit_cast<uint32_t>(scale));
      unroll<kPairs>([&](auto j) {
        Words w;
        unroll<4>([&](auto i) {
          w.word[i] = pack<Operand>(value(8 * j + 2 * i) * scale, value(8 * j + 2 * i + 1) * scale);
        });
        set(group, j, w);
      });
    }
  }

  /// The power of two that brings the largest of a row's elements, of which four lanes have `count`
  /// each, to 2^14 or more and less than 2^15. At most 2^112: its inverse, and that of its product
  /// with B's scale, are normal numbers. With an infinity any scale will do: the row's results are
  /// not finite.
  template <int count, class Value>
  static FUSEDRNN_DEVICE float row_scale(const Value& value) {
    float largest[4] = {};
    unroll<count>([&](auto i) { largest[i % 4] = larger_size(largest[i % 4], value(i)); });
    unroll<3>([&](auto i) { largest[0] = larger_size(largest[0], largest[i + 1]); });
    unroll<2>(
        [&](auto i) { largest[0] = larger_size(largest[0], shuffle_xor(largest[0], 1 << i)); });
    const int exponent = int(scalar::bit_cast<uint32_t>(largest[0]) >> 23);
    return scalar::bit_cast<float>(uint32_t(exponent < 29 ? 239 : 268 - exponent) << 23);
  }

  uint32_t a_[kTiles][kPairs][2][4];
  float unscale_[kScaled ? kRowGroups : 1];
};

/// FragmentGemm whose A has columns that are contiguous in memory, for products with weight_hh
/// transposed.
template <class Element_, int kRowGroups_, int kK_>
class TransposedGemm : public FragmentGemm<Element_, Element_, kRowGroups_, kK_> {
 public:
  using Element = Element_;
  using Base = FragmentGemm<Element_, Element_, kRowGroups_, kK_>;
  static constexpr int kRowGroups = kRowGroups_, kPairs = Base::kPairs;

  /// A *part* is eight rows of A for two mma, the 16 bytes of all lanes. Parts that are loaded
  /// together lie in scratch memory. The space between them spreads a warp's stores over all banks.
  static constexpr int kTogether = 8 / kRowGroups;  ///< K, in two mma each
  static constexpr int kPartStride = (kWarp + 8 / kRowGroups % 8) * 16;
  static constexpr int kLoadScratchBytes = 8 * kPartStride;
  static_assert(8 % kRowGroups == 0);

  /// weight.words<is_aligned>(row, k): 16 bytes of A's column k, from a row on. first_row: the
  /// warp's first row of A.
  template <class Weight>
  FUSEDRNN_DEVICE void load(const Weight& weight, int first_row, void* scratch) {
    if (weight.is_aligned) {
      load_as<true>(weight, first_row, scratch);
    } else {
      load_as<false>(weight, first_row, scratch);
    }
    if constexpr (kRowGroups == 1) {
      unroll<kPairs>([&](auto j) { this->set(1, j, Words{}); });
    }
  }

 private:
  static constexpr int kPerPart = 8 / kPerWords<Element>;  ///< 16 bytes in a part's column
  static constexpr int kPerColumn = kRowGroups * kPerPart;
  static constexpr int kLaneColumns = kWarp / kPerColumn;  ///< that a warp loads at a time

  /// 8 times 16 bytes a lane are on their way while the 8 before them are transposed.
  template <bool is_aligned, class Weight>
  FUSEDRNN_DEVICE void load_as(const Weight& weight, int first_row, void* scratch) {
    const int lane = threadIdx.x % kWarp, column = lane / kPerColumn;
    const int row = first_row + lane % kPerColumn * kPerWords<Element>;
    const int lane_k = k_of(column);
    const auto words = [&](auto j, auto i) {  // lanes that are neighbours: of one column
      constexpr int pair = j + i / kRowGroups;
      if constexpr (pair < kPairs) {
        constexpr int k = pair * Base::kPairK + k_of(i * kLaneColumns % Base::kPairK);
        return weight.template words<is_aligned>(row, k | lane_k);
      } else {
        return Words{};
      }
    };
    unsigned char* const place = static_cast<unsigned char*>(scratch) +
                                 lane % kPerColumn / kPerPart * kPartStride +
                                 (column * kPerPart + lane % kPerPart) * 16;
    Words next[8], now[8];
    unroll<8>([&](auto i) { next[i] = words(std::integral_constant<int, 0>{}, i); });
    unroll<(kPairs + kTogether - 1) / kTogether>([&](auto batch) {
      constexpr int j = batch * kTogether;
      unroll<8>([&](auto i) {
        now[i] = next[i];
        next[i] = words(std::integral_constant<int, j + kTogether>{}, i);
      });
      unroll<8>([&](auto i) {
        constexpr int first_column = i * kLaneColumns % Base::kPairK;
        constexpr int at = i / kRowGroups * kRowGroups * kPartStride + first_column * kPerPart * 16;
        *reinterpret_cast<Words*>(place + at) = now[i];
      });
      sync_warp();
      unroll<8>([&](auto part) {
        constexpr int group = part % kRowGroups, pair = j + part / kRowGroups;
        if constexpr (pair < kPairs) {
          this->set(group, pair,
                    transposed(static_cast<unsigned char*>(scratch) + part * kPartStride));
        }
      });
      sync_warp();
    });
  }
  /// The k of a part's i-th column in scratch memory, so that transposed() uses all banks. It moves
  /// i's bits to other places.
  static FUSEDRNN_INLINE constexpr int k_of(int i) {
    if constexpr (sizeof(Element) == 2) return i % 8 / 2 * 8 + i / 8 * 2 + i % 2;
    return i % 4 * 4 + i / 4;
  }
  /// The lane's words of a part: its row at 16 bytes of K.
  static FUSEDRNN_DEVICE Words transposed(const unsigned char* part) {
    const int lane = threadIdx.x % kWarp;
    Words w;
    if constexpr (sizeof(Element) == 2) {
      load_matrix_trans(w.word, part + lane * 16);
    } else {
      const float* const p = reinterpret_cast<const float*>(part) + lane % 4 * 8 + lane / 4;
      unroll<4>([&](auto i) { w.word[i] = tf32_of(p[i * 32]); });
    }
    return w;
  }
};

/// Stores operands that are neighbours in K in a row of shared memory, from operand k on, by the
/// widest stores that their number allows. Their first is at a multiple of their number. `first`:
/// operand_offset(row, k, stride).
template <class Operand, int count>
FUSEDRNN_DEVICE void store_neighbours(const float (&values)[count], Operand* rows, int row, int k,
                                      int stride, int first) {
  constexpr int bytes = count * int(sizeof(Operand));
  constexpr int width = bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : 2;
  constexpr int per_store = width / int(sizeof(Operand));
  const auto place = [&](int i) {
    return rows + (i ? operand_offset<Operand>(row, k + i, stride) : first);
  };
  if constexpr (width == 2) {
    Rounded<Operand, count> rounded;
    rounded.set(values);
    unroll<count>([&](auto i) { *place(i) = rounded.at(i); });
  } else {
    struct alignas(width) Store {
      uint32_t word[width / 4];
    };
    unroll<count / per_store>([&](auto store) {
      Store words;
      unroll<width / 4>([&](auto i) {
        if constexpr (sizeof(Operand) == 4) {
          words.word[i] = tf32_of(values[store * per_store + i]);
        } else {
          words.word[i] = pack<Operand>(values[store * per_store + 2 * i],
                                        values[store * per_store + 2 * i + 1]);
        }
      });
      *reinterpret_cast<Store*>(place(store * per_store)) = words;
    });
  }
}

/// By float32 multiply-adds. A lane has one or two rows of A; if A has only 16 rows, half a row's
/// K. B goes through scratch memory, a few rows at a time.
template <int kTiles_, int kK_>
class FmaGemm {
 public:
  using Element = float;
  using Activations = scalar::ExactActivations;
  static constexpr int kTiles = kTiles_, kK = kK_;
  static constexpr int kStagedRows = 4;  ///< of B at a time
  static constexpr int kScratchFloats = kStagedRows * (kK + 4);
  static constexpr int kLoadScratchBytes = 0;

  /// row(i): A's row i, with load() as in WeightRow.
  template <class Row>
  FUSEDRNN_DEVICE void load(const Row& row, int warp_k, void*) {
    unroll<kOwnRows>([&](auto i) {
      if (own_row(i) < 16 * kTiles) row(own_row(i)).load(warp_k + first_k(), a_[i]);
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
  float a_[kOwnRows][kOwnK] = {};
};

}  // namespace fusedrnn::cuda
