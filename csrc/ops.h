// The ops in C++: arguments and results as structs, and as the dispatcher's flat lists. ops.cpp has
// the contract.
//
// The arguments are listed once, in FUSEDRNN_LAYER_ARGS. Structs, schemas, op types and
// registration follow from it and from the list of cells (cells.h).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cells.h"

namespace fusedrnn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// A layer's arguments in schema order: those before the weights, the weights, and those behind.
/// CELL_STATE: for cells with a cell state alone.
#define FUSEDRNN_INPUT_ARGS(ARG, CELL_STATE) \
  ARG(const Tensor&, input)                  \
  ARG(const OptionalTensor&, h0)             \
  CELL_STATE(const OptionalTensor&, c0)
#define FUSEDRNN_LAYOUT_ARGS(ARG)         \
  ARG(bool, bidirectional)                \
  ARG(const OptionalTensor&, batch_sizes) \
  ARG(const OptionalTensor&, lengths)
#define FUSEDRNN_LAYER_ARGS(ARG, CELL_STATE) \
  FUSEDRNN_INPUT_ARGS(ARG, CELL_STATE)       \
  ARG(at::TensorList, weights)               \
  FUSEDRNN_LAYOUT_ARGS(ARG)

/// The arguments of an op with frozen weights.
#define FUSEDRNN_FROZEN_ARGS(ARG, CELL_STATE) \
  FUSEDRNN_INPUT_ARGS(ARG, CELL_STATE)        \
  ARG(const Tensor&, weights)                 \
  ARG(int64_t, hidden_size)                   \
  ARG(int64_t, output_size)                   \
  FUSEDRNN_LAYOUT_ARGS(ARG)

/// What a variant's op takes behind the layer's arguments.
#define FUSEDRNN_VARIANT_ARGS(ARG)           \
  ARG(const OptionalTensor&, reset_mask)     \
  ARG(bool, reset_to_initial)                \
  ARG(const OptionalTensor&, hidden_mask)    \
  ARG(const OptionalTensor&, candidate_mask) \
  ARG(double, candidate_scale)               \
  ARG(const OptionalTensor&, zoneout_h_mask) \
  ARG(const OptionalTensor&, zoneout_c_mask) \
  ARG(double, zoneout_h)                     \
  ARG(double, zoneout_c)                     \
  ARG(at::TensorList, norms)

#define FUSEDRNN_OUTPUT_GRADIENT_ARGS(ARG, CELL_STATE) \
  ARG(const OptionalTensor&, grad_output)              \
  ARG(const OptionalTensor&, grad_h_n)                 \
  CELL_STATE(const OptionalTensor&, grad_c_n)

/// The forward op's arguments behind the layer's.
#define FUSEDRNN_FORWARD_ARGS(ARG) ARG(bool, save)

/// The backward op's arguments behind the gradients and the layer's.
#define FUSEDRNN_BACKWARD_ARGS(ARG)  \
  ARG(const OptionalTensor&, output) \
  ARG(const Tensor&, saved)          \
  ARG(const c10::List<bool>&, output_mask)

/// A variant's backward op has these behind its layer's and variant's.
#define FUSEDRNN_VARIANT_BACKWARD_ARGS(ARG) \
  ARG(const OptionalTensor&, grad_cells)    \
  ARG(const Tensor&, saved)                 \
  ARG(const c10::List<bool>&, output_mask)

#define FUSEDRNN_FIELD(type, name) type name;
struct LayerArgs {
  FUSEDRNN_LAYER_ARGS(FUSEDRNN_FIELD, FUSEDRNN_FIELD)
};
struct ForwardArgs : LayerArgs {
  FUSEDRNN_FORWARD_ARGS(FUSEDRNN_FIELD)
};
struct FrozenArgs {
  FUSEDRNN_FROZEN_ARGS(FUSEDRNN_FIELD, FUSEDRNN_FIELD)
};
struct OutputGradientArgs {
  FUSEDRNN_OUTPUT_GRADIENT_ARGS(FUSEDRNN_FIELD, FUSEDRNN_FIELD)
};
struct BackwardArgs : OutputGradientArgs, LayerArgs {
  FUSEDRNN_BACKWARD_ARGS(FUSEDRNN_FIELD)
};
struct VariantArgs : LayerArgs {
  FUSEDRNN_VARIANT_ARGS(FUSEDRNN_FIELD)
};
struct VariantForwardArgs : VariantArgs {
  FUSEDRNN_FORWARD_ARGS(FUSEDRNN_FIELD)
};
struct VariantBackwardArgs : OutputGradientArgs, VariantArgs {
  FUSEDRNN_VARIANT_BACKWARD_ARGS(FUSEDRNN_FIELD)
};
#undef FUSEDRNN_FIELD

