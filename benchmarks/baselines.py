"""The candidates: fusedrnn and its baselines, behind one interface."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedrnn
from benchmarks import onnx_model
from benchmarks.cases import Case

Call = Callable[[], Any]

# Largest difference from nn's output, absolute and relative: rounding over the longest case.
_TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


class Unsupported(Exception):  # noqa: N818
    """A candidate can't run a case after all; the message gives the reason."""


@dataclasses.dataclass
class Problem:
    """The data shared by all candidates: nn's module with its weights, and the input."""

    module: nn.Module
    x: Any  # Tensor or PackedSequence, as nn.LSTM takes it
    states: tuple[Tensor, ...]  # initial states if T = 1, else empty
    lengths: Tensor  # int64 [B]


def problem(case: Case, device: str = "cpu") -> Problem:
    """The problem for a case; every call gives the same numbers."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    module = case.recurrence.torch(case.I, case.H, **_options(case)).to(device, dtype)
    shape = [case.B, case.I]
    if not case.is_cell:
        shape.insert(1 if case.batch_first else 0, case.T)
    x: Any = torch.randn(shape, dtype=dtype, device=device)
    states: tuple[Tensor, ...] = ()
    if case.T == 1:
        rows = () if case.is_cell else (case.layers * case.directions,)
        states = tuple(
            0.1 * torch.randn(*rows, case.B, case.H, dtype=dtype, device=device)
            for _ in case.recurrence.states
        )
    lengths = torch.tensor(case.lengths)
    if case.layout == "packed":
        x = pack_padded_sequence(x, lengths, case.batch_first)
    return Problem(module, x, states, lengths)


def _options(case: Case) -> dict[str, Any]:
    if case.is_cell:
        return {"step": True}
    options: dict[str, Any] = {"num_layers": case.layers, "bidirectional": case.bidirectional}
    options["batch_first"] = case.batch_first
    return options | ({"proj_size": case.proj_size} if case.proj_size else {})


def _with_mode(module: nn.Module, forward: Call, mode: str) -> Call:
    """Wraps a torch module's forward: without gradients, or with a backward to all weights."""

    def inference() -> Any:
        with torch.no_grad():
            return forward()

    def training() -> Any:
        module.zero_grad()
        y = forward()
        (y.data if isinstance(y, PackedSequence) else y).sum().backward()
        return y

    return inference if mode == "inference" else training


def _forward(module: Any, case: Case, given: Problem) -> Call:
    """Calls nn's module, or a replacement; gives the output without the states."""
    x, lengths = given.x, given.lengths
    args: tuple[Any, ...] = ()
    if given.states:
        args = (given.states if len(given.states) == 2 else given.states[0],)
    if case.layout == "lengths":

        def packing() -> Any:
            packed = pack_padded_sequence(x, lengths, case.batch_first, enforce_sorted=False)
            return pad_packed_sequence(module(packed)[0], case.batch_first, total_length=case.T)[0]

        return packing
    if case.is_cell and len(case.recurrence.states) == 1:
        return lambda: module(x, *args)
    return lambda: module(x, *args)[0]


class Candidate:
    """An implementation under measurement: runs on `device`, is stored under `name`."""

    name: str
    device = "cpu"
    packages: tuple[str, ...] = ()

    def available(self) -> str | None:
        """The reason this machine can't run the candidate; None if it can."""
        for package in self.packages:
            try:
                importlib.import_module(package)
            except ImportError as error:
                return f"{package}: {error}"
        return None

    def versions(self) -> dict[str, str]:
        return {package: _version(package) for package in self.packages}

    def supports(self, case: Case, mode: str) -> bool:
        raise NotImplementedError

    def prepare(self, case: Case, mode: str) -> Call:
        """A call without arguments; gives a Tensor, a PackedSequence or an array.

        Raises:
            Unsupported: the candidate can't run the case.
        """
        raise NotImplementedError

    def prepare_threads(self, case: Case, mode: str, count: int) -> list[Call]:
        """Calls of one model for `count` concurrent threads."""
        return [self.prepare(case, mode)] * count


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


