// The extension as a Python module: a short way from the modules to the ops.
//
// A call of torch.ops turns its arguments into a schema's and back; for one step of a small layer
// that costs more than the layer. `layers` and `cell` take what a module holds and call the ops
// through the dispatcher. They know the plain case only. Before they call an op they return None
// for any other case, and where an argument is wrong: fusedrnn/modules.py then takes the long way,
// which says what is. Once an op has been called, its exception is the caller's: hooks may have run
// under it, and a second call would run them again.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/cat.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <exception>

#include "cells.h"
#include "ops.h"

namespace fusedrnn {
namespace {

#define FUSEDRNN_NAME(name) static PyObject* const name = PyUnicode_InternFromString(#name)

const Tensor* plain_tensor(PyObject* object) {
  return object && THPVariable_CheckExact(object) ? &THPVariable_Unpack(object) : nullptr;
}

/// Reads an attribute that must be True or False itself: what else is true or false, as 1 or a
/// numpy bool, torch has rules for that the long way knows.
bool read_flag(PyObject* value, bool& flag) {
  flag = value == Py_True;
  return flag || value == Py_False;
}

/// The value of an int; -1 of what is no int or too large for this type.
int64_t read_number(PyObject* value) {
  int overflow = 0;
  return value && PyLong_CheckExact(value) ? PyLong_AsLongAndOverflow(value, &overflow) : -1;
}

/// Whether input's device has kernels, and nothing is active that the ops have no rule for, or that
/// wants to see calls of torch.
bool is_plain(const Tensor& input, bool has_c) {
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  const auto key = c10::legacyExtractDispatchKey(input.key_set());
  const c10::OperatorHandle& op =
      has_c ? static_cast<const c10::OperatorHandle&>(lstm_op()) : gru_op();
  // A meta tensor has fake kernels, and no autocast that could be asked for.
  return op.hasKernelForDispatchKey(key) && !input.is_meta() &&
         !tls.included_.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !tls.included_.has(c10::DispatchKey::Tracer) &&
         !tls.included_.has(c10::DispatchKey::Python) &&
         !at::autocast::is_autocast_enabled(input.device().type()) &&
         !at::impl::torch_function_mode_enabled() &&
         !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

using Tensors = c10::SmallVector<Tensor, 16>;

/// The final states of a call, or the initial ones: h and, for an LSTM, c.
struct States {
  OptionalTensor h, c;
};

/// Reads hx: None, a tensor, or for an LSTM a pair of them, all of `dim` dimensions.
bool read_states(PyObject* hx, bool has_c, int64_t dim, States& states) {
  if (hx == Py_None) return true;
  PyObject* item[2] = {hx, nullptr};
  if (has_c) {
    if (!(PyTuple_CheckExact(hx) || PyList_CheckExact(hx)) || PySequence_Fast_GET_SIZE(hx) != 2) {
      return false;
    }
    item[0] = PySequence_Fast_GET_ITEM(hx, 0);
    item[1] = PySequence_Fast_GET_ITEM(hx, 1);
  }
  OptionalTensor* to[2] = {&states.h, &states.c};
  for (int i = 0; i < 1 + has_c; ++i) {
    const Tensor* t = plain_tensor(item[i]);
    if (!t || t->dim() != dim) return false;
    *to[i] = *t;
  }
  return true;
}

/// What `layers` and `cell` are called with: a module's attributes, has_c, input, hx.
class Arguments {
 public:
  /// Whether it is the plain case, with an input of `dim` dimensions.
  bool read(PyObject* const* args, Py_ssize_t count, int64_t dim) {
    FUSEDRNN_NAME(_parameters);
    if (count != 4 || !PyDict_CheckExact(args[0])) return false;
    attributes_ = args[0];
    has_c = args[1] == Py_True;
    input = plain_tensor(args[2]);
    parameters_ = (*this)[_parameters];
    return input && input->dim() == dim && is_plain(*input, has_c) &&
           read_states(args[3], has_c, dim, states) && parameters_ &&
           PyDict_CheckExact(parameters_);
  }
  PyObject* operator[](PyObject* name) const { return PyDict_GetItemWithError(attributes_, name); }
  /// Whether there is such a weight, a plain tensor; appends it to `weights`.
  bool read_weight(PyObject* name) {
    const Tensor* w = plain_tensor(PyDict_GetItemWithError(parameters_, name));
    if (w) weights.push_back(*w);
    return w;
  }

  /// Whether the module's checks would pass, which word errors as torch does: the types, devices
  /// and sizes of input and states, of which there are `layers` for `rows` rows. The op checks the
  /// rest.
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
    return is_state(*states.h, hh.size(1)) && (!has_c || is_state(*states.c, units()));
  }
  /// H, by the first layer's weights.
  int64_t units() const {
    return weights[1].size(0) / (has_c ? host::Lstm::kGates : host::Gru::kGates);
  }
  /// Whether there is None in its place.
  bool is_absent(PyObject* name) const {
    return PyDict_GetItemWithError(parameters_, name) == Py_None;
  }

  bool has_c = false;
  const Tensor* input = nullptr;
  States states;
  Tensors weights;

 private:
  PyObject *attributes_ = nullptr, *parameters_ = nullptr;
};

/// A tuple that takes over the references to its items, where none of them is null.
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

struct Result {
  Tensor y, h_n, c_n;
};

Result call(bool has_c, const Tensor& input, const States& states, at::TensorList weights,
            bool bidirectional) {
  Result result;
  if (has_c) {
    std::tie(result.y, result.h_n, result.c_n, std::ignore) = lstm_op().call(
        input, states.h, states.c, weights, bidirectional, std::nullopt, std::nullopt, false);
  } else {
    std::tie(result.y, result.h_n, std::ignore) =
        gru_op().call(input, states.h, weights, bidirectional, std::nullopt, std::nullopt, false);
  }
  return result;
}

/// Lets other Python threads run meanwhile, if the call is long enough for that to be worth it.
class WithoutGil {
 public:
  WithoutGil(const Tensor& input, at::TensorList weights) {
    const int64_t rows = input.numel() / std::max<int64_t>(input.size(-1), 1);
    // A GPU's call may wait for memory or for room in a queue, whatever its size.
    if (!input.is_cpu() || rows * weights[0].numel() > 1 << 16) state_ = PyEval_SaveThread();
  }
  ~WithoutGil() {
    if (state_) PyEval_RestoreThread(state_);
  }
  WithoutGil(const WithoutGil&) = delete;

