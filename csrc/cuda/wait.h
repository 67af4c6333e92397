// The waits of a CTA for another CTA: who waits, and for how long at most.
//
// A CTA that never writes, a lost store or a barrier with a wrong count would otherwise hang the
// process: a persistent kernel can't be interrupted. So such a wait ends after 10 s with an error
// that names the layer.
#pragma once

#include "../target.h"

namespace fusedrnn::cuda {

/// The layer whose CTA waits, for the error of a wait that does not end.
struct Waiter {
  const char* name;  ///< in device memory; as "lstm, persistent_cluster, BFloat16"
  int hidden_size, rows;
};
/// The error, as a format of a Waiter's members.
#define FUSEDRNN_WAIT_ERROR \
  "fusedrnn: %s, hidden size %d, batch %d: a CTA waited 10 s for another CTA"

/// How long a thread has waited. It looks at the clock in every 64th try.
///
/// Waits take microseconds. 10 s are far above everything that only slows a kernel down, as
/// compute-sanitizer does by up to a thousand times. The GPU's clock goes on while a debugger holds
/// the kernel, and while other processes have the GPU. So a wait counts ticks of 1/8 s in which the
/// thread ran: a jump of the clock counts as one tick.
class WaitTime {
 public:
  /// After a try that failed: whether to look at the clock.
  FUSEDRNN_INLINE bool looks() { return ++tries_ % kTries == 0; }
  /// Whether the limit is over. `now`: nanoseconds.
  FUSEDRNN_INLINE bool is_over(uint64_t now) {
    const uint32_t tick = uint32_t(now >> kTickBits);
    ticks_ += tick != last_;
    last_ = tick;
    return ticks_ > kTicks;
  }

  static constexpr uint32_t kTries = 64;
  static constexpr int kTickBits = 27;  ///< a tick is 2^27 ns
  static constexpr uint32_t kTicks = (uint64_t(10) * 1000000000 >> kTickBits) + 1;

 private:
  uint32_t tries_ = 0, ticks_ = 0, last_ = 0;
};

}  // namespace fusedrnn::cuda
