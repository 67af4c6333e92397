// The ops on the CPU: allocates, packs weights, runs the kernels, registers for the CPU key.
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../layer.h"
#include "kernels.h"
#include "schedule.h"

namespace fusedrnn::cpu {
namespace {

template <class S>
const S* const_data(const Tensor& t) {
  return t.defined() ? static_cast<const S*>(t.const_data_ptr()) : nullptr;
}

template <class S>
const KernelsOf<Accumulator<S>, S>& table() {
  if constexpr (std::is_same_v<S, float>) {
    return kernels().f32;
  } else if constexpr (std::is_same_v<S, double>) {
    return kernels().f64;
  } else {
    return *kernels().bf16;
  }
}

template <class S>
const Kernel<Accumulator<S>, S>& kernel(const Layer& layer) {
  return table<S>().cells[layer.cell.index];
}

using scalar::divide_up;
using scalar::round_up;

/// A new tensor on the CPU, without a call of the dispatcher.
template <class S>
Tensor new_tensor(c10::IntArrayRef shape) {
  using Scalar = std::conditional_t<std::is_same_v<S, BFloat16>, at::BFloat16, S>;
  return Tensor(at::detail::empty_cpu(shape, c10::CppTypeToScalarType<Scalar>::value));
}

/// Memory for the time of a call, `pieces` aligned ones: here if it is little, else torch's.
template <class T>
class Scratch {
 public:
  Scratch() = default;
  Scratch(int64_t pieces, int64_t size) : stride_(round_up(size, 64)), is_set_(true) {
    const size_t bytes = size_t(pieces * stride_) * sizeof(T);
    if (bytes > sizeof(little_)) memory_ = c10::GetCPUAllocator()->allocate(bytes);
  }
  explicit Scratch(int64_t size) : Scratch(1, size) {}
  T* operator[](int64_t i) const {
    void* const begin = memory_ ? memory_.get() : const_cast<unsigned char*>(little_);
    return static_cast<T*>(begin) + i * stride_;
  }
  explicit operator bool() const { return is_set_; }

