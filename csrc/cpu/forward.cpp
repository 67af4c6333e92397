// A layer's forward pass on the CPU.
#include <cstring>
#include <memory>
#include <utility>

#include "gemm.h"
#include "layer_cpu.h"

namespace fusedrnn::cpu {
namespace {

enum class WeightAccess {
  in_place,   ///< steps read the weights as they are
  prepacked,  ///< all weights are prepacked before the first step
  streamed,   ///< each thread prepacks a panel right before using it
};

struct ForwardStrategy {
  WeightAccess weights;
  bool input_gemm;  ///< computes the input's part of all steps in one GEMM
  LayerWork work;
};

/// Forward heuristics. The examples are for AVX-512: 6 rows per tile, up to 4 rows in place.
template <class Accum, class Element>
ForwardStrategy choose_strategy(const Layer& layer, const Common<Accum, Element>& common,
                                int64_t blocks_per_tile, const FrozenWeights* frozen = nullptr,
                                const LayerVariant* variant = nullptr) {
  ForwardStrategy strategy{WeightAccess::prepacked, false, {}};
  if (frozen) {
    // Packed already.
  } else if (layer.T <= 4 && layer.B <= common.in_place_rows) {
    // T 4, B 1 reads each weight four times: prepacking costs as much.
    strategy.weights = WeightAccess::in_place;
  } else if (layer.T == 1 && !layer.has_projection && !variant) {
    // T 1, B 64 reads each panel 11 times in a row, then may overwrite it. A projection needs all
    // the step's units in one call.
    strategy.weights = WeightAccess::streamed;
  }
  LayerWork& work = strategy.work;
  const int64_t blocks = divide_up(layer.H, common.lanes);
  const int64_t per_lane = common.per_lane;
  work.rows = layer.B;
  work.steps = layer.T;
  work.input_size = layer.I / per_lane;
  work.output_size = layer.P / per_lane;
  work.vectors = layer.cell.gates * blocks;
  // Threads can't share a projection's steps, nor a layer norm's.
  const bool has_norms = variant && variant->has_norms();
  work.parts = layer.has_projection || has_norms ? 1 : divide_up(blocks, blocks_per_tile);
  work.tile_rows = common.tile_rows;
  work.vector_bytes = common.lanes * int64_t(sizeof(Accum));
  work.vector_cycles = work.input_vector_cycles = work.vector_bytes == 64 ? 2 : 1;
  if (frozen && frozen->type() == WeightType::bfloat16) work.vector_bytes /= 2;
  if (frozen && frozen->type() == WeightType::int8) {
    work.vector_bytes = common.lanes * per_lane;
    work.vector_cycles *= per_lane / 2;  // of lower and upper bytes
    work.input_vector_cycles *= per_lane / 2 * common.x_bytes / 2;
  }
  work.packs_in_step = strategy.weights == WeightAccess::streamed;
  // T 100, B 1 fills one row of a tile in each step, but six in a GEMM over 100 steps.
  // A layer norm of the input's part needs all of a token's.
  strategy.input_gemm = has_norms || (layer.T > 4 && multiplies_input(work, caches()));
  return strategy;
}

/// Clears padded tokens of `data` [copies, T, B, features].
template <class Element>
void clear_padding(const Layer& layer, Element* data, int64_t copies, int64_t features) {
  const int64_t* const lengths = layer.lengths.const_data_ptr<int64_t>();
  const int64_t work = copies * layer.N * features;
  in_row_parts<Accumulator<Element>>(layer.T, work, [&](int64_t begin, int64_t end) {
    for (int64_t copy = 0; copy < copies; ++copy) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t row = 0; row < layer.B; ++row) {
          Element* const token = data + ((copy * layer.T + t) * layer.B + row) * features;
          if (t >= lengths[row]) std::memset(token, 0, size_t(features) * sizeof(Element));
        }
      }
    }
  });
}