/// A forward op's results; c_n is undefined without a cell state.
struct LayerOutput {
  Tensor output, h_n, c_n, saved;
  Tensor& cell_state() { return c_n; }
};
/// A variant's: `cells` is empty without a cell state.
struct VariantOutput : LayerOutput {
  Tensor cells;
};
/// A backward op's results; likewise c0.
struct LayerGradients {
  Tensor input, h0, c0;
  std::vector<Tensor> weights;
  Tensor& cell_state() { return c0; }
};

// ---- flat lists ---------------------------------------------------------------------------------
//
// A list for a cell without a cell state lacks c0, grad_c_n and c_n.

template <class Cell, class Item>
auto cell_state_item(Item item) {
  if constexpr (Cell::kHasCellState) {
    return std::tuple<Item>(std::forward<Item>(item));
  } else {
    return std::tuple<>();
  }
}

#define FUSEDRNN_ITEM(type, name) std::tuple<type>(args.name),
#define FUSEDRNN_CELL_STATE_ITEM(type, name) cell_state_item<Cell, type>(args.name),
template <class Cell>
auto flat(const LayerArgs& args) {
  return std::tuple_cat(FUSEDRNN_LAYER_ARGS(FUSEDRNN_ITEM, FUSEDRNN_CELL_STATE_ITEM)
                            std::tuple<>());
}
template <class Cell>
auto flat(const FrozenArgs& args) {
  return std::tuple_cat(FUSEDRNN_FROZEN_ARGS(FUSEDRNN_ITEM, FUSEDRNN_CELL_STATE_ITEM)
                            std::tuple<>());
}
template <class Cell>
auto flat(const ForwardArgs& args) {
  return std::tuple_cat(flat<Cell>(static_cast<const LayerArgs&>(args)),
                        FUSEDRNN_FORWARD_ARGS(FUSEDRNN_ITEM) std::tuple<>());
}
template <class Cell>
auto flat(const BackwardArgs& args) {
  return std::tuple_cat(FUSEDRNN_OUTPUT_GRADIENT_ARGS(FUSEDRNN_ITEM, FUSEDRNN_CELL_STATE_ITEM)
                            flat<Cell>(static_cast<const LayerArgs&>(args)),
                        FUSEDRNN_BACKWARD_ARGS(FUSEDRNN_ITEM) std::tuple<>());
}
template <class Cell>
auto flat(const VariantArgs& args) {
  return std::tuple_cat(flat<Cell>(static_cast<const LayerArgs&>(args)),
                        FUSEDRNN_VARIANT_ARGS(FUSEDRNN_ITEM) std::tuple<>());
}
template <class Cell>
auto flat(const VariantForwardArgs& args) {
  return std::tuple_cat(flat<Cell>(static_cast<const VariantArgs&>(args)),
                        FUSEDRNN_FORWARD_ARGS(FUSEDRNN_ITEM) std::tuple<>());
}
template <class Cell>
auto flat(const VariantBackwardArgs& args) {
  return std::tuple_cat(FUSEDRNN_OUTPUT_GRADIENT_ARGS(FUSEDRNN_ITEM, FUSEDRNN_CELL_STATE_ITEM)
                            flat<Cell>(static_cast<const VariantArgs&>(args)),
                        FUSEDRNN_VARIANT_BACKWARD_ARGS(FUSEDRNN_ITEM) std::tuple<>());
}
#undef FUSEDRNN_ITEM
#undef FUSEDRNN_CELL_STATE_ITEM
/// Without `saved`, as an op with frozen weights gives it.
template <class Cell>
auto flat_states(LayerOutput&& out) {
  return std::tuple_cat(std::tuple<Tensor, Tensor>(std::move(out.output), std::move(out.h_n)),
                        cell_state_item<Cell, Tensor>(std::move(out.c_n)));
}
template <class Cell>
auto flat(LayerOutput&& out) {
  std::tuple<Tensor> saved(std::move(out.saved));
  return std::tuple_cat(flat_states<Cell>(std::move(out)), std::move(saved));
}
template <class Cell>
auto flat(VariantOutput&& out) {
  std::tuple<Tensor, Tensor> rest(std::move(out.cells), std::move(out.saved));
  return std::tuple_cat(flat_states<Cell>(std::move(out)), std::move(rest));
}
template <class Cell>
auto flat(LayerGradients&& out) {
  return std::tuple_cat(std::tuple<Tensor, Tensor>(std::move(out.input), std::move(out.h0)),
                        cell_state_item<Cell, Tensor>(std::move(out.c0)),
                        std::tuple<std::vector<Tensor>>(std::move(out.weights)));
}