class _Module(Candidate):
    """A torch module on a device; supports every case."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def supports(self, case: Case, mode: str) -> bool:
        return True


class Fused(_Module):
    """fusedrnn's own modules."""

    name = "fusedrnn"

    def prepare(self, case: Case, mode: str) -> Call:
        given = problem(case, self.device)
        module = case.recurrence.fused(case.I, case.H, **_options(case))
        module.to(next(given.module.parameters()))
        module.load_state_dict(given.module.state_dict())
        forward = _forward(module, case, given)
        if case.layout == "lengths":
            forward = lambda: module(given.x, lengths=given.lengths)[0]  # noqa: E731
        return _with_mode(module, forward, mode)


class Frozen(Fused):
    """fusedrnn after freeze(), for inference."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.name = f"frozen {str(dtype).removeprefix('torch.')}"

    def supports(self, case: Case, mode: str) -> bool:
        return mode == "inference" and case.dtype == "float32"

    def prepare(self, case: Case, mode: str) -> Call:
        given = problem(case)
        module = fusedrnn.freeze(given.module, self.dtype)
        if case.layout == "lengths":
            return lambda: module(given.x, lengths=given.lengths)[0]
        return _forward(module, case, given)


class Packing(Fused):
    """fusedrnn without lengths=: the caller packs and unpacks the rows."""

    name = "packing"

    def supports(self, case: Case, mode: str) -> bool:
        return case.layout == "lengths"

    def prepare(self, case: Case, mode: str) -> Call:
        given = problem(case, self.device)
        module = fusedrnn.fuse(given.module)
        return _with_mode(module, _forward(module, case, given), mode)


class Torch(_Module):
    """torch.nn, the reference."""

    name = "torch"

    def prepare(self, case: Case, mode: str) -> Call:
        given = problem(case, self.device)
        return _with_mode(given.module, _forward(given.module, case, given), mode)


class QuantizedTorch(Torch):
    """torch.nn after torch.ao.quantization.quantize_dynamic, in int8."""

    name = "torch int8"

    def available(self) -> str | None:
        return "no engine" if torch.backends.quantized.engine == "none" else None

    def supports(self, case: Case, mode: str) -> bool:
        return mode == "inference" and case.dtype == "float32" and not case.proj_size

    def prepare(self, case: Case, mode: str) -> Call:
        given = problem(case)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated
            quantize: Any = importlib.import_module("torch.ao.quantization").quantize_dynamic
            model = quantize(nn.Sequential(given.module), {type(given.module)}, torch.qint8)
        return _with_mode(model, _forward(model[0], case, given), mode)


class Compiled(Candidate):
    """torch.nn's module under torch.compile, with the default backend."""

    name = "torch.compile"

    def supports(self, case: Case, mode: str) -> bool:
        return case.compiled

    def prepare(self, case: Case, mode: str) -> Call:
        dynamo: Any = importlib.import_module("torch._dynamo")
        inductor: Any = importlib.import_module("torch._inductor.config")
        inductor.compile_threads = 1  # a pool of compilers would disturb the timings
        dynamo.reset()
        given = problem(case, self.device)
        # Without allow_rnn, dynamo does not trace nn.LSTM and nn.GRU.
        with dynamo.config.patch(allow_rnn=True):
            forward = _forward(torch.compile(given.module), case, given)
            call = _with_mode(given.module, forward, mode)
            try:
                call()
            except Exception as error:
                first = str(error).strip().splitlines() or [""]
                raise Unsupported(f"{type(error).__name__}: {first[0]}") from error
        return call


class _Onnx(Candidate):
    """A runtime for ONNX models: inference in float32, without a projection.

    `lengths` becomes the operator's sequence_lens; ONNX has no packed layout.
    """

    def supports(self, case: Case, mode: str) -> bool:
        return (
            mode == "inference"
            and case.dtype == "float32"
            and case.layout != "packed"
            and not case.proj_size
        )

    def _model(self, case: Case) -> tuple[bytes, dict[str, Any]]:
        """The model, and its inputs as arrays."""
        given = problem(case)
        feed = {"x": given.x.numpy()}
        for name, state in zip(case.recurrence.states, given.states, strict=False):
            layers = state.view(case.layers, case.directions, case.B, case.H)
            feed |= {f"{name}_{i}": layers[i].numpy() for i in range(case.layers)}
        if case.layout == "lengths":
            feed["lengths"] = given.lengths.int().numpy()
        return onnx_model.build(given.module, case), feed