/// A new tensor of `shape` [copies, N, features], with zeros for padded tokens.
template <class Element>
Tensor new_token_tensor(const Layer& layer, c10::IntArrayRef shape, int64_t copies) {
  const Tensor t = new_tensor<Element>(shape);
  if (layer.lengths.defined() && t.numel() > 0) {
    clear_padding(layer, static_cast<Element*>(t.mutable_data_ptr()), copies,
                  t.numel() / (copies * layer.N));
  }
  return t;
}

/// What a forward pass is asked for.
struct Request {
  bool save;
  const LayerVariant* variant = nullptr;
};

template <class Element, class Accum = Accumulator<Element>>
VariantOutput new_output(const Layer& layer, const Request& request) {
  const int64_t D = layer.D, B = layer.B, H = layer.H, P = layer.P;
  VariantOutput out;
  out.output = new_token_tensor<OutputOf<Element>>(layer, layer.shape(D * P), 1);
  out.h_n = new_tensor<Accum>({D, B, P});
  if (layer.cell.has_cell_state) out.c_n = new_tensor<Accum>({D, B, H});
  if (!request.save) {
    out.saved = new_tensor<Accum>({0});
  } else if (request.variant) {
    out.saved = new_token_tensor<Accum>(layer, {D, layer.N, request.variant->saved.size}, D);
  } else {
    out.saved = new_token_tensor<Accum>(layer, {D, layer.N, layer.cell.saved, H}, D);
  }
  if (request.variant && layer.cell.has_cell_state) {
    out.cells = new_token_tensor<Accum>(layer, layer.shape(D * H), 1);
  }
  return out;
}

/// Each direction's weights; with an input GEMM, only the steps' part. Behind layer norms the
/// biases are added later.
template <class Element>
c10::SmallVector<Weights<Element>, 2> step_weights(const Layer& layer, bool input_gemm,
                                                   bool has_norms) {
  c10::SmallVector<Weights<Element>, 2> weights;
  for (const DirectionWeights& w : layer.weights) {
    weights.push_back({input_gemm ? nullptr : const_data<Element>(w.ih), const_data<Element>(w.hh),
                       const_data<Element>(w.bias_ih), const_data<Element>(w.bias_hh),
                       const_data<Element>(w.hr)});
    if (has_norms) weights.back().bias_ih = weights.back().bias_hh = nullptr;
  }
  return weights;
}

template <class Accum>
Scratch<Accum> prepack_projection(const Layer& layer) {
  return prepack_weights<Accum>(layer, &DirectionWeights::hr, layer.H, layer.P, 1, layer.H);
}

/// Runs all steps and prepacks each panel right before its use. `prepack` (direction, block, panel)
/// writes `panel_size` elements.
template <class Element, class Accum, class Prepack>
void run_streamed(const WorkPartition& partition, const Runs<Forward<Accum, Element>>& runs,
                  const Kernel<Accum, Element>& kernel, int64_t panel_size,
                  const Prepack& prepack) {
  const int64_t members = partition.members, width = kernel.blocks_per_tile;
  const Scratch<Accum> panels(int64_t(partition.groups.size()) * members, width * panel_size);
  partition.execute(1, [&](int64_t r, int64_t i, int64_t begin, int64_t end) {
    Accum* const own = panels[r * members + partition.member_of(begin)];
    for (int64_t block = begin; block < end; block += width) {
      const int64_t count = std::min(width, end - block);
      for (int64_t b = 0; b < count; ++b) {
        prepack(partition.groups[size_t(r)].direction, block + b, own + b * panel_size);
      }
      Forward<Accum, Element> run = runs[r];
      run.panels = own - block * panel_size;
      kernel.forward_step(run, i, block, block + count);
    }
  });
}

