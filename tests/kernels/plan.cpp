// Prints the split of layers over threads. Arguments: for each layer ten numbers: rows, steps,
// input size, hidden size, lanes, rows of a tile, threads, bytes of L1, L2 and L3.
#include "../../csrc/cpu/plan.h"

#include <cstdio>
#include <cstdlib>

using namespace fusedrnn::cpu;

int main(int count, char** arguments) {
  for (int i = 1; i + 9 < count; i += 10) {
    int64_t n[10];
    for (int k = 0; k < 10; ++k) n[k] = std::atoll(arguments[i + k]);
    const int64_t blocks = (n[3] + n[4] - 1) / n[4];
    LayerWork work{};
    work.rows = n[0];
    work.steps = n[1];
    work.input_size = n[2];
    work.output_size = n[3];
    work.vectors = 4 * blocks;
    work.parts = blocks;
    work.tile_rows = n[5];
    work.vector_bytes = 4 * n[4];
    work.vector_cycles = n[4] == 16 ? 2 : 1;
    work.input_vector_cycles = work.vector_cycles;
    work.packs_in_step = n[1] == 1;
    const Caches caches{n[7], n[8], n[9]};
    const bool gemm = n[1] > 4 && multiplies_input(work, caches);
    const Split split = choose_split(work, gemm, n[6], caches);
    std::printf("%lld %lld %d %.0f\n", (long long)split.members, (long long)split.groups, gemm,
                split.cycles);
  }
}
