"""nn.LSTM, nn.GRU and their cells as ONNX models, from the weights; no exporter.

Operators: https://onnx.ai/onnx/operators/onnx__LSTM.html and onnx__GRU.html.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case

# nn.LSTM's gates are i f g o, ONNX's i o f c; nn.GRU's are r z n, ONNX's z r h.
_GATES = {4: (0, 3, 1, 2), 3: (1, 0, 2)}


def _parameters(module: nn.Module, case: Case, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """W [D, G*H, I], R [D, G*H, H] and the two biases, concatenated [D, 2*G*H], of one layer."""

    def stack(name: str) -> Tensor:
        found = []
        for direction in range(case.directions):
            suffix = "" if case.is_cell else f"_l{layer}" + ("_reverse" if direction else "")
            gates = getattr(module, name + suffix).detach().chunk(case.gates)
            found.append(torch.cat([gates[k] for k in _GATES[case.gates]]))
        return torch.stack(found)

    biases = torch.cat([stack("bias_ih"), stack("bias_hh")], dim=1)
    return stack("weight_ih"), stack("weight_hh"), biases


def build(module: nn.Module, case: Case) -> bytes:
    """A model of static shapes.

    Inputs: x as nn.LSTM takes it ([B, I] for cells); lengths int32 [B] if the case has them; for
    one step h_0, h_1, ... and c_0, ..., of each layer, [D, B, H].
    Outputs: y as nn.LSTM gives it (h of cells); h_n_0, ..., c_n_0, ... of each layer [D, B, H].
    """
    onnx: Any = importlib.import_module("onnx")
    helper = onnx.helper
    T, B, H, D = case.T, case.B, case.H, case.directions
    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(name: str, value: Tensor) -> str:
        constants.append(onnx.numpy_helper.from_array(value.contiguous().numpy(), name))
        return name

    def node(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, outputs, **attributes))
        return outputs[0]

    def value(name: str, *shape: int, integer: bool = False) -> Any:
        kind = onnx.TensorProto.INT32 if integer else onnx.TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, shape)

    op = case.cell.removesuffix("Cell")
    kinds = ("h", "c") if op == "LSTM" else ("h",)
    input_shape = (B, case.I) if case.is_cell else (T, B, case.I)
    output_shape = (B, H) if case.is_cell else (T, B, D * H)
    if case.batch_first:
        input_shape, output_shape = (B, T, case.I), (B, T, D * H)
    inputs, outputs = [value("x", *input_shape)], [value("y", *output_shape)]
    lengths = ""
    if case.layout == "lengths":
        lengths = "lengths"
        inputs.append(value(lengths, B, integer=True))

    x = "x"
    if case.is_cell:
        x = node("Unsqueeze", [x, constant("first", torch.tensor([0]))], ["steps"])
    elif case.batch_first:
        x = node("Transpose", [x], ["steps"], perm=[1, 0, 2])
    for layer in range(case.layers):
        weights = [
            constant(f"{name}_{layer}", tensor)
            for name, tensor in zip("WRB", _parameters(module, case, layer), strict=True)
        ]
        before = [f"{kind}_{layer}" for kind in kinds] if T == 1 else []
        after = [f"{kind}_n_{layer}" for kind in kinds]
        inputs += [value(name, D, B, H) for name in before]
        outputs += [value(name, D, B, H) for name in after]
        node(
            op,
            [x, *weights, lengths, *before],
            [f"y_{layer}", *after],
            hidden_size=H,
            direction="bidirectional" if D == 2 else "forward",
            **({"linear_before_reset": 1} if op == "GRU" else {}),
        )
        # [T, D, B, H] -> [T, B, D * H]
        x = f"output_{layer}"
        if D == 1:
            node("Squeeze", [f"y_{layer}", constant(f"axis_{layer}", torch.tensor([1]))], [x])
        else:
            node("Transpose", [f"y_{layer}"], [f"joined_{layer}"], perm=[0, 2, 1, 3])
            shape = constant(f"shape_{layer}", torch.tensor([T, B, D * H]))
            node("Reshape", [f"joined_{layer}", shape], [x])
    if case.is_cell:
        node("Squeeze", [x, "first"], ["y"])
    elif case.batch_first:
        node("Transpose", [x], ["y"], perm=[1, 0, 2])
    else:
        node("Identity", [x], ["y"])
    graph = helper.make_graph(nodes, case.name, inputs, outputs, constants)
    # Old enough for any runtime of the last years, new enough for Squeeze with axes as an input.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    serialized: bytes = model.SerializeToString()
    return serialized