/// A layer's input as operands. Quantised operands have scales: a token's input, a row's states.
template <class Element>
class Operands {
 public:
  Operands(const Layer& layer, const BatchLayout& layout,
           const Common<Accumulator<Element>, Element>& common)
      : x_offset(size_t(layer.T), 0) {
    if constexpr (std::is_same_v<Element, Int16>) {
      x_row_stride = scalar::round_up(layer.I, common.lanes);
      quantised.emplace(layer.N * x_row_stride * common.x_bytes);
      x_scale.emplace(layer.D, layer.N);
      h_scale.emplace(layer.D, layer.B);
      x = (*quantised)[0];
      for (int64_t t = 0; t < layer.T; ++t) x_offset[t] = layout.step_offset[t] * x_row_stride;
      quantise(layer, layout, common);
    } else {
      x = const_data<Element>(layer.input);
      x_row_stride = layer.input.stride(layer.packed ? 0 : 1);
      for (int64_t t = 0; t < layer.T; ++t) {
        x_offset[t] = (layer.packed ? layout.step_offset[t] : t) * layer.input.stride(0);
      }
    }
  }

  void set(Forward<Accumulator<Element>, Element>& s, int64_t d) const {
    s.x = x;
    s.x_offset = x_offset.data();
    s.x_row_stride = x_row_stride;
    if (x_scale) {
      s.x_scale = (*x_scale)[d];
      s.h_scale = (*h_scale)[d];
    }
  }

  Operands(const Operands&) = delete;

 private:
  void quantise(const Layer& layer, const BatchLayout& layout, const Common<float, Int16>& common) {
    const Tensor& x = layer.input;
    const auto* const data = x.const_data_ptr<float>();
    const int32_t largest = std::min(common.largest_x, largest_operand(layer.I));
    in_row_parts<float>(layer.T, 8 * layer.N * layer.I, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = layout.step_offset[t];
        const int64_t rows = layer.packed ? layout.active[t] : layer.B;
        for (int64_t b = 0; b < rows; ++b) {
          const float* row = layer.packed ? data + (first + b) * x.stride(0)
                                          : data + t * x.stride(0) + b * x.stride(1);
          void* to = (*quantised)[0] + (first + b) * x_row_stride * common.x_bytes;
          (*x_scale)[0][first + b] = common.quantise_row(row, layer.I, largest, to);
        }
      }
    });
    for (int64_t d = layer.D - 1; d >= 0; --d) spread_nan(layer, layout, d);
  }

  /// A state that is not finite has no int16. So from there on all scales of the row are NaN, and
  /// so are its results.
  void spread_nan(const Layer& layer, const BatchLayout& layout, int64_t d) {
    if (d > 0) std::memcpy((*x_scale)[d], (*x_scale)[0], size_t(layer.N) * sizeof(float));
    const auto largest_of = [&](const Tensor& states, int64_t b, float most) {
      if (!states.defined()) return most;
      const float* row =
          states.const_data_ptr<float>() + d * states.stride(0) + b * states.stride(1);
      float sum = 0;  // 0 * x is NaN unless x is finite
      for (int64_t u = 0; u < states.size(2); ++u) {
        most = std::max(most, std::abs(row[u]));
        sum += 0 * row[u];
      }
      return most + sum;
    };
    for (int64_t b = 0; b < layer.B; ++b) {
      // A cell's states stay within [-1, 1], or within the initial state.
      const float most = largest_of(layer.h0, b, 1) + 0 * largest_of(layer.c0, b, 0);
      (*h_scale)[d][b] = most / float(largest_operand(layer.P));
    }
    for (int64_t j = 0; j < layer.B; ++j) {
      const int64_t b = layout.order[j];
      float nan = 0 * (*h_scale)[d][b];
      for (int64_t i = 0; i < layer.T; ++i) {
        const int64_t t = d ? layer.T - 1 - i : i;
        if (j >= layout.active[t]) continue;
        float& scale = (*x_scale)[d][layout.step_offset[t] + b];
        nan += 0 * scale;
        scale += nan;
      }
    }
  }

  const StoredInput<Element>* x = nullptr;
  Indices x_offset;  ///< [T] values from x to the step's batch row 0
  int64_t x_row_stride = 0;
  std::optional<Scratch<unsigned char>> quantised;
  std::optional<Scratch<float>> x_scale, h_scale;  ///< [N] and [B] for each direction
};

