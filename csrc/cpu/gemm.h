// GEMM drivers: prepack matrices, and split the kernel table's GEMMs over threads.
#pragma once

#include <algorithm>

#include "kernel_table.h"
#include "parallel.h"
#include "scratch.h"

namespace fusedrnn::cpu {

using scalar::divide_up;

template <class Element>
const KernelsOf<Accumulator<Element>, Element>& table() {
  if constexpr (std::is_same_v<Element, float>) {
    return kernels().f32;
  } else if constexpr (std::is_same_v<Element, double>) {
    return kernels().f64;
  } else {
    return *kernels().bf16;
  }
}

template <class Element>
const Kernel<Accumulator<Element>, Element>& kernel_of(const CellInfo& cell) {
  return table<Element>().cells[cell.index];
}

/// Prepacking an element takes about as long as this many multiplications.
constexpr int64_t kPrepackWork = 8;

/// Calls prepack(i) for every panel, in parallel from 65536 elements on.
template <class F>
void prepack_all(int64_t panels, int64_t elements, const F& prepack) {
  if (elements < kSharedWork / kPrepackWork) {
    for (int64_t i = 0; i < panels; ++i) prepack(i);
  } else {
    in_parallel(panels, kPrepackWork * elements, prepack);
  }
}

/// Whether to prepack a matrix with `columns` columns, read by `passes` tiles. Prepacking takes
/// about four passes: T 100 and B 64 make 1100 in 6-row tiles. Only whole column vectors can be
/// read in place.
template <class Accum>
bool pays_to_prepack(int64_t passes, int64_t columns) {
  return passes > 4 || columns % table<Accum>().common.lanes != 0;
}

/// Prepacks matrices [K, columns]: a piece each, [K, whole vectors].
template <class Accum>
Scratch<Accum> prepack_matrices(c10::ArrayRef<const Accum*> matrices, int64_t K, int64_t columns,
                                int64_t row_stride, int64_t column_stride) {
  const Common<Accum>& common = table<Accum>().common;
  const int64_t blocks = divide_up(columns, common.block_columns);
  const int64_t width = divide_up(columns, common.lanes) * common.lanes;
  const int64_t count = int64_t(matrices.size());
  Scratch<Accum> panels(count, K * width);
  prepack_all(count * blocks, count * K * columns, [&](int64_t i) {
    common.prepack_gemm(matrices[i / blocks], row_stride, column_stride, K, columns, i % blocks,
                        panels[i / blocks]);
  });
  return panels;
}

/// Prepacks one weight of all directions.
template <class Accum>
Scratch<Accum> prepack_weights(const Layer& layer, Tensor DirectionWeights::* weight, int64_t K,
                               int64_t columns, int64_t row_stride, int64_t column_stride) {
  c10::SmallVector<const Accum*, 2> matrices;
  for (const DirectionWeights& w : layer.weights) {
    matrices.push_back((w.*weight).template const_data_ptr<Accum>());
  }
  return prepack_matrices<Accum>(matrices, K, columns, row_stride, column_stride);
}

/// Splits a GEMM's rows into calls gemm(begin, end). The GEMM has `work` multiplications.
template <class Accum, class F>
void in_row_parts(int64_t rows, int64_t work, const F& gemm) {
  const int64_t most = work < kSharedWork ? 1 : threads();
  const int64_t parts = std::clamp<int64_t>(rows / table<Accum>().common.tile_rows, 1, most);
  in_parallel(parts, work,
              [&](int64_t part) { gemm(rows * part / parts, rows * (part + 1) / parts); });
}

/// Weight-gradient GEMMs, on the kernels' tiles.
template <class Accum>
struct TileGemms : Gemms {
  void multiply(const Tensor& a, const Tensor& b, const Tensor& out, bool add) const override {
    const Common<Accum>& common = table<Accum>().common;
    const int64_t rows = a.size(0), K = b.size(0), columns = b.size(1);
    const Accum* matrix = b.const_data_ptr<Accum>();
    const bool prepacks = pays_to_prepack<Accum>(divide_up(rows, common.tile_rows), columns);
    const Scratch<Accum> panels =
        prepacks ? prepack_matrices<Accum>({matrix}, K, columns, columns, 1) : Scratch<Accum>();
    const Accum* a_data = a.const_data_ptr<Accum>();
    Accum* out_data = out.data_ptr<Accum>();
    in_row_parts<Accum>(rows, rows * K * columns, [&](int64_t begin, int64_t end) {
      common.gemm(end - begin, K, columns, prepacks ? panels[0] : matrix, prepacks ? 0 : columns,
                  a_data + begin * a.stride(0), a.stride(0), out_data + begin * out.stride(0),
                  out.stride(0), add);
    });
  }
  void multiply_transposed(const Tensor& a, const Tensor& b, const Tensor& out) const override {
    const int64_t K = a.size(0), rows = a.size(1), columns = b.size(1);
    in_row_parts<Accum>(rows, K * rows * columns, [&](int64_t begin, int64_t end) {
      table<Accum>().common.gemm_transposed(
          K, end - begin, columns, a.const_data_ptr<Accum>() + begin, a.stride(0),
          b.const_data_ptr<Accum>(), b.stride(0), out.data_ptr<Accum>() + begin * out.stride(0),
          out.stride(0));
    });
  }
};

}  // namespace fusedrnn::cpu