/// The struct for a flat list.
template <class Cell, class Args, class... Items>
Args structured(const Items&... items) {
  static const OptionalTensor absent;
  const auto args = [](const auto&... all) { return Args{all...}; };
  if constexpr (Cell::kHasCellState) {
    return args(items...);
  } else if constexpr (std::is_base_of_v<OutputGradientArgs, Args>) {
    return [&](const auto& grad_output, const auto& grad_h_n, const auto& input, const auto& h0,
               const auto&... rest) {
      return args(grad_output, grad_h_n, absent, input, h0, absent, rest...);
    }(items...);
  } else {
    return [&](const auto& input, const auto& h0, const auto&... rest) {
      return args(input, h0, absent, rest...);
    }(items...);
  }
}
template <class Cell, class Results, class... Items>
Results structured(std::tuple<Items...>&& out) {
  constexpr size_t last = sizeof...(Items) - 1;
  Results results{std::get<0>(std::move(out)), std::get<1>(std::move(out)), Tensor(),
                  std::get<last>(std::move(out))};
  if constexpr (Cell::kHasCellState) results.cell_state() = std::get<2>(std::move(out));
  return results;
}

// ---- ops ----------------------------------------------------------------------------------------

template <class Items, class Results>
struct Signature;
template <class... Items, class Results>
struct Signature<std::tuple<Items...>, Results> {
  using type = Results(Items...);
};
/// A cell's ops as the dispatcher sees them: functions with flat lists.
template <class Cell>
struct OpTypes {
  using Forward = typename Signature<decltype(flat<Cell>(std::declval<const ForwardArgs&>())),
                                     decltype(flat<Cell>(std::declval<LayerOutput>()))>::type;
  using Backward = typename Signature<decltype(flat<Cell>(std::declval<const BackwardArgs&>())),
                                      decltype(flat<Cell>(std::declval<LayerGradients>()))>::type;
};
template <class Cell>
struct VariantOpTypes {
  using Forward =
      typename Signature<decltype(flat<Cell>(std::declval<const VariantForwardArgs&>())),
                         decltype(flat<Cell>(std::declval<VariantOutput>()))>::type;
  using Backward =
      typename Signature<decltype(flat<Cell>(std::declval<const VariantBackwardArgs&>())),
                         decltype(flat<Cell>(std::declval<LayerGradients>()))>::type;
};
template <class Cell>
using FrozenOp = typename Signature<decltype(flat<Cell>(std::declval<const FrozenArgs&>())),
                                    decltype(flat_states<Cell>(std::declval<LayerOutput>()))>::type;
template <class Cell>
using ForwardOp = typename OpTypes<Cell>::Forward;
template <class Cell>
using BackwardOp = typename OpTypes<Cell>::Backward;