/// A forward pass's runs. `set` (run, direction) sets the weights.
template <class Element, class Accum, class Set>
Runs<Forward<Accum, Element>> forward_runs(const Layer& layer, const BatchLayout& layout,
                                           const WorkPartition& partition,
                                           const Kernel<Accum, Element>& kernel,
                                           const Operands<Element>& operands, VariantOutput& out,
                                           const Set& set, bool is_variant = false) {
  return Runs<Forward<Accum, Element>>(
      layer, layout, partition,
      is_variant ? kernel.variants.forward_workspace : kernel.forward_workspace,
      [&](const Forward<Accum, Element>& s) {
        if constexpr (std::is_same_v<Accum, Element>) {
          if (is_variant) return kernel.variants.forward_begin(s);
        }
        kernel.forward_begin(s);
      },
      [&](Forward<Accum, Element>& s, const WorkPartition::RowGroup& group) {
        const int64_t d = group.direction;
        operands.set(s, d);
        s.y = static_cast<OutputOf<Element>*>(out.output.mutable_data_ptr()) + d * layer.P;
        s.y_stride = layer.D * layer.P;
        s.h_n = direction_data<Accum>(out.h_n, d);
        s.c_n = direction_data<Accum>(out.c_n, d);
        if (out.saved.numel() > 0) s.saved = direction_data<Accum>(out.saved, d);
        set(s, d);
      });
}

/// weight_ih x with the biases: a piece per direction, [N, G*H] with rows `stride` apart.
/// panel(d, block, count, scratch) gives these blocks' panels of input_size and s.output_size; it
/// may pack them into `scratch`.
template <class Element, class Accum, class Panel>
Scratch<Accum> multiply_input(const Layer& layer, const KernelsOf<Accum, Element>& kernels,
                              const Operands<Element>& operands, int64_t output_size,
                              int64_t stride, const Panel& panel) {
  const Kernel<Accum, Element>& kernel = kernels.cells[layer.cell.index];
  const int64_t width = kernel.blocks_per_tile, blocks = divide_up(layer.H, kernels.common.lanes);
  const int64_t work = layer.N * layer.I * layer.cell.gates * layer.H;
  const int64_t tiles = divide_up(blocks, width);
  const int64_t parts = work < kSharedWork ? 1 : std::min(tiles, 4 * threads());
  const int64_t panel_size = kernel.forward_panel_size(layer.I, output_size);
  Scratch<Accum> product(layer.D, layer.N * stride);
  // Quantised operands lie as they are read already.
  const Tensor flat = std::is_same_v<Element, Int16> ? Tensor() : layer.flat_input();
  in_parallel(layer.D * parts, layer.D * work, [&](int64_t i) {
    const int64_t d = i / parts, part = i % parts;
    Forward<Accum, Element> s;
    s.input_size = layer.I;
    s.hidden_size = layer.H;
    s.output_size = output_size;
    operands.set(s, d);
    if (flat.defined()) {
      s.x = const_data<Element>(flat);
      s.x_row_stride = flat.size(1);
    }
    const Scratch<Accum> scratch(width * panel_size);
    for (int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
      const int64_t block = tile * width, count = std::min(width, blocks - block);
      s.panels = panel(d, block, count, scratch[0]) - block * panel_size;
      kernel.forward_input(s, block, block + count, 0, layer.N, product[d], stride);
    }
  });
  return product;
}

/// A forward pass, with all memory that its steps use.
template <class Element>
class ForwardCall {
 public:
  using Accum = Accumulator<Element>;