 private:
  PyThreadState* state_ = nullptr;
};

/// For calls that need no gradient: the ops without their Autograd kernels.
class BelowAutograd {
 public:
  BelowAutograd(const Tensor& input, const States& states, at::TensorList weights) {
    if (!any_needs_gradient(input, states.h, states.c, weights)) guard_.emplace();
  }

 private:
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard_;
};

/// layers(attributes, has_c, input, hx): what FusedLSTM's or FusedGRU's forward returns, or None.
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

  Result result;
  {
    const WithoutGil no_gil(*module.input, module.weights);
    const BelowAutograd below(*module.input, module.states, module.weights);
    Tensor x = first ? module.input->transpose(0, 1) : *module.input;
    if (L == 1) {
      result = call(module.has_c, x, module.states, module.weights, both);
    } else {
      std::vector<Tensor> h, c;
      for (int64_t i = 0; i < L; ++i) {
        const auto of_layer = [&](const OptionalTensor& s) {
          return s ? OptionalTensor(s->narrow(0, i * D, D)) : std::nullopt;
        };
        Result r = call(module.has_c, x, {of_layer(module.states.h), of_layer(module.states.c)},
                        at::TensorList(module.weights).slice(i * total / L, total / L), both);
        x = std::move(r.y);
        h.push_back(std::move(r.h_n));
        c.push_back(std::move(r.c_n));
      }
      result = {std::move(x), at::cat(h), module.has_c ? at::cat(c) : Tensor()};
    }
    if (first) result.y.transpose_(0, 1);  // not a view: FSDP loses sight of those
  }
  PyObject* const y = THPVariable_Wrap(std::move(result.y));
  PyObject* const h_n = THPVariable_Wrap(std::move(result.h_n));
  if (!module.has_c) return tuple_of(y, h_n);
  return tuple_of(y, tuple_of(h_n, THPVariable_Wrap(std::move(result.c_n))));
}

/// cell(attributes, has_c, input, hx): (h,) or (h, c) after a cell's step, or None.
PyObject* cell(PyObject*, PyObject* const* args, Py_ssize_t count) {
  FUSEDRNN_NAME(weight_ih);
  FUSEDRNN_NAME(weight_hh);
  FUSEDRNN_NAME(bias_ih);
  FUSEDRNN_NAME(bias_hh);
  Arguments module;
  if (!module.read(args, count, 2)) Py_RETURN_NONE;
  if (!module.read_weight(weight_ih) || !module.read_weight(weight_hh)) Py_RETURN_NONE;
  // As torch, what there is: its cells don't ask `bias` either.
  const bool without_bias = module.is_absent(bias_ih) && module.is_absent(bias_hh);
  if (!without_bias && !(module.read_weight(bias_ih) && module.read_weight(bias_hh))) {
    Py_RETURN_NONE;
  }
  if (!module.fits(1, module.input->size(0))) Py_RETURN_NONE;
  Result result;
  {
    const WithoutGil no_gil(*module.input, module.weights);
    const BelowAutograd below(*module.input, module.states, module.weights);
    const auto one_step = [](const OptionalTensor& t) {
      return t ? OptionalTensor(t->unsqueeze(0)) : std::nullopt;
    };
    result = call(module.has_c, module.input->unsqueeze(0),
                  {one_step(module.states.h), one_step(module.states.c)}, module.weights, false);
    result.h_n.squeeze_(0);
    if (module.has_c) result.c_n.squeeze_(0);
  }
  PyObject* const h = THPVariable_Wrap(std::move(result.h_n));
  return module.has_c ? tuple_of(h, THPVariable_Wrap(std::move(result.c_n))) : tuple_of(h);
}

using Function = PyObject*(PyObject*, PyObject* const*, Py_ssize_t);

template <Function function>
PyObject* translated(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  try {
    PyObject* const result = function(self, args, count);
    // Of an attribute that could not be read: the long way finds out, and says so.
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

PyMethodDef methods[] = {method<layers>("layers"), method<cell>("cell"), {}};
PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "fusedrnn._C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace fusedrnn

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&fusedrnn::definition); }