template <class Op>
c10::TypedOperatorHandle<Op> find_op(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "").typed<Op>();
}
template <class Cell>
const auto& forward_op() {
  static const auto op = find_op<ForwardOp<Cell>>(std::string("fusedrnn::") + Cell::kName);
  return op;
}
template <class Cell>
const auto& frozen_op() {
  static const auto op =
      find_op<FrozenOp<Cell>>(std::string("fusedrnn::") + Cell::kName + "_frozen");
  return op;
}
template <class Cell>
const auto& backward_op() {
  static const auto op =
      find_op<BackwardOp<Cell>>(std::string("fusedrnn::") + Cell::kName + "_backward");
  return op;
}
/// The backward op made from torch's own ops (_ops.py), for create_graph=True.
template <class Cell>
const auto& differentiable_backward_op() {
  static const auto op = find_op<BackwardOp<Cell>>(std::string("fusedrnn::_") + Cell::kName +
                                                   "_backward_differentiable");
  return op;
}

template <class Cell>
const auto& variant_forward_op() {
  static const auto op = find_op<typename VariantOpTypes<Cell>::Forward>(std::string("fusedrnn::") +
                                                                         Cell::kName + "_variant");
  return op;
}
/// is_differentiable: made from torch's own ops (_ops.py), for create_graph=True.
template <class Cell, bool is_differentiable = false>
const auto& variant_backward_op() {
  static const auto op = find_op<typename VariantOpTypes<Cell>::Backward>(
      std::string("fusedrnn::") + (is_differentiable ? "_" : "") + Cell::kName +
      "_variant_backward" + (is_differentiable ? "_differentiable" : ""));
  return op;
}

template <class Cell>
LayerOutput call(const c10::TypedOperatorHandle<ForwardOp<Cell>>& op, const ForwardArgs& args) {
  return structured<Cell, LayerOutput>(
      std::apply([&](const auto&... items) { return op.call(items...); }, flat<Cell>(args)));
}
/// Without `saved`.
template <class Cell>
LayerOutput call(const c10::TypedOperatorHandle<FrozenOp<Cell>>& op, const FrozenArgs& args) {
  auto out = std::apply([&](const auto&... items) { return op.call(items...); }, flat<Cell>(args));
  return structured<Cell, LayerOutput>(std::tuple_cat(std::move(out), std::tuple<Tensor>()));
}
template <class Cell>
LayerGradients call(const c10::TypedOperatorHandle<BackwardOp<Cell>>& op,
                    const BackwardArgs& args) {
  return structured<Cell, LayerGradients>(
      std::apply([&](const auto&... items) { return op.call(items...); }, flat<Cell>(args)));
}

template <class Cell>
VariantOutput call_variant(const VariantForwardArgs& args) {
  auto out =
      std::apply([](const auto&... items) { return variant_forward_op<Cell>().call(items...); },
                 flat<Cell>(args));
  constexpr size_t last = std::tuple_size_v<decltype(out)> - 1;
  VariantOutput results;
  results.output = std::get<0>(std::move(out));
  results.h_n = std::get<1>(std::move(out));
  if constexpr (Cell::kHasCellState) results.c_n = std::get<2>(std::move(out));
  results.cells = std::get<last - 1>(std::move(out));
  results.saved = std::get<last>(std::move(out));
  return results;
}
template <class Cell, bool is_differentiable = false>
LayerGradients call_variant(const VariantBackwardArgs& args) {
  return structured<Cell, LayerGradients>(std::apply(
      [](const auto&... items) {
        return variant_backward_op<Cell, is_differentiable>().call(items...);
      },
      flat<Cell>(args)));
}

/// A cell's kernels for the dispatcher, from a backend's functions over structs:
/// Backend::forward<Cell>(const ForwardArgs&) and Backend::backward<Cell>(const BackwardArgs&).
template <class Backend, class Cell, class Forward = ForwardOp<Cell>,
          class Backward = BackwardOp<Cell>>
struct CellOps;
template <class Backend, class Cell, class Output, class... ForwardItems, class Gradients,
          class... BackwardItems>