 private:
  int64_t stride_ = 0;
  bool is_set_ = false;
  c10::DataPtr memory_;
  alignas(64) unsigned char little_[4096];
};

template <class T>
void set_sequence(Sequence<T>& s, const Layer& layer, const Plan& plan, const Shares::Run& run) {
  s.steps = layer.T;
  s.rows = int64_t(run.row.size());
  s.input_size = layer.I;
  s.hidden_size = layer.H;
  s.output_size = layer.P;
  s.reverse = run.direction == 1;
  s.row = run.row.data();
  s.active = run.active.data();
  s.step_offset = plan.step_offset.data();
}

/// The states that a run of direction d starts from.
template <class Run>
void set_initial(Run& s, const Layer& layer, int64_t d) {
  using T = std::remove_const_t<std::remove_pointer_t<decltype(s.h0)>>;
  if (layer.h0.defined()) {
    s.h0 = layer.h0.const_data_ptr<T>() + d * layer.h0.stride(0);
    s.h0_stride = layer.h0.stride(1);
  }
  if (layer.c0.defined()) {
    s.c0 = layer.c0.const_data_ptr<T>() + d * layer.c0.stride(0);
    s.c0_stride = layer.c0.stride(1);
  }
}

/// An element's packing takes about the time of so many multiplications.
constexpr int64_t kPackingWork = 8;

/// Calls pack(i) for every panel, in parallel if there is much to pack.
template <class F>
void pack_all(int64_t panels, int64_t elements, const F& pack) {
  if (elements < kSharedWork / kPackingWork) {
    for (int64_t i = 0; i < panels; ++i) pack(i);
  } else {
    in_parallel(panels, kPackingWork * elements, pack);
  }
}

/// Packs matrices [depth, columns]: a piece each, [depth, whole vectors].
template <class T>
Scratch<T> pack_products(c10::ArrayRef<const T*> matrices, int64_t depth, int64_t columns,
                         int64_t row_stride, int64_t column_stride) {
  const Common<T>& common = table<T>().common;
  const int64_t blocks = divide_up(columns, common.block_columns);
  const int64_t width = divide_up(columns, common.lanes) * common.lanes;
  const int64_t count = int64_t(matrices.size());
  Scratch<T> panels(count, depth * width);
  pack_all(count * blocks, count * depth * columns, [&](int64_t i) {
    common.pack_product(matrices[i / blocks], row_stride, column_stride, depth, columns, i % blocks,
                        panels[i / blocks]);
  });
  return panels;
}

template <class T>
Scratch<T> pack_products(const Layer& layer, Tensor DirectionWeights::* weight, int64_t depth,
                         int64_t columns, int64_t row_stride, int64_t column_stride) {
  c10::SmallVector<const T*, 2> matrices;
  for (const DirectionWeights& w : layer.weights) {
    matrices.push_back((w.*weight).template const_data_ptr<T>());
  }
  return pack_products<T>(matrices, depth, columns, row_stride, column_stride);
}

/// Calls product(begin, end) for parts of the rows of a product of `work` multiplications.
template <class T, class F>
void in_row_parts(int64_t rows, int64_t work, const F& product) {
  const int64_t most = work < kSharedWork ? 1 : threads();
  const int64_t parts = std::clamp<int64_t>(rows / table<T>().common.tile_rows, 1, most);
  in_parallel(parts, work,
              [&](int64_t part) { product(rows * part / parts, rows * (part + 1) / parts); });
}

/// Whether a matrix of `columns` that `passes` tiles read is worth its packing. Only whole vectors
/// of columns can be read as they are.
template <class T>
bool worth_packing(int64_t passes, int64_t columns) {
  return passes > 4 || columns % table<T>().common.lanes != 0;
}

/// out = a b, or += with add; b given by its packed panels or, with a matrix_stride, as it is.
template <class T>
void multiply(int64_t rows, int64_t depth, int64_t columns, const T* panels, int64_t matrix_stride,
              const T* a, int64_t a_stride, T* out, int64_t out_stride, bool add) {
  in_row_parts<T>(rows, rows * depth * columns, [&](int64_t begin, int64_t end) {
    table<T>().common.multiply(end - begin, depth, columns, panels, matrix_stride,
                               a + begin * a_stride, a_stride, out + begin * out_stride, out_stride,
                               add);
  });
}

/// out = a b with b [depth, columns] given by its transpose [columns, depth], contiguous: a block
/// of columns at a time, packed and used while it is in the cache.
template <class S, class T = Accumulator<S>>
void multiply_by_transpose(int64_t rows, int64_t depth, int64_t columns, const S* b, const S* a,
                           int64_t a_stride, T* out, int64_t out_stride) {
  const Common<T, S>& common = table<S>().common;
  const int64_t width = common.block_columns, blocks = divide_up(columns, width);
  const int64_t work = rows * depth * columns, most = work < kSharedWork ? 1 : threads();
  const int64_t parts = std::min(blocks, most);
  in_parallel(parts, work, [&](int64_t part) {
    const Scratch<T> panel(depth * width);
    for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block) {
      const int64_t first = block * width, left = std::min(width, columns - first);
      common.pack_product(b + first * depth, 1, depth, depth, left, 0, panel[0]);
      common.multiply(rows, depth, left, panel[0], 0, a, a_stride, out + first, out_stride, false);
    }
  });
}

/// The products of weight_gradients on this backend's own tiles.
template <class T>
struct OwnGemms : Gemms {
  void multiply(const Tensor& a, const Tensor& b, const Tensor& out, bool add) const override {
    const int64_t depth = b.size(0), columns = b.size(1);
    const int64_t passes = divide_up(a.size(0), table<T>().common.tile_rows);
    const T* matrix = b.const_data_ptr<T>();
    const bool packs = worth_packing<T>(passes, columns);
    const Scratch<T> panels =
        packs ? pack_products<T>({matrix}, depth, columns, columns, 1) : Scratch<T>();
    cpu::multiply<T>(a.size(0), depth, columns, packs ? panels[0] : matrix, packs ? 0 : columns,
                     a.const_data_ptr<T>(), a.stride(0), out.data_ptr<T>(), out.stride(0), add);
  }
  void multiply_transposed(const Tensor& a, const Tensor& b, const Tensor& out) const override {
    const int64_t depth = a.size(0), rows = a.size(1), columns = b.size(1);
    in_row_parts<T>(rows, depth * rows * columns, [&](int64_t begin, int64_t end) {
      table<T>().common.multiply_transposed(
          depth, end - begin, columns, a.const_data_ptr<T>() + begin, a.stride(0),
          b.const_data_ptr<T>(), b.stride(0), out.data_ptr<T>() + begin * out.stride(0),
          out.stride(0));
    });
  }
};

/// A new tensor whose padding, where lengths leave some of its N positions out, is zero: of
/// `shape`, that is [copies, N, features].
template <class S>
Tensor new_at_positions(const Layer& layer, c10::IntArrayRef shape, int64_t copies) {
  const Tensor t = new_tensor<S>(shape);
  if (!layer.lengths.defined() || t.numel() == 0) return t;
  const int64_t* const lengths = layer.lengths.const_data_ptr<int64_t>();
  const int64_t features = t.numel() / (copies * layer.N);
  S* const data = static_cast<S*>(t.mutable_data_ptr());
  in_row_parts<Accumulator<S>>(layer.T, t.numel(), [&](int64_t begin, int64_t end) {
    for (int64_t copy = 0; copy < copies; ++copy) {
      for (int64_t step = begin; step < end; ++step) {
        for (int64_t row = 0; row < layer.B; ++row) {
          S* const at = data + ((copy * layer.T + step) * layer.B + row) * features;
          if (step >= lengths[row]) std::memset(at, 0, size_t(features) * sizeof(S));
        }
      }
    }
  });
  return t;
}

template <class S>
LayerOutput forward(const Layer& layer, bool save) {
  using T = Accumulator<S>;
  const int64_t D = layer.D, G = layer.cell.gates, H = layer.H, P = layer.P;
  LayerOutput out;
  out.output = new_at_positions<S>(layer, layer.shape(D * P), 1);
  out.h_n = new_tensor<T>({D, layer.B, P});
  if (layer.cell.has_cell_state) out.c_n = new_tensor<T>({D, layer.B, H});
  out.saved =
      save ? new_at_positions<T>(layer, {D, layer.N, layer.cell.saved, H}, D) : new_tensor<T>({0});

  const Common<T, S>& common = table<S>().common;
  const Kernel<T, S>& k = kernel<S>(layer);
  const int64_t blocks = divide_up(H, common.lanes);
  const Plan plan(layer);
  const Shares shares(layer, plan, common.tile_rows, blocks);
  // Packing costs as much as reading the weights several times: not for a call of few steps and
  // rows. One step of many rows packs as it goes.
  const bool unpacked = layer.T <= 4 && layer.B <= common.unpacked_rows;
  const bool packs_at_once = !unpacked && layer.T == 1 && !layer.has_projection;
  const bool packs = !unpacked && !packs_at_once;
  // The input's part of the steps is one product over all of them where the batch is too small to
  // fill a tile.
  const bool projects_input = layer.T > 4 && layer.B < common.tile_rows;

  c10::SmallVector<Weights<S>, 2> weights;
  for (const DirectionWeights& w : layer.weights) {
    weights.push_back({projects_input ? nullptr : const_data<S>(w.ih), const_data<S>(w.hh),
                       const_data<S>(w.bias_ih), const_data<S>(w.bias_hh), const_data<S>(w.hr)});
  }
  Scratch<T> x_product;
  const int64_t x_product_stride = divide_up(G * H, common.lanes) * common.lanes;
  if (projects_input) {
    const Tensor x = layer.flat_input();
    x_product = Scratch<T>(D, layer.N * x_product_stride);
    for (int64_t d = 0; d < D; ++d) {
      multiply_by_transpose<S>(layer.N, layer.I, G * H, const_data<S>(layer.weights[d].ih),
                               const_data<S>(x), x.size(1), x_product[d], x_product_stride);
    }
  }
  Scratch<T> panels, projection_panels;
  const int64_t panel = k.forward_panel_size(projects_input ? 0 : layer.I, P);
  const auto pack = [&](int64_t d, int64_t block, T* to) {
    k.pack_forward(weights[d], layer.I, H, P, block, to);
  };
  if (packs) {
    panels = Scratch<T>(D, blocks * panel);
    pack_all(D * blocks, D * blocks * panel, [&](int64_t i) {
      pack(i / blocks, i % blocks, panels[i / blocks] + i % blocks * panel);
    });
  }
  if constexpr (std::is_same_v<S, T>) {
    if (layer.has_projection) {
      projection_panels = pack_products<T>(layer, &DirectionWeights::hr, H, P, 1, H);
    }
  }

  Indices x_offset(size_t(layer.T), 0);
  for (int64_t t = 0; t < layer.T; ++t) {
    x_offset[t] = (layer.packed ? plan.step_offset[t] : t) * layer.input.stride(0);
  }
  c10::SmallVector<Forward<T, S>, 4> runs(shares.runs.size());
  int64_t workspace_size = 0;
  for (size_t r = 0; r < runs.size(); ++r) {
    const int64_t d = shares.runs[r].direction;
    const auto piece = [d](const Scratch<T>& s) { return s ? s[d] : nullptr; };
    const auto part = [d](const Tensor& t) {
      return t.defined() ? t.data_ptr<T>() + d * t.stride(0) : nullptr;
    };
    Forward<T, S>& s = runs[r];
    set_sequence(s, layer, plan, shares.runs[r]);
    workspace_size = std::max(workspace_size, k.forward_workspace(s));
    s.weights = weights[d];
    s.panels = piece(panels);
    s.projection_panels = piece(projection_panels);
    s.x = const_data<S>(layer.input);
    s.x_offset = x_offset.data();
    s.x_row_stride = layer.input.stride(layer.packed ? 0 : 1);
    s.x_product = piece(x_product);
    s.x_product_stride = x_product_stride;
    set_initial(s, layer, d);
    s.y = static_cast<S*>(out.output.mutable_data_ptr()) + d * P;
    s.y_stride = D * P;
    s.h_n = part(out.h_n);
    s.c_n = part(out.c_n);
    if (save) s.saved = part(out.saved);
  }
  const Scratch<T> workspace(int64_t(runs.size()), workspace_size);
  for (size_t r = 0; r < runs.size(); ++r) {
    runs[r].workspace = workspace[r];
    k.forward_begin(runs[r]);
  }
  // One panel for each thread, which packs and uses it while it is in the cache.
  const Scratch<T> own_panels =
      packs_at_once ? Scratch<T>(int64_t(runs.size()) * shares.members, panel) : Scratch<T>();
  shares.execute(layer.T, blocks, [&](int64_t r, int64_t i, int64_t begin, int64_t end) {
    if (!packs_at_once) return k.forward_step(runs[r], i, begin, end);
    const int64_t member = (begin * shares.members + blocks - 1) / blocks;  // whose part begins so
    T* const own = own_panels[r * shares.members + member];
    for (int64_t block = begin; block < end; ++block) {
      pack(shares.runs[r].direction, block, own);
      Forward<T, S> run = runs[r];
      run.panels = own - block * panel;
      k.forward_step(run, i, block, block + 1);
    }
  });
  return out;
}

/// The positions that rows of different lengths reach, in the order of the packing; undefined where
/// it is all of them.
Tensor reached(const Layer& layer, const Plan& plan, const Packing& packing) {
  if (!layer.lengths.defined()) return {};
  const Tensor positions = new_tensor<int64_t>({packing.count});
  int64_t* to = positions.mutable_data_ptr<int64_t>();
  for (int64_t t = 0; t < layer.T; ++t) {
    for (int64_t j = 0; j < plan.active[t]; ++j) *to++ = plan.step_offset[t] + plan.order[j];
  }
  return positions;
}

template <class T>
LayerGradients backward(const Layer& layer, const OutputGradients& g) {
  const int64_t D = layer.D, H = layer.H, P = layer.P, S = layer.cell.preacts;
  const Common<T>& common = table<T>().common;
  const Kernel<T>& k = kernel<T>(layer);
  const int64_t blocks = divide_up(std::max(H, P), common.block_columns);
  const Plan plan(layer);
  const Shares shares(layer, plan, common.tile_rows, blocks);
  const Packing packing(plan);
  const auto at_positions = [&](int64_t features) {
    return new_tensor<T>({D, packing.count, features});
  };
  const Tensor dgates = at_positions(S * H), h_previous = at_positions(P);
  Tensor dr, h_raw;
  Scratch<T> panels, projection_panels;
  if (layer.has_projection) {
    dr = at_positions(P);
    h_raw = at_positions(H);
    projection_panels = pack_products<T>(layer, &DirectionWeights::hr, P, H, H, 1);
  }
  if (worth_packing<T>(layer.T * divide_up(layer.B, common.tile_rows), P)) {
    panels = pack_products<T>(layer, &DirectionWeights::hh, layer.cell.gates * H, P, P, 1);
  }
  const Tensor dh0 = new_tensor<T>({D, layer.B, P});
  const Tensor dc0 = layer.cell.has_cell_state ? new_tensor<T>({D, layer.B, H}) : Tensor();

  c10::SmallVector<Backward<T>, 4> runs(shares.runs.size());
  int64_t workspace_size = 0;
  for (size_t r = 0; r < runs.size(); ++r) {
    const int64_t d = shares.runs[r].direction;
    const auto part = [d](const Tensor& t) {
      return t.defined() ? t.data_ptr<T>() + d * t.stride(0) : nullptr;
    };
    Backward<T>& s = runs[r];
    set_sequence(s, layer, plan, shares.runs[r]);
    workspace_size = std::max(workspace_size, k.backward_workspace(s));
    s.panels = panels ? panels[d] : layer.weights[d].hh.template const_data_ptr<T>();
    s.matrix_stride = panels ? 0 : P;
    s.projection_panels = projection_panels ? projection_panels[d] : nullptr;
    set_initial(s, layer, d);
    if (layer.has_projection) s.y = g.output.const_data_ptr<T>() + d * P;
    s.y_stride = s.dy_stride = D * P;
    s.saved = part(g.saved);
    if (g.dy.defined()) s.dy = g.dy.const_data_ptr<T>() + d * P;
    s.dh_n = part(g.dh_n);
    s.dc_n = part(g.dc_n);
    s.sorted_index = shares.runs[r].sorted_index.data();
    s.compact_offset = packing.step_offset.data();
    s.dgates = part(dgates);
    s.h_previous = part(h_previous);
    s.dr = part(dr);
    s.h_raw = part(h_raw);
    s.dh0 = part(dh0);
    s.dc0 = part(dc0);
  }
  const Scratch<T> workspace(int64_t(runs.size()), workspace_size);
  for (size_t r = 0; r < runs.size(); ++r) {
    runs[r].workspace = workspace[r];
    k.backward_begin(runs[r]);
  }
  // One step more than the layer has: it takes the gradients back to h0.
  shares.execute(layer.T + 1, blocks, [&](int64_t r, int64_t i, int64_t begin, int64_t end) {
    k.backward_step(runs[r], i, begin, end);
  });

  return layer_gradients(layer, g, {dgates, h_previous, dr, h_raw}, dh0, dc0, OwnGemms<T>(),
                         reached(layer, plan, packing));
}

/// Whether the machine multiplies bfloat16 and this call can use it. A projection rounds once more,
/// which the kernels do not do.
bool multiplies_bfloat16(const LayerArgs& args) {
  return args.input.scalar_type() == at::kBFloat16 && kernels().bf16 &&
         args.weights.size() / (args.bidirectional ? 2 : 1) % 2 == 0;
}

/// Adds a feature of zeros where their number is odd: the kernels take bfloat16 in pairs.
void make_features_even(Layer& layer) {
  if (layer.I % 2 == 0) return;
  std::vector<int64_t> shape = layer.input.sizes().vec();
  ++shape.back();
  const Tensor padded = at::zeros(shape, layer.options());
  padded.narrow(-1, 0, layer.I).copy_(layer.input);
  layer.input = padded;
}

LayerOutput forward(const CellInfo& cell, const ForwardArgs& args) {
  Layer layer(cell, args, multiplies_bfloat16(args));
  const Sharing::Call call;
  if (layer.input.scalar_type() == at::kBFloat16) make_features_even(layer);
  LayerOutput out = layer.input.scalar_type() == at::kBFloat16 ? forward<BFloat16>(layer, args.save)
                    : layer.compute_type == at::kDouble        ? forward<double>(layer, args.save)
                                                               : forward<float>(layer, args.save);
  for (Tensor* t : {&out.output, &out.h_n, &out.c_n}) {
    if (t->defined()) *t = in_type(*t, layer.type);
  }
  return out;
}

LayerGradients backward(const CellInfo& cell, const BackwardArgs& args) {
  const Layer layer(cell, args);
  const OutputGradients g(layer, args);
  const Sharing::Call call;
  return layer.compute_type == at::kDouble ? backward<double>(layer, g) : backward<float>(layer, g);
}

struct Cpu {
  template <class Cell>
  static LayerOutput forward(const ForwardArgs& args) {
    return cpu::forward(cell_info(scalar::Cells::index_of<Cell>()), args);
  }
  template <class Cell>
  static LayerGradients backward(const BackwardArgs& args) {
    return cpu::backward(cell_info(scalar::Cells::index_of<Cell>()), args);
  }
};

std::string isa() { return kernels().isa; }

}  // namespace

TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) { register_ops<Cpu>(m); }
TORCH_LIBRARY_IMPL(fusedrnn, CompositeExplicitAutograd, m) { m.impl("_cpu_isa", &isa); }

}  // namespace fusedrnn::cpu