  ForwardCall(const Layer& layer, const Request& request)
      : layer_(layer),
        request_(request),
        kernels_(table<Element>()),
        kernel_(kernels_.cells[layer.cell.index]),
        strategy_(choose_strategy(layer, kernels_.common, kernel_.blocks_per_tile, nullptr,
                                  request.variant)),
        blocks_(divide_up(layer.H, kernels_.common.lanes)),
        layout_(layer),
        partition_(layer, layout_, strategy_.work, strategy_.input_gemm, blocks_,
                   kernel_.blocks_per_tile),
        out_(new_output<Element>(layer, request)),
        weights_(step_weights<Element>(layer, strategy_.input_gemm, has_norms())),
        variants_(variants()),
        operands_(layer, layout_, kernels_.common),
        product_stride_(scalar::round_up(layer.cell.gates * layer.H, kernels_.common.lanes)),
        x_product_(strategy_.input_gemm ? multiply() : Scratch<Accum>()),
        panel_size_(kernel_.forward_panel_size(strategy_.input_gemm ? 0 : layer.I, layer.P)),
        prepacks_(strategy_.weights == WeightAccess::prepacked),
        panels_(prepacks_ ? Scratch<Accum>(layer.D, blocks_ * panel_size_) : Scratch<Accum>()),
        projection_panels_(layer.has_projection ? prepack_projection<Accum>(layer)
                                                : Scratch<Accum>()),
        runs_(forward_runs<Element, Accum>(
            layer_, layout_, partition_, kernel_, operands_, out_,
            [&](Forward<Accum, Element>& s, int64_t d) {
              s.weights = weights_[size_t(d)];
              s.panels = panels_.get(d);
              s.projection_panels = projection_panels_.get(d);
              s.x_product = x_product_.get(d);
              s.x_product_stride = product_stride_;
              if constexpr (kHasVariants) {
                if (request_.variant) {
                  s.variant = &variants_[size_t(d)];
                }
              }
            },
            request.variant != nullptr)) {}

  /// Only steps with packed weights may give up: the others read the caller's.
  VariantOutput run(const std::shared_ptr<void>& owner) {
    if (prepacks_) {
      prepack_all(layer_.D * blocks_, layer_.D * blocks_ * panel_size_, [&](int64_t i) {
        prepack(i / blocks_, i % blocks_, panels_[i / blocks_] + i % blocks_ * panel_size_);
      });
    }
    if (strategy_.weights == WeightAccess::streamed) {
      run_streamed(partition_, runs_, kernel_, panel_size_,
                   [&](int64_t d, int64_t block, Accum* panel) { prepack(d, block, panel); });
    } else {
      const PoolBackoff::Owner keep(prepacks_ ? owner : nullptr);
      const auto step = this->step();
      partition_.execute(layer_.T, [this, step](int64_t r, int64_t i, int64_t begin, int64_t end) {
        step(runs_[r], i, begin, end);
      });
    }
    return std::move(out_);
  }

 private:
  static constexpr bool kHasVariants = std::is_same_v<Accum, Element>;

