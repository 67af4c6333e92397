// Random masks, the same for a seed on every backend.
//
// Philox 4x32-10 (Salmon et al. 2011), keyed by the seed. Each counter gives four words. A value is
// true where its word is below a threshold. Value 64 w + l of a block of 256 is word w of the
// block's counter l. So a mask does not depend on vectors, nor on the division over threads.
#pragma once

#include "target.h"

namespace fusedrnn::FUSEDRNN_TARGET {

inline constexpr int kPhiloxRounds = 10;
inline constexpr int kMaskCounters = 64;                  ///< of a block
inline constexpr int64_t kMaskBlock = 4 * kMaskCounters;  ///< its values

struct PhiloxKey {
  uint32_t word[2];
  explicit FUSEDRNN_INLINE PhiloxKey(uint64_t seed) : word{uint32_t(seed), uint32_t(seed >> 32)} {}
  /// For the next round.
  FUSEDRNN_INLINE void advance() {
    word[0] += 0x9E3779B9;
    word[1] += 0xBB67AE85;
  }
};

FUSEDRNN_INLINE void philox_round(uint32_t& w0, uint32_t& w1, uint32_t& w2, uint32_t& w3,
                                  const PhiloxKey& key) {
  const uint64_t a = uint64_t(0xD2511F53) * w0, b = uint64_t(0xCD9E8D57) * w2;
  w0 = uint32_t(b >> 32) ^ w1 ^ key.word[0];
  w1 = uint32_t(b);
  w2 = uint32_t(a >> 32) ^ w3 ^ key.word[1];
  w3 = uint32_t(a);
}

}  // namespace fusedrnn::FUSEDRNN_TARGET
