// The extension as a Python module: a short way from the modules to the ops.
//
// A call of torch.ops turns its arguments into a schema's and back; for one step of a small layer
// that costs more than the layer. `layers` and `cell` take what a module holds and call the ops
// through the dispatcher. They know the plain case only and return None for any other, or where
// anything is wrong: fusedrnn/modules.py then takes the long way, which says what is.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/cat.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "ops.h"

namespace fusedrnn {
namespace {

#define FUSEDRNN_NAME(name) static PyObject* const name = PyUnicode_InternFromString(#name)

const Tensor* plain_tensor(PyObject* object) {
  return object && THPVariable_CheckExact(object) ? &THPVariable_Unpack(object) : nullptr;
}

/// Whether input's device has kernels, and nothing is active that the ops have no rule for, or that
/// wants to see calls of torch.
bool is_plain(const Tensor& input, bool has_c) {
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  const auto key = c10::legacyExtractDispatchKey(input.key_set());
  const c10::OperatorHandle& op =
      has_c ? static_cast<const c10::OperatorHandle&>(lstm_op()) : gru_op();
  return op.hasKernelForDispatchKey(key) &&
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

  bool has_c = false;
  const Tensor* input = nullptr;
  States states;
  Tensors weights;

 private:
  PyObject *attributes_ = nullptr, *parameters_ = nullptr;
};

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
  FUSEDRNN_NAME(bidirectional);
  FUSEDRNN_NAME(batch_first);
  FUSEDRNN_NAME(dropout);
  FUSEDRNN_NAME(training);
  Arguments module;
  if (!module.read(args, count, 3)) Py_RETURN_NONE;
  PyObject* const names = module[_flat_weights_names];
  PyObject* const layer_count = module[num_layers];
  if (!names || !PyList_CheckExact(names) || !layer_count || !PyLong_CheckExact(layer_count)) {
    Py_RETURN_NONE;
  }
  const int64_t L = PyLong_AsLongLong(layer_count), total = PyList_GET_SIZE(names);
  if (L < 1 || total % L != 0 || total < 2 * L) Py_RETURN_NONE;
  if (L > 1 && module[training] != Py_False) {
    PyObject* const p = module[dropout];
    if (!p || !PyFloat_CheckExact(p) || PyFloat_AS_DOUBLE(p) != 0) Py_RETURN_NONE;
  }
  for (int64_t i = 0; i < total; ++i) {
    if (!module.read_weight(PyList_GET_ITEM(names, i))) Py_RETURN_NONE;
  }
  const bool both = module[bidirectional] == Py_True, first = module[batch_first] == Py_True;
  const int64_t D = both ? 2 : 1;

  Result result;
  {
    const WithoutGil no_gil(*module.input, module.weights);
    const BelowAutograd below(*module.input, module.states, module.weights);
    Tensor x = first ? module.input->transpose(0, 1) : *module.input;
    if (L == 1) {
      result = call(module.has_c, x, module.states, module.weights, both);
    } else {
      for (const OptionalTensor& s : {std::cref(module.states.h), std::cref(module.states.c)}) {
        if (s && s->size(0) != L * D) throw std::invalid_argument("hx");
      }
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
  const auto wrap = [](Tensor& t) { return THPVariable_Wrap(std::move(t)); };
  PyObject* final = wrap(result.h_n);
  if (module.has_c) final = Py_BuildValue("(NN)", final, wrap(result.c_n));
  return Py_BuildValue("(NN)", wrap(result.y), final);
}

/// cell(attributes, has_c, input, hx): (h,) or (h, c) after a cell's step, or None.
PyObject* cell(PyObject*, PyObject* const* args, Py_ssize_t count) {
  FUSEDRNN_NAME(bias);
  FUSEDRNN_NAME(weight_ih);
  FUSEDRNN_NAME(weight_hh);
  FUSEDRNN_NAME(bias_ih);
  FUSEDRNN_NAME(bias_hh);
  Arguments module;
  if (!module.read(args, count, 2)) Py_RETURN_NONE;
  PyObject* const names[] = {weight_ih, weight_hh, bias_ih, bias_hh};
  for (int i = 0; i < (module[bias] == Py_True ? 4 : 2); ++i) {
    if (!module.read_weight(names[i])) Py_RETURN_NONE;
  }
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
  return module.has_c ? Py_BuildValue("(NN)", h, THPVariable_Wrap(std::move(result.c_n)))
                      : Py_BuildValue("(N)", h);
}

using Function = PyObject*(PyObject*, PyObject* const*, Py_ssize_t);

template <Function function>
PyObject* or_none(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  try {
    return function(self, args, count);
  } catch (const c10::OutOfMemoryError& error) {  // not to be tried again
    PyObject* const torch = PyImport_ImportModule("torch");
    PyObject* const type = torch ? PyObject_GetAttrString(torch, "OutOfMemoryError") : nullptr;
    if (type) PyErr_SetString(type, error.what_without_backtrace());
    Py_XDECREF(type);
    Py_XDECREF(torch);
    return nullptr;
  } catch (...) {  // the long way finds out, and says so
    PyErr_Clear();
    Py_RETURN_NONE;
  }
}

template <Function function>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(or_none<function>)),
          METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {method<layers>("layers"), method<cell>("cell"), {}};
PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "fusedrnn._C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace fusedrnn

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&fusedrnn::definition); }