  bool has_norms() const { return request_.variant && request_.variant->has_norms(); }
  auto step() const {
    if constexpr (kHasVariants) {
      if (request_.variant) return kernel_.variants.forward_step;
    }
    return kernel_.forward_step;
  }
  c10::SmallVector<Variant<Accum>, 2> variants() const {
    c10::SmallVector<Variant<Accum>, 2> found;
    for (int64_t d = 0; request_.variant && d < layer_.D; ++d) {
      Variant<Accum> v = request_.variant->of_direction<Accum>(layer_, d);
      if (out_.cells.defined())
        v.cells = static_cast<Accum*>(out_.cells.mutable_data_ptr()) + d * layer_.H;
      if constexpr (kHasVariants) {
        v.bias_ih = const_data<Accum>(layer_.weights[size_t(d)].bias_ih);
        v.bias_hh = const_data<Accum>(layer_.weights[size_t(d)].bias_hh);
      }
      found.push_back(v);
    }
    return found;
  }
  void prepack(int64_t d, int64_t block, Accum* panel) const {
    kernel_.prepack_forward(weights_[size_t(d)], layer_.I, layer_.H, layer_.P, block, panel);
  }
  Scratch<Accum> multiply() const {
    auto product = multiply_input(layer_, kernels_, operands_, 0, product_stride_,
                                  [&](int64_t d, int64_t block, int64_t count, Accum* scratch) {
                                    Weights<Element> input = weights_[size_t(d)];
                                    input.ih = const_data<Element>(layer_.weights[size_t(d)].ih);
                                    input.hh = nullptr;
                                    const int64_t size = kernel_.forward_panel_size(layer_.I, 0);
                                    for (int64_t b = 0; b < count; ++b) {
                                      kernel_.prepack_forward(input, layer_.I, layer_.H, 0,
                                                              block + b, scratch + b * size);
                                    }
                                    return static_cast<const Accum*>(scratch);
                                  });
    if constexpr (kHasVariants) {
      if (has_norms()) normalise_input(product);
    }
    return product;
  }
  void normalise_input(const Scratch<Accum>& product) const {
    const int64_t work = 16 * layer_.N * layer_.cell.gates * layer_.H;
    for (int64_t d = 0; d < layer_.D; ++d) {
      Forward<Accum> s;
      s.hidden_size = layer_.H;
      s.output_size = layer_.P;
      s.x_product_stride = product_stride_;
      s.variant = &variants_[size_t(d)];
      if (out_.saved.numel() > 0) s.saved = direction_data<Accum>(out_.saved, d);
      in_row_parts<Accum>(layer_.N, work, [&](int64_t begin, int64_t end) {
        kernel_.variants.input(s, product[d], begin, end);
      });
    }
  }

  const Layer& layer_;
  const Request request_;
  const KernelsOf<Accum, Element>& kernels_;
  const Kernel<Accum, Element>& kernel_;
  const ForwardStrategy strategy_;
  const int64_t blocks_;
  const BatchLayout layout_;
  const WorkPartition partition_;
  VariantOutput out_;
  const c10::SmallVector<Weights<Element>, 2> weights_;
  const c10::SmallVector<Variant<Accum>, 2> variants_;
  const Operands<Element> operands_;
  const int64_t product_stride_;
  const Scratch<Accum> x_product_;
  const int64_t panel_size_;
  const bool prepacks_;
  const Scratch<Accum> panels_, projection_panels_;
  const Runs<Forward<Accum, Element>> runs_;
};

/// The same with frozen weights.
template <class Element>
class FrozenCall {
 public:
  FrozenCall(const Layer& layer, const FrozenWeights& weights)
      : layer_(layer),
        packed_(weights),
        kernels_(kernels_of(weights)),
        kernel_(kernels_.cells[layer.cell.index]),
        strategy_(choose_strategy(layer, kernels_.common, kernel_.blocks_per_tile, &weights)),
        layout_(layer),
        partition_(layer, layout_, strategy_.work, strategy_.input_gemm,
                   divide_up(layer.H, kernels_.common.lanes), kernel_.blocks_per_tile),
        out_(new_output<Element>(layer, {false})),
        operands_(layer, layout_, kernels_.common),
        product_stride_(scalar::round_up(layer.cell.gates * layer.H, kernels_.common.lanes)),
        x_product_(strategy_.input_gemm ? multiply() : Scratch<float>()),
        runs_(forward_runs<Element, float>(layer_, layout_, partition_, kernel_, operands_, out_,
                                           [&](Forward<float, Element>& s, int64_t d) {
                                             s.panels = packed_.panels(d);
                                             s.panels_have_input = true;
                                             s.projection_panels = packed_.projection(d);
                                             s.x_product = x_product_.get(d);
                                             s.x_product_stride = product_stride_;
                                           })) {}

  VariantOutput run(const std::shared_ptr<void>& owner) {
    const PoolBackoff::Owner keep(owner);
    partition_.execute(layer_.T, [this](int64_t r, int64_t i, int64_t begin, int64_t end) {
      kernel_.forward_step(runs_[r], i, begin, end);
    });
    return std::move(out_);
  }