struct CellOps<Backend, Cell, Output(ForwardItems...), Gradients(BackwardItems...)> {
  static Output forward(ForwardItems... items) {
    return flat<Cell>(Backend::template forward<Cell>(structured<Cell, ForwardArgs>(items...)));
  }
  static Gradients backward(BackwardItems... items) {
    return flat<Cell>(Backend::template backward<Cell>(structured<Cell, BackwardArgs>(items...)));
  }
};

/// Registers a backend's kernels for every cell in a torch::Library.
template <class Backend, class Library>
void register_ops(Library& m) {
  scalar::Cells::for_each([&](auto cell) {
    using Ops = CellOps<Backend, decltype(cell)>;
    m.impl(cell.kName, &Ops::forward);
    m.impl((std::string(cell.kName) + "_backward").c_str(), &Ops::backward);
  });
}

/// The same for the op with frozen weights: Backend::frozen<Cell>(const FrozenArgs&).
template <class Backend, class Cell, class Op = FrozenOp<Cell>>
struct FrozenCellOp;
template <class Backend, class Cell, class Output, class... Items>
struct FrozenCellOp<Backend, Cell, Output(Items...)> {
  static Output frozen(Items... items) {
    return flat_states<Cell>(
        Backend::template frozen<Cell>(structured<Cell, FrozenArgs>(items...)));
  }
};
template <class Backend, class Library>
void register_frozen_ops(Library& m) {
  scalar::Cells::for_each([&](auto cell) {
    m.impl((std::string(cell.kName) + "_frozen").c_str(),
           &FrozenCellOp<Backend, decltype(cell)>::frozen);
  });
}

/// The same for variants: Backend::forward_variant<Cell>(const VariantForwardArgs&) and
/// Backend::backward_variant<Cell>(const VariantBackwardArgs&).
template <class Backend, class Cell, class Forward = typename VariantOpTypes<Cell>::Forward,
          class Backward = typename VariantOpTypes<Cell>::Backward>
struct VariantCellOps;
template <class Backend, class Cell, class Output, class... ForwardItems, class Gradients,
          class... BackwardItems>
struct VariantCellOps<Backend, Cell, Output(ForwardItems...), Gradients(BackwardItems...)> {
  static Output forward(ForwardItems... items) {
    return flat<Cell>(
        Backend::template forward_variant<Cell>(structured<Cell, VariantForwardArgs>(items...)));
  }
  static Gradients backward(BackwardItems... items) {
    return flat<Cell>(
        Backend::template backward_variant<Cell>(structured<Cell, VariantBackwardArgs>(items...)));
  }
};
template <class Backend, class Library>
void register_variant_ops(Library& m) {
  scalar::Cells::for_each([&](auto cell) {
    using Ops = VariantCellOps<Backend, decltype(cell)>;
    m.impl((std::string(cell.kName) + "_variant").c_str(), &Ops::forward);
    m.impl((std::string(cell.kName) + "_variant_backward").c_str(), &Ops::backward);
  });
}

// ---- gradients ----------------------------------------------------------------------------------

inline bool needs_gradient(const Tensor& t) { return t.defined() && t.requires_grad(); }
inline bool needs_gradient(const OptionalTensor& t) { return t && needs_gradient(*t); }
inline bool needs_gradient(at::TensorList list) {
  for (const Tensor& t : list) {
    if (needs_gradient(t)) return true;
  }
  return false;
}
inline bool needs_gradient(const LayerArgs& args) {
  return needs_gradient(args.input) || needs_gradient(args.h0) || needs_gradient(args.c0) ||
         needs_gradient(args.weights);
}
inline bool needs_gradient(const VariantArgs& args) {
  return needs_gradient(static_cast<const LayerArgs&>(args)) || needs_gradient(args.norms);
}
inline bool needs_gradient(const OutputGradientArgs& args) {
  return needs_gradient(args.grad_output) || needs_gradient(args.grad_h_n) ||
         needs_gradient(args.grad_c_n);
}

/// Whether autograd has to record a call with these arguments.
template <class... Args>
bool any_needs_gradient(const Args&... args) {
  return at::GradMode::is_enabled() && (needs_gradient(args) || ...);
}

}  // namespace fusedrnn
