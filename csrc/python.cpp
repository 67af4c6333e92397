// The extension as a Python module: a fast path from the modules to the ops, and a cell list.
//
// torch.ops converts every argument to its schema and back. For one step of a small layer this
// costs more than the layer. `layers` and `cell` take a module's attributes and call the ops
// through the dispatcher. They know the plain case only. In any other case, and for a wrong
// argument, they return None before they call an op. fusedrnn/_forward.py then takes the slow path,
// which words the error. After an op was called its exception goes to the caller: hooks may have
// run, and must not run twice.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/cat.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <exception>

#include "layer.h"
#include "ops.h"

namespace fusedrnn {
namespace {

#define FUSEDRNN_NAME(name) static PyObject* const name = PyUnicode_InternFromString(#name)

const Tensor* plain_tensor(PyObject* object) {
  return object && THPVariable_CheckExact(object) ? &THPVariable_Unpack(object) : nullptr;
}

/// Reads an attribute that must be True or False itself. The slow path has torch's rules for other
/// values, as 1 or a numpy bool.
bool read_flag(PyObject* value, bool& flag) {
  flag = value == Py_True;
  return flag || value == Py_False;
}

/// An int's value; -1 for other types and for numbers too large.
int64_t read_number(PyObject* value) {
  int overflow = 0;
  return value && PyLong_CheckExact(value) ? PyLong_AsLongAndOverflow(value, &overflow) : -1;
}

/// Whether input's device has kernels, no mode intercepts torch calls, and the ops have rules for
/// all active modes.
bool is_plain(const Tensor& input, int cell) {
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  const auto key = c10::legacyExtractDispatchKey(input.key_set());
  bool has_kernel = false;
  scalar::Cells::visit(
      cell, [&](auto of) { has_kernel = forward_op<decltype(of)>().hasKernelForDispatchKey(key); });
  // A meta tensor has fake kernels, and a device that autocast does not know.
  return has_kernel && !input.is_meta() &&
         !tls.included_.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !tls.included_.has(c10::DispatchKey::Tracer) &&
         !tls.included_.has(c10::DispatchKey::Python) &&
         !at::autocast::is_autocast_enabled(input.device().type()) &&
         !at::impl::torch_function_mode_enabled() &&
         !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

using Tensors = c10::SmallVector<Tensor, 16>;

/// Initial or final states: h, and c for a cell with a cell state.
struct States {
  OptionalTensor h, c;
};

/// Reads hx: None, a tensor, or with a cell state two tensors, each with `dim` dimensions.
bool read_states(PyObject* hx, bool has_cell_state, int64_t dim, States& states) {
  if (hx == Py_None) return true;
  PyObject* item[2] = {hx, nullptr};
  if (has_cell_state) {
    if (!(PyTuple_CheckExact(hx) || PyList_CheckExact(hx)) || PySequence_Fast_GET_SIZE(hx) != 2) {
      return false;
    }
    item[0] = PySequence_Fast_GET_ITEM(hx, 0);
    item[1] = PySequence_Fast_GET_ITEM(hx, 1);
  }
  OptionalTensor* to[2] = {&states.h, &states.c};
  for (int i = 0; i < 1 + has_cell_state; ++i) {
    const Tensor* t = plain_tensor(item[i]);
    if (!t || t->dim() != dim) return false;
    *to[i] = *t;
  }
  return true;
}

/// The arguments to `layers` and `cell`: a module's attributes, its cell's index, input, hx.
class Arguments {
 public:
  /// Whether it is the plain case, and the input has `dim` dimensions.
  bool read(PyObject* const* args, Py_ssize_t count, int64_t dim) {
    FUSEDRNN_NAME(_parameters);
    if (count != 4 || !PyDict_CheckExact(args[0])) return false;
    attributes_ = args[0];
    const int64_t index = read_number(args[1]);
    if (index < 0 || index >= scalar::Cells::count) return false;
    cell = &cell_info(int(index));
    has_cell_state = cell->has_cell_state;
    input = plain_tensor(args[2]);
    parameters_ = (*this)[_parameters];
    return input && input->dim() == dim && is_plain(*input, cell->index) &&
           read_states(args[3], has_cell_state, dim, states) && parameters_ &&
           PyDict_CheckExact(parameters_);
  }
  PyObject* operator[](PyObject* name) const { return PyDict_GetItemWithError(attributes_, name); }
  /// Whether there is such a weight, a plain tensor; appends it to `weights`.
  bool read_weight(PyObject* name) {
    const Tensor* w = plain_tensor(PyDict_GetItemWithError(parameters_, name));
    if (w) weights.push_back(*w);
    return w;
  }

  /// Whether the module's own checks would pass on types, devices and sizes, for
  /// `layers` layers and `rows` rows. They word errors as torch does. The op checks the rest.
  bool fits(int64_t layers, int64_t rows) const {
    const Tensor &ih = weights[0], &hh = weights[1];
    if (ih.dim() != 2 || hh.dim() != 2 || input->size(-1) != ih.size(1)) return false;
    const auto is_like_weight = [&](const Tensor& t) {
      return t.scalar_type() == ih.scalar_type() && t.device() == ih.device();
    };
    if (!is_like_weight(*input)) return false;
    if (!states.h) return true;
    const auto is_state = [&](const Tensor& s, int64_t width) {
      const auto sizes = s.sizes();
      return is_like_weight(s) && sizes.back() == width && sizes[sizes.size() - 2] == rows &&
             (sizes.size() == 2 || sizes[0] == layers);
    };
    return is_state(*states.h, hh.size(1)) && (!has_cell_state || is_state(*states.c, units()));
  }
  /// H, by the first layer's weights.
  int64_t units() const { return weights[1].size(0) / cell->gates; }
  /// Whether there is None in its place.
  bool is_absent(PyObject* name) const {
    return PyDict_GetItemWithError(parameters_, name) == Py_None;
  }

  const CellInfo* cell = nullptr;
  bool has_cell_state = false;
  const Tensor* input = nullptr;
  States states;
  Tensors weights;

 private:
  PyObject *attributes_ = nullptr, *parameters_ = nullptr;
};

/// A tuple that takes over the references to its items; null if an item is.
template <class... Items>
PyObject* tuple_of(Items... items) {
  PyObject* const tuple = (items && ...) ? PyTuple_New(sizeof...(items)) : nullptr;
  if (!tuple) {
    (Py_XDECREF(items), ...);
    return nullptr;
  }
  Py_ssize_t i = 0;
  (PyTuple_SET_ITEM(tuple, i++, items), ...);
  return tuple;
}

LayerOutput run_layer(const CellInfo& info, const Tensor& input, const States& states,
                      at::TensorList weights, bool bidirectional) {
  static const OptionalTensor absent;
  LayerOutput result;
  scalar::Cells::visit(info.index, [&](auto cell) {
    using Cell = decltype(cell);
    result = call<Cell>(
        forward_op<Cell>(),
        ForwardArgs{{input, states.h, states.c, weights, bidirectional, absent, absent}, false});
  });
  return result;
}

/// Releases the GIL for calls long enough to pay for it.
class WithoutGil {
 public:
  /// weights: elements, or bytes, that each row of the input meets.
  WithoutGil(const Tensor& input, int64_t weights) {
    const int64_t rows = input.numel() / std::max<int64_t>(input.size(-1), 1);
    // On a GPU even a small call may wait for memory or for room in a queue.
    if (!input.is_cpu() || rows * weights > 1 << 16) state_ = PyEval_SaveThread();
  }
  ~WithoutGil() {
    if (state_) PyEval_RestoreThread(state_);
  }
  WithoutGil(const WithoutGil&) = delete;

 private:
  PyThreadState* state_ = nullptr;
};

/// Skips the ops' Autograd kernels where no argument needs a gradient.
class BelowAutograd {
 public:
  BelowAutograd(const Tensor& input, const States& states, at::TensorList weights) {
    if (!any_needs_gradient(input, states.h, states.c, weights)) guard_.emplace();
  }

 private:
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard_;
};

/// Calls run(index, input, its states) layer by layer; joins the final states.
template <class Run>
LayerOutput over_layers(int64_t layers, bool bidirectional, Tensor x, const States& states,
                        const Run& run) {
  if (layers == 1) return run(0, x, states);
  const int64_t D = bidirectional ? 2 : 1;
  std::vector<Tensor> h, c;
  for (int64_t i = 0; i < layers; ++i) {
    const auto of_layer = [&](const OptionalTensor& s) {
      return s ? OptionalTensor(s->narrow(0, i * D, D)) : std::nullopt;
    };
    LayerOutput out = run(i, x, States{of_layer(states.h), of_layer(states.c)});
    x = std::move(out.output);
    h.push_back(std::move(out.h_n));
    if (out.c_n.defined()) c.push_back(std::move(out.c_n));
  }
  return {std::move(x), at::cat(h), c.empty() ? Tensor() : at::cat(c), {}};
}

/// Runs a layer for one step, input [B, I]; its final states are [B, ...].
template <class Run>
LayerOutput one_step(const Tensor& input, const States& states, const Run& run) {
  const auto with_steps = [](const OptionalTensor& t) {
    return t ? OptionalTensor(t->unsqueeze(0)) : std::nullopt;
  };
  LayerOutput out = run(input.unsqueeze(0), States{with_steps(states.h), with_steps(states.c)});
  out.h_n.squeeze_(0);
  if (out.c_n.defined()) out.c_n.squeeze_(0);
  return out;
}

/// A layer module's results: (output, h_n) or (output, (h_n, c_n)).
PyObject* wrapped(LayerOutput result, bool has_cell_state) {
  PyObject* const y = THPVariable_Wrap(std::move(result.output));
  PyObject* const h_n = THPVariable_Wrap(std::move(result.h_n));
  if (!has_cell_state) return tuple_of(y, h_n);
  return tuple_of(y, tuple_of(h_n, THPVariable_Wrap(std::move(result.c_n))));
}
/// (h,) or (h, c).
PyObject* wrapped_states(LayerOutput result, bool has_cell_state) {
  PyObject* const h = THPVariable_Wrap(std::move(result.h_n));
  return has_cell_state ? tuple_of(h, THPVariable_Wrap(std::move(result.c_n))) : tuple_of(h);
}

/// layers(attributes, cell, input, hx): a layer module's forward result, or None.
PyObject* layers(PyObject*, PyObject* const* args, Py_ssize_t count) {
  FUSEDRNN_NAME(_flat_weights_names);
  FUSEDRNN_NAME(num_layers);
  FUSEDRNN_NAME(input_size);
  FUSEDRNN_NAME(hidden_size);
  FUSEDRNN_NAME(proj_size);
  FUSEDRNN_NAME(bias);
  FUSEDRNN_NAME(bidirectional);
  FUSEDRNN_NAME(batch_first);
  FUSEDRNN_NAME(dropout);
  FUSEDRNN_NAME(training);
  Arguments module;
  if (!module.read(args, count, 3)) Py_RETURN_NONE;
  PyObject* const names = module[_flat_weights_names];
  bool has_bias, both, first, trains;
  if (!names || !PyList_CheckExact(names) || !read_flag(module[bias], has_bias) ||
      !read_flag(module[bidirectional], both) || !read_flag(module[batch_first], first) ||
      !read_flag(module[training], trains)) {
    Py_RETURN_NONE;
  }
  const int64_t total = PyList_GET_SIZE(names), D = both ? 2 : 1;
  const int64_t L = read_number(module[num_layers]);
  const int64_t per_direction = 2 + 2 * has_bias + (read_number(module[proj_size]) != 0);
  if (L < 1 || L > total || total != L * D * per_direction) Py_RETURN_NONE;
  if (L > 1 && trains) {
    PyObject* const p = module[dropout];
    if (!p || !PyFloat_CheckExact(p) || PyFloat_AS_DOUBLE(p) != 0) Py_RETURN_NONE;
  }
  for (int64_t i = 0; i < total; ++i) {
    if (!module.read_weight(PyList_GET_ITEM(names, i))) Py_RETURN_NONE;
  }
  if (!module.fits(L * D, module.input->size(first ? 0 : 1)) ||
      read_number(module[input_size]) != module.input->size(2) ||
      (module.states.h && read_number(module[hidden_size]) != module.units())) {
    Py_RETURN_NONE;
  }

  LayerOutput result;
  {
    const WithoutGil no_gil(*module.input, module.weights[0].numel());
    const BelowAutograd below(*module.input, module.states, module.weights);
    Tensor x = first ? module.input->transpose(0, 1) : *module.input;
    result = over_layers(
        L, both, std::move(x), module.states,
        [&](int64_t i, const Tensor& input, const States& states) {
          return run_layer(*module.cell, input, states,
                           at::TensorList(module.weights).slice(i * total / L, total / L), both);
        });
    if (first) result.output.transpose_(0, 1);  // not a view: FSDP would lose its hooks
  }
  return wrapped(std::move(result), module.has_cell_state);
}

/// cell(attributes, cell, input, hx): (h,) or (h, c) after one step of a cell module, or None.
PyObject* cell(PyObject*, PyObject* const* args, Py_ssize_t count) {
  FUSEDRNN_NAME(weight_ih);
  FUSEDRNN_NAME(weight_hh);
  FUSEDRNN_NAME(bias_ih);
  FUSEDRNN_NAME(bias_hh);
  Arguments module;
  if (!module.read(args, count, 2)) Py_RETURN_NONE;
  if (!module.read_weight(weight_ih) || !module.read_weight(weight_hh)) Py_RETURN_NONE;
  // Like torch's cells, which do not read the attribute `bias` either.
  const bool without_bias = module.is_absent(bias_ih) && module.is_absent(bias_hh);
  if (!without_bias && !(module.read_weight(bias_ih) && module.read_weight(bias_hh))) {
    Py_RETURN_NONE;
  }
  if (!module.fits(1, module.input->size(0))) Py_RETURN_NONE;
  LayerOutput result;
  {
    const WithoutGil no_gil(*module.input, module.weights[0].numel());
    const BelowAutograd below(*module.input, module.states, module.weights);
    result = one_step(*module.input, module.states, [&](const Tensor& input, const States& states) {
      return run_layer(*module.cell, input, states, module.weights, false);
    });
  }
  return wrapped_states(std::move(result), module.has_cell_state);
}

/// A frozen module's constants: its attribute _config (fusedrnn/frozen.py).
struct FrozenConfig {
  const CellInfo* cell = nullptr;
  int64_t layers = 0, input_size = 0, hidden_size = 0, output_size = 0;
  bool bidirectional = false, batch_first = false;
  PyObject* names = nullptr;  ///< a tuple: the buffers with the layers' weights

  bool read(PyObject* config) {
    if (!config || !PyTuple_Check(config) || PyTuple_GET_SIZE(config) != 8) return false;
    const auto number = [&](Py_ssize_t i) { return read_number(PyTuple_GET_ITEM(config, i)); };
    const int64_t index = number(0);
    layers = number(1), input_size = number(2), hidden_size = number(3), output_size = number(4);
    names = PyTuple_GET_ITEM(config, 7);
    if (index < 0 || index >= scalar::Cells::count || layers < 1 || !PyTuple_CheckExact(names) ||
        PyTuple_GET_SIZE(names) != layers) {
      return false;
    }
    cell = &cell_info(int(index));
    return read_flag(PyTuple_GET_ITEM(config, 5), bidirectional) &&
           read_flag(PyTuple_GET_ITEM(config, 6), batch_first);
  }
};

LayerOutput run_frozen_layer(const FrozenConfig& config, const Tensor& input, const States& states,
                             const Tensor& weights) {
  static const OptionalTensor absent;
  LayerOutput result;
  scalar::Cells::visit(config.cell->index, [&](auto cell) {
    using Cell = decltype(cell);
    result = call<Cell>(frozen_op<Cell>(),
                        FrozenArgs{input, states.h, states.c, weights, config.hidden_size,
                                   config.output_size, config.bidirectional, absent, absent});
  });
  return result;
}

/// The arguments of `frozen_layers` and `frozen_cell`: a module's attributes, input, hx.
struct FrozenArguments {
  FrozenConfig config;
  const Tensor* input = nullptr;
  States states;
  Tensors weights;  ///< a layer's each

  /// Whether it is the plain case: a float32 CPU input with `dim` dimensions that fits.
  bool read(PyObject* const* args, Py_ssize_t count, int64_t dim) {
    FUSEDRNN_NAME(_buffers);
    FUSEDRNN_NAME(_config);
    if (count != 3 || !PyDict_CheckExact(args[0]) ||
        !config.read(PyDict_GetItemWithError(args[0], _config))) {
      return false;
    }
    input = plain_tensor(args[1]);
    PyObject* const buffers = PyDict_GetItemWithError(args[0], _buffers);
    if (!input || input->dim() != dim || !input->is_cpu() || input->scalar_type() != at::kFloat ||
        input->size(-1) != config.input_size || !is_plain(*input, config.cell->index) || !buffers ||
        !PyDict_CheckExact(buffers) ||
        !read_states(args[2], config.cell->has_cell_state, dim, states)) {
      return false;
    }
    for (int64_t i = 0; i < config.layers; ++i) {
      PyObject* const name = PyTuple_GET_ITEM(config.names, i);
      const Tensor* const w = plain_tensor(PyDict_GetItemWithError(buffers, name));
      if (!w) return false;
      weights.push_back(*w);
    }
    const int64_t rows = input->size(dim == 3 && !config.batch_first ? 1 : 0);
    return fits(states.h, rows, config.output_size) && fits(states.c, rows, config.hidden_size);
  }

 private:
  bool fits(const OptionalTensor& state, int64_t rows, int64_t width) const {
    if (!state) return true;
    const auto sizes = state->sizes();
    return state->is_cpu() && state->scalar_type() == at::kFloat && sizes.back() == width &&
           sizes[sizes.size() - 2] == rows &&
           (sizes.size() == 2 || sizes[0] == config.layers * (1 + config.bidirectional));
  }
};

/// frozen_layers(attributes, input, hx): as `layers`, for a frozen module.
PyObject* frozen_layers(PyObject*, PyObject* const* args, Py_ssize_t count) {
  FrozenArguments module;
  if (!module.read(args, count, 3)) Py_RETURN_NONE;
  const FrozenConfig& config = module.config;
  LayerOutput result;
  {
    const WithoutGil no_gil(*module.input, module.weights[0].numel());
    const BelowAutograd below(*module.input, module.states, {});
    Tensor x = config.batch_first ? module.input->transpose(0, 1) : *module.input;
    result = over_layers(config.layers, config.bidirectional, std::move(x), module.states,
                         [&](int64_t i, const Tensor& input, const States& states) {
                           return run_frozen_layer(config, input, states, module.weights[i]);
                         });
    if (config.batch_first) result.output.transpose_(0, 1);  // as in `layers`
  }
  return wrapped(std::move(result), config.cell->has_cell_state);
}

/// frozen_cell(attributes, input, hx): as `cell`, for a frozen module.
PyObject* frozen_cell(PyObject*, PyObject* const* args, Py_ssize_t count) {
  FrozenArguments module;
  if (!module.read(args, count, 2)) Py_RETURN_NONE;
  LayerOutput result;
  {
    const WithoutGil no_gil(*module.input, module.weights[0].numel());
    const BelowAutograd below(*module.input, module.states, {});
    result = one_step(*module.input, module.states, [&](const Tensor& input, const States& states) {
      return run_frozen_layer(module.config, input, states, module.weights[0]);
    });
  }
  return wrapped_states(std::move(result), module.config.cell->has_cell_state);
}

/// cells(): each cell's constants as a dict, by index.
PyObject* cells(PyObject*, PyObject* const*, Py_ssize_t) {
  PyObject* const list = PyList_New(0);
  for (int i = 0; list && i < scalar::Cells::count; ++i) {
    const CellInfo& info = cell_info(i);
    PyObject* const item =
        Py_BuildValue("{s:i,s:s,s:L,s:L,s:N,s:N}", "index", info.index, "name", info.name, "gates",
                      (long long)info.gates, "saved", (long long)info.saved, "has_cell_state",
                      PyBool_FromLong(info.has_cell_state), "has_projection",
                      PyBool_FromLong(info.has_projection));
    if (!item || PyList_Append(list, item)) {
      Py_XDECREF(item);
      Py_DECREF(list);
      return nullptr;
    }
    Py_DECREF(item);
  }
  return list;
}

using Function = PyObject*(PyObject*, PyObject* const*, Py_ssize_t);

template <Function function>
PyObject* translated(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  try {
    PyObject* const result = function(self, args, count);
    // An attribute could not be read: the slow path meets the same error and raises it.
    if (result == Py_None) PyErr_Clear();
    return result;
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
}

template <Function function>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(translated<function>)),
          METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {method<layers>("layers"),
                         method<cell>("cell"),
                         method<frozen_layers>("frozen_layers"),
                         method<frozen_cell>("frozen_cell"),
                         method<cells>("cells"),
                         {}};
PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "fusedrnn._C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace fusedrnn

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&fusedrnn::definition); }