 private:
  static const KernelsOf<float, Element>& kernels_of(const FrozenWeights& weights) {
    if constexpr (std::is_same_v<Element, Int16>) {
      return kernels().frozen_int8;
    } else {
      return weights.type() == WeightType::bfloat16 ? kernels().frozen_bf16 : kernels().f32;
    }
  }
  Scratch<float> multiply() const {
    const int64_t panel_size = kernel_.forward_panel_size(layer_.I, layer_.P);
    return multiply_input(layer_, kernels_, operands_, layer_.P, product_stride_,
                          [&](int64_t d, int64_t block, int64_t, float*) {
                            return packed_.panels(d) + block * panel_size;
                          });
  }

  const Layer& layer_;
  const FrozenWeights packed_;
  const KernelsOf<float, Element>& kernels_;
  const Kernel<float, Element>& kernel_;
  const ForwardStrategy strategy_;
  const BatchLayout layout_;
  const WorkPartition partition_;
  VariantOutput out_;
  const Operands<Element> operands_;
  const int64_t product_stride_;
  const Scratch<float> x_product_;
  const Runs<Forward<float, Element>> runs_;
};

/// Runs TheCall(layer, argument). On the own pool, if a part is held for too long, the call begins
/// anew, alone and in new memory. The thread with the part goes on in the old memory, which its job
/// keeps. That memory includes a copy of the input, whose own memory the caller may free.
template <class TheCall, class Argument>
LayerOutput run_or_begin_anew(const Layer& layer, const Argument& argument) {
  if (!PoolBackoff::may_give_up()) return TheCall(layer, argument).run(nullptr);
  struct Kept {
    Layer layer;
    TheCall call;
    Kept(const Layer& of, const Argument& argument) : layer(copy(of)), call(layer, argument) {}
    /// By this thread: torch's copy of a large tensor waits for torch's pool.
    static Layer copy(Layer layer) {
      const Tensor from = std::exchange(
          layer.input, at::detail::empty_cpu(layer.input.sizes(), layer.input.scalar_type()));
      const int64_t rows = layer.packed ? 1 : from.size(1), bytes = from.size(-1) * from.itemsize();
      const int64_t stride = layer.packed ? 0 : from.stride(1);
      const auto* const data = static_cast<const unsigned char*>(from.const_data_ptr());
      auto* to = static_cast<unsigned char*>(layer.input.mutable_data_ptr());
      for (int64_t t = 0; t < from.size(0); ++t) {
        for (int64_t b = 0; b < rows; ++b, to += bytes) {
          std::memcpy(to, data + (t * from.stride(0) + b * stride) * from.itemsize(),
                      size_t(bytes));
        }
      }
      return layer;
    }
  };
  try {
    const auto kept = std::make_shared<Kept>(layer, argument);
    return kept->call.run(kept);
  } catch (const GaveUp&) {
    const PoolBackoff::Alone alone;
    return TheCall(layer, argument).run(nullptr);
  }
}

}  // namespace

template <class Element>
LayerOutput forward(const Layer& layer, bool save) {
  return run_or_begin_anew<ForwardCall<Element>>(layer, Request{save});
}

template <class Element>
VariantOutput forward_variant(const Layer& layer, const LayerVariant& variant, bool save) {
  return ForwardCall<Element>(layer, {save, &variant}).run(nullptr);
}
template VariantOutput forward_variant<float>(const Layer&, const LayerVariant&, bool);
template VariantOutput forward_variant<double>(const Layer&, const LayerVariant&, bool);

template LayerOutput forward<float>(const Layer&, bool);
template LayerOutput forward<double>(const Layer&, bool);
template LayerOutput forward<BFloat16>(const Layer&, bool);

LayerOutput forward_frozen(const Layer& layer, const FrozenWeights& weights) {
  return weights.type() == WeightType::int8 ? run_or_begin_anew<FrozenCall<Int16>>(layer, weights)
                                            : run_or_begin_anew<FrozenCall<float>>(layer, weights);
}

}  // namespace fusedrnn::cpu
