// The ops on the CPU: plans the rows of a call, shares them out over torch's threads, runs the
// kernels.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../layer.h"
#include "kernels.h"

namespace fusedrnn::cpu {
namespace {

/// Rows of the batch, longest first, and where each step lies.
struct Plan {
  std::vector<int64_t> order;     ///< [B]
  std::vector<int64_t> active;    ///< [T] rows in each step: a prefix of order
  std::vector<int64_t> position;  ///< [T] of batch row 0

  explicit Plan(const Layer& layer)
      : order(layer.B), active(layer.T, layer.B), position(layer.T) {
    for (int64_t t = 0, at = 0; t < layer.T; ++t) {
      position[t] = at;
      if (layer.packed) active[t] = layer.batch_sizes[t];
      at += active[t];
    }
    if (!layer.lengths.defined()) {
      for (int64_t b = 0; b < layer.B; ++b) order[b] = b;
      return;
    }
    // A stable counting sort by length, longest first.
    const int64_t* length = layer.lengths.const_data_ptr<int64_t>();
    std::vector<int64_t> longer(layer.T + 2, 0);  // [l]: rows of length l, then rows longer than l
    for (int64_t b = 0; b < layer.B; ++b) {
      TORCH_CHECK(length[b] >= 0 && length[b] <= layer.T, "fusedrnn::", layer.cell.name,
                  ": lengths must be from 0 to the sequence length ", layer.T, ", got ", length[b]);
      ++longer[length[b]];
    }
    for (int64_t l = layer.T, sum = 0; l >= 0; --l) {
      sum += longer[l];
      longer[l] = sum - longer[l];
      if (l < layer.T) active[l] = longer[l];
    }
    for (int64_t b = 0; b < layer.B; ++b) order[longer[length[b]]++] = b;
  }
};

/// The part of a layer that one thread runs: a direction, and some of its rows or unit blocks.
struct Task {
  int64_t direction;
  std::vector<int64_t> row, active;
  int64_t block_begin, block_end;
};

/// Work that takes less than this many multiplications is done at once rather than shared.
constexpr int64_t kSharedWork = 1 << 19;

std::vector<Task> share(const Layer& layer, const Plan& plan, int64_t blocks, bool by_unit) {
  const int64_t work = layer.N * layer.D * layer.cell.gates * layer.H * (layer.I + layer.P);
  const int64_t threads = work < kSharedWork || at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t limit = by_unit ? blocks : std::max<int64_t>(layer.B, 1);
  const int64_t parts = std::clamp<int64_t>(threads / layer.D, 1, limit);
  std::vector<Task> tasks;
  for (int64_t d = 0; d < layer.D; ++d) {
    for (int64_t part = 0; part < parts; ++part) {
      if (by_unit) {
        tasks.push_back({d, plan.order, plan.active, blocks * part / parts,
                         blocks * (part + 1) / parts});
        continue;
      }
      // Every parts-th row, so that rows of all lengths go to each thread.
      Task task{d, {}, {}, 0, blocks};
      for (int64_t j = part; j < layer.B; j += parts) task.row.push_back(plan.order[j]);
      for (int64_t n : plan.active) {
        task.active.push_back(n > part ? (n - part + parts - 1) / parts : 0);
      }
      tasks.push_back(std::move(task));
    }
  }
  return tasks;
}

void run(int64_t count, const std::function<void(int64_t)>& task) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

template <class T>
T* data(const Tensor& t) {
  return t.defined() ? t.data_ptr<T>() : nullptr;
}
template <class T>
const T* const_data(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

template <class T>
const KernelsOf<T>& table() {
  if constexpr (std::is_same_v<T, float>) {
    return kernels().f32;
  } else {
    return kernels().f64;
  }
}

template <class T>
const Kernel<T>& kernel(const Layer& layer) {
  return layer.cell.has_c ? table<T>().lstm : table<T>().gru;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// One tensor cut into aligned pieces, one a task.
template <class T>
struct Workspace {
  Workspace(const Layer& layer, int64_t pieces, int64_t size)
      : stride(divide_up(size, 64) * 64), memory(at::empty({pieces * stride}, layer.options())) {}
  T* operator[](int64_t i) const { return memory.data_ptr<T>() + i * stride; }
  int64_t stride;
  Tensor memory;
};

template <class T>
void set_sequence(Sequence<T>& s, const Layer& layer, const Plan& plan, const Task& task) {
  s.steps = layer.T;
  s.rows = int64_t(task.row.size());
  s.input_size = layer.I;
  s.hidden_size = layer.H;
  s.output_size = layer.P;
  s.reverse = task.direction == 1;
  s.row = task.row.data();
  s.active = task.active.data();
  s.position = plan.position.data();
}

/// Packs the product panels of a matrix [depth, columns] for every direction: [D, depth, columns'].
template <class T>
Tensor pack_products(const Layer& layer, int64_t depth, int64_t columns, int64_t row_stride,
                     int64_t column_stride, Tensor DirectionWeights::* matrix) {
  const Packing<T>& packing = table<T>().packing;
  const int64_t blocks = divide_up(columns, packing.block_columns);
  const int64_t width = divide_up(columns, packing.lanes) * packing.lanes;
  Tensor panels = at::empty({layer.D, depth, width}, layer.options());
  const auto pack = [&](int64_t i) {
    packing.pack_product((layer.weights[i / blocks].*matrix).template const_data_ptr<T>(), row_stride,
                         column_stride, depth, columns, i % blocks,
                         panels.data_ptr<T>() + (i / blocks) * depth * width);
  };
  if (layer.D * depth * columns < kSharedWork / 8) {
    for (int64_t i = 0; i < layer.D * blocks; ++i) pack(i);
  } else {
    run(layer.D * blocks, pack);
  }
  return panels;
}

struct Output {
  Tensor y, h_n, c_n, saved;
};

template <class T>
Output forward(const Layer& layer, bool save) {
  const auto options = layer.options();
  const int64_t D = layer.D, G = layer.cell.gates, H = layer.H, P = layer.P;
  Output out;
  out.y = layer.lengths.defined() ? at::zeros(layer.shape(D * P), options)
                                  : at::empty(layer.shape(D * P), options);
  out.h_n = at::empty({D, layer.B, P}, options);
  if (layer.cell.has_c) out.c_n = at::empty({D, layer.B, H}, options);
  // Zeroed where padding leaves gaps, so that the backward op never sees what was in memory.
  if (save) {
    out.saved = at::empty({D, layer.N, layer.cell.saved, H}, options);
  } else {
    out.saved = at::empty({0}, options);
  }

  const Kernel<T>& k = kernel<T>(layer);
  const int64_t blocks = divide_up(H, table<T>().packing.lanes);
  const Plan plan(layer);
  // Packing costs as much as reading the weights about eight times: not for a call that reads
  // them less often. The input's part of the step is a product over all steps at once where the
  // batch is too small to fill the tile.
  const bool packs = layer.T > 4 || layer.B > 8;
  const bool projects_input = packs && layer.B < 8;
  const bool by_unit = layer.T == 1 && !packs && !layer.has_projection;
  const std::vector<Task> tasks = share(layer, plan, blocks, by_unit);

  Tensor panels, projection_panels;
  const int64_t panel = k.forward_panel_size(projects_input ? 0 : layer.I, P);
  std::vector<Tensor> x_product(D);
  std::vector<Weights<T>> weights(D);
  for (int64_t d = 0; d < D; ++d) {
    const DirectionWeights& w = layer.weights[d];
    weights[d] = {const_data<T>(w.ih), const_data<T>(w.hh), const_data<T>(w.bias_ih),
                  const_data<T>(w.bias_hh), const_data<T>(w.hr)};
    if (!projects_input) continue;
    x_product[d] = at::linear(layer.flat_input(), w.ih, w.bias_ih);
    weights[d].ih = weights[d].bias_ih = nullptr;
  }
  if (packs) {
    panels = at::empty({D, blocks, panel}, options);
    const auto pack = [&](int64_t i) {
      k.pack_forward(weights[i / blocks], layer.I, H, P, i % blocks,
                     panels.data_ptr<T>() + i * panel);
    };
    if (D * blocks * panel < kSharedWork / 8) {
      for (int64_t i = 0; i < D * blocks; ++i) pack(i);
    } else {
      run(D * blocks, pack);
    }
  }
  if (layer.has_projection) {
    projection_panels = pack_products<T>(layer, H, P, 1, H, &DirectionWeights::hr);
  }

  std::vector<int64_t> x_offset(layer.T);
  for (int64_t t = 0; t < layer.T; ++t) {
    x_offset[t] = (layer.packed ? plan.position[t] : t) * layer.input.stride(0);
  }

  std::vector<Forward<T>> runs(tasks.size());
  int64_t workspace_size = 0;
  for (size_t i = 0; i < tasks.size(); ++i) {
    const Task& task = tasks[i];
    const int64_t d = task.direction;
    Forward<T>& s = runs[i];
    set_sequence(s, layer, plan, task);
    workspace_size = std::max(workspace_size, k.forward_workspace(s));
    s.weights = weights[d];
    if (packs) s.panels = panels.const_data_ptr<T>() + d * blocks * panel;
    if (layer.has_projection) s.projection_panels = projection_panels[d].const_data_ptr<T>();
    s.x = layer.input.const_data_ptr<T>();
    s.x_offset = x_offset.data();
    s.x_row_stride = layer.input.stride(layer.packed ? 0 : 1);
    s.x_product = const_data<T>(x_product[d]);
    if (layer.h0.defined()) {
      s.h0 = layer.h0.const_data_ptr<T>() + d * layer.h0.stride(0);
      s.h0_stride = layer.h0.stride(1);
    }
    if (layer.c0.defined()) {
      s.c0 = layer.c0.const_data_ptr<T>() + d * layer.c0.stride(0);
      s.c0_stride = layer.c0.stride(1);
    }
    s.y = out.y.data_ptr<T>() + d * P;
    s.y_stride = D * P;
    s.h_n = out.h_n.data_ptr<T>() + d * layer.B * P;
    if (layer.cell.has_c) s.c_n = out.c_n.data_ptr<T>() + d * layer.B * H;
    if (save) s.saved = out.saved.data_ptr<T>() + d * layer.N * layer.cell.saved * H;
    s.block_begin = task.block_begin;
    s.block_end = task.block_end;
  }
  const Workspace<T> workspace(layer, int64_t(tasks.size()), workspace_size);
  run(int64_t(tasks.size()), [&](int64_t i) {
    runs[i].workspace = workspace[i];
    k.forward(runs[i]);
  });
  (void)G;
  return out;
}

struct Gradients {
  Tensor input, h0, c0;
  std::vector<Tensor> weights;
};

template <class T>
Gradients backward(const Layer& layer, const OutputGradients& g,
                   const std::vector<bool>& output_mask) {
  const auto options = layer.options();
  const int64_t D = layer.D, N = layer.N, H = layer.H, P = layer.P, S = layer.cell.sums;
  const Kernel<T>& k = kernel<T>(layer);
  const Plan plan(layer);
  const std::vector<Task> tasks = share(layer, plan, 0, false);
  const auto positions = [&](int64_t features) {  // padding must not reach the products
    return layer.lengths.defined() ? at::zeros({D, N, features}, options)
                                   : at::empty({D, N, features}, options);
  };
  const Tensor dsums = positions(S * H), h_previous = positions(P);
  Tensor dr, h_raw, projection_panels;
  if (layer.has_projection) {
    dr = positions(P);
    h_raw = positions(H);
    projection_panels = pack_products<T>(layer, P, H, H, 1, &DirectionWeights::hr);
  }
  const Tensor panels =
      pack_products<T>(layer, layer.cell.gates * H, P, P, 1, &DirectionWeights::hh);
  Gradients out;
  out.h0 = at::empty({D, layer.B, P}, options);
  if (layer.cell.has_c) out.c0 = at::empty({D, layer.B, H}, options);

  std::vector<Backward<T>> runs(tasks.size());
  int64_t workspace_size = 0;
  for (size_t i = 0; i < tasks.size(); ++i) {
    const Task& task = tasks[i];
    const int64_t d = task.direction;
    const auto part = [d](const Tensor& t) {
      return t.defined() ? t.data_ptr<T>() + d * t.stride(0) : nullptr;
    };
    Backward<T>& s = runs[i];
    set_sequence(s, layer, plan, task);
    workspace_size = std::max(workspace_size, k.backward_workspace(s));
    s.panels = part(panels);
    s.projection_panels = part(projection_panels);
    if (layer.h0.defined()) {
      s.h0 = layer.h0.const_data_ptr<T>() + d * layer.h0.stride(0);
      s.h0_stride = layer.h0.stride(1);
    }
    if (layer.c0.defined()) {
      s.c0 = layer.c0.const_data_ptr<T>() + d * layer.c0.stride(0);
      s.c0_stride = layer.c0.stride(1);
    }
    s.y = g.output.const_data_ptr<T>() + d * P;
    s.y_stride = s.dy_stride = D * P;
    s.saved = part(g.saved);
    if (g.dy.defined()) s.dy = g.dy.const_data_ptr<T>() + d * P;
    s.dh_n = part(g.dh_n);
    s.dc_n = part(g.dc_n);
    s.dsums = part(dsums);
    s.h_previous = part(h_previous);
    s.dr = part(dr);
    s.h_raw = part(h_raw);
    s.dh0 = part(out.h0);
    s.dc0 = part(out.c0);
  }
  const Workspace<T> workspace(layer, int64_t(tasks.size()), workspace_size);
  run(int64_t(tasks.size()), [&](int64_t i) {
    runs[i].workspace = workspace[i];
    k.backward(runs[i]);
  });

  std::vector<DirectionGradients> directions(D);
  for (int64_t d = 0; d < D; ++d) {
    directions[d] = {dsums[d], h_previous[d], layer.has_projection ? dr[d] : Tensor(),
                     layer.has_projection ? h_raw[d] : Tensor()};
  }
  const size_t states = layer.cell.has_c ? 3 : 2;
  out.input = at::empty({0}, options);
  out.weights = weight_gradients(
      layer, directions, std::vector<bool>(output_mask.begin() + states, output_mask.end()),
      output_mask[0], out.input);
  if (output_mask[0]) out.input = out.input.view(layer.shape(layer.I));
  const auto wanted = [&](Tensor& t, size_t i) {
    t = output_mask[i] ? t.to(layer.type) : at::empty({0}, options);
  };
  wanted(out.input, 0);
  wanted(out.h0, 1);
  if (layer.cell.has_c) wanted(out.c0, 2);
  return out;
}

Output forward_any(const Layer& layer, bool save) {
  Output out = layer.compute_type == at::kDouble ? forward<double>(layer, save)
                                                 : forward<float>(layer, save);
  out.y = out.y.to(layer.type);
  out.h_n = out.h_n.to(layer.type);
  if (out.c_n.defined()) out.c_n = out.c_n.to(layer.type);
  return out;
}

Gradients backward_any(const Layer& layer, const OutputGradients& g,
                       const std::vector<bool>& output_mask) {
  return layer.compute_type == at::kDouble ? backward<double>(layer, g, output_mask)
                                           : backward<float>(layer, g, output_mask);
}

std::vector<bool> to_vector(const c10::List<bool>& list) { return {list.begin(), list.end()}; }

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm(
    const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
    bool bidirectional, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
    bool save) {
  const Layer layer(CellInfo::of<host::Lstm>("lstm"), input, h0, c0, weights, bidirectional,
                    batch_sizes, lengths);
  Output out = forward_any(layer, save);
  return {out.y, out.h_n, out.c_n, out.saved};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> lstm_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
    const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
    bool bidirectional, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
    const Tensor& output, const Tensor& saved, const c10::List<bool>& output_mask) {
  const Layer layer(CellInfo::of<host::Lstm>("lstm"), input, h0, c0, weights, bidirectional,
                    batch_sizes, lengths);
  const std::vector<bool> mask = to_vector(output_mask);
  const OutputGradients g(layer, dy, dh_n, dc_n, output, saved, mask);
  Gradients out = backward_any(layer, g, mask);
  return {out.input, out.h0, out.c0, std::move(out.weights)};
}

std::tuple<Tensor, Tensor, Tensor> gru(const Tensor& input, const OptionalTensor& h0,
                                       at::TensorList weights, bool bidirectional,
                                       const OptionalTensor& batch_sizes,
                                       const OptionalTensor& lengths, bool save) {
  const Layer layer(CellInfo::of<host::Gru>("gru"), input, h0, std::nullopt, weights, bidirectional,
                    batch_sizes, lengths);
  Output out = forward_any(layer, save);
  return {out.y, out.h_n, out.saved};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> gru_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const Tensor& input,
    const OptionalTensor& h0, at::TensorList weights, bool bidirectional,
    const OptionalTensor& batch_sizes, const OptionalTensor& lengths, const Tensor& output,
    const Tensor& saved, const c10::List<bool>& output_mask) {
  const Layer layer(CellInfo::of<host::Gru>("gru"), input, h0, std::nullopt, weights, bidirectional,
                    batch_sizes, lengths);
  const std::vector<bool> mask = to_vector(output_mask);
  const OutputGradients g(layer, dy, dh_n, std::nullopt, output, saved, mask);
  Gradients out = backward_any(layer, g, mask);
  return {out.input, out.h0, std::move(out.weights)};
}

std::string isa() { return kernels().isa; }

}  // namespace

TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) {
  m.impl("lstm", &lstm);
  m.impl("lstm_backward", &lstm_backward);
  m.impl("gru", &gru);
  m.impl("gru_backward", &gru_backward);
}
TORCH_LIBRARY_IMPL(fusedrnn, CompositeExplicitAutograd, m) { m.impl("_cpu_isa", &isa); }

}  // namespace fusedrnn::cpu