class OnnxRuntime(_Onnx):
    """ONNX Runtime's CPU provider. Binding inputs and outputs saves 6 us a call over run()."""

    name = "onnxruntime"
    packages = ("onnx", "onnxruntime")

    def prepare(self, case: Case, mode: str) -> Call:
        return self.prepare_threads(case, mode, 1)[0]

    def prepare_threads(self, case: Case, mode: str, count: int) -> list[Call]:
        ort: Any = importlib.import_module("onnxruntime")
        model, feed = self._model(case)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return [self._bound(ort, session, feed) for _ in range(count)]

    def _bound(self, ort: Any, session: Any, feed: dict[str, Any]) -> Call:
        bound = session.io_binding()
        for name, array in feed.items():
            bound.bind_cpu_input(name, array)
        results = {}
        for output in session.get_outputs():
            results[output.name] = ort.OrtValue.ortvalue_from_shape_and_type(
                output.shape, "float32"
            )
            bound.bind_ortvalue_output(output.name, results[output.name])
        y = results["y"]

        # Keeps the inputs alive: the runtime reads them in place.
        def call(_: object = feed) -> Any:
            session.run_with_iobinding(bound)
            return y

        return call


class QuantizedOnnxRuntime(OnnxRuntime):
    """ONNX Runtime's DynamicQuantizeLSTM, in int8; it has nothing for other cells."""

    name = "onnxruntime int8"

    def supports(self, case: Case, mode: str) -> bool:
        return super().supports(case, mode) and case.recurrence.torch_name == "LSTM"

    def _model(self, case: Case) -> tuple[bytes, dict[str, Any]]:
        model, feed = super()._model(case)
        onnx: Any = importlib.import_module("onnx")
        quantization: Any = importlib.import_module("onnxruntime.quantization")
        logger = logging.getLogger()
        level = logger.level
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            logger.setLevel(logging.ERROR)  # it advises a step that changes nothing here
            try:
                quantization.quantize_dynamic(
                    onnx.load_from_string(model), path, op_types_to_quantize=["LSTM"]
                )
            finally:
                logger.setLevel(level)
            return path.read_bytes(), feed


class OpenVino(_Onnx):
    """OpenVINO's CPU plugin in float32, tuned for latency."""

    name = "openvino"
    packages = ("onnx", "openvino")

    def prepare(self, case: Case, mode: str) -> Call:
        ov: Any = importlib.import_module("openvino")
        model, feed = self._model(case)
        core = ov.Core()
        compiled = core.compile_model(
            core.read_model(model),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": "f32",
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                # Pinning would confine the calling thread, and so torch, to one core.
                "ENABLE_CPU_PINNING": False,
            },
        )
        request = compiled.create_infer_request()
        for name, array in feed.items():
            request.set_tensor(name, ov.Tensor(array, shared_memory=True))
        y = request.get_tensor("y")

        # Keeps the inputs alive, as above.
        def call(_: object = feed) -> Any:
            request.infer()
            return y.data

        return call


class CuDnn(Torch):
    """torch.nn on a CUDA device: cuDNN."""

    name = "cudnn"

    def __init__(self) -> None:
        super().__init__("cuda")

    def available(self) -> str | None:
        return None if torch.cuda.is_available() else "torch finds no CUDA device"

    def versions(self) -> dict[str, str]:
        cudnn: Any = torch.backends.cudnn
        return {"cudnn": str(cudnn.version())}


BASELINES: tuple[Candidate, ...] = (
    Torch(),
    Compiled(),
    OnnxRuntime(),
    OpenVino(),
    CuDnn(),
    Packing(),
)


def values(output: Any) -> Tensor:
    """An output as float64 on the CPU: [T, B, D*P], or [sum of lengths, D*P] if packed."""
    if isinstance(output, PackedSequence):
        output = output.data
    if not isinstance(output, Tensor):
        output = torch.from_numpy(output.numpy() if hasattr(output, "numpy") else output.copy())
    assert isinstance(output, Tensor)
    return output.detach().cpu().double()


def check(name: str, case: Case, device: str, output: Any, expected: Any) -> None:
    """Compares a candidate's output with nn's.

    Raises:
        AssertionError: the difference exceeds rounding.
    """
    # cuDNN computes float32 in TF32.
    tolerance = 5e-3 if (device, case.dtype) == ("cuda", "float32") else _TOLERANCE[case.dtype]
    torch.testing.assert_close(
        values(output),
        values(expected),
        atol=tolerance,
        rtol=tolerance,
        msg=lambda text: f"{name} is wrong in {case.name}: {text}",
    )
