"""Builds ONNX models from the weights of nn's recurrent modules, without an exporter.

Operators: https://onnx.ai/onnx/operators/onnx__LSTM.html and onnx__GRU.html.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case


def _parameters(module: nn.Module, case: Case, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """One layer's W [D, G*H, I], R [D, G*H, H] and both biases, concatenated [D, 2*G*H]."""

    def stack(name: str) -> Tensor:
        found = []
        for direction in range(case.directions):
            suffix = "" if case.is_cell else f"_l{layer}" + ("_reverse" if direction else "")
            gates = getattr(module, name + suffix).detach().chunk(case.gates)
            found.append(torch.cat([gates[k] for k in case.recurrence.onnx_gates]))
        return torch.stack(found)

    biases = torch.cat([stack("bias_ih"), stack("bias_hh")], dim=1)
    return stack("weight_ih"), stack("weight_hh"), biases


class _Graph:
    """Collects the nodes, constants, inputs and outputs of a model."""

    def __init__(self) -> None:
        self.onnx: Any = importlib.import_module("onnx")
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []

    def constant(self, name: str, value: Tensor) -> str:
        array = value.contiguous().numpy()
        self.constants.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def node(self, op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        self.nodes.append(self.onnx.helper.make_node(op, inputs, outputs, **attributes))
        return outputs[0]

    def value(self, name: str, *shape: int, integer: bool = False) -> Any:
        kind = self.onnx.TensorProto.INT32 if integer else self.onnx.TensorProto.FLOAT
        return self.onnx.helper.make_tensor_value_info(name, kind, shape)

    def serialize(self, name: str) -> bytes:
        helper = self.onnx.helper
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.constants)
        # Opset 17 runs on any recent runtime; its Squeeze takes the axes as an input.
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        serialized: bytes = model.SerializeToString()
        return serialized


def build(module: nn.Module, case: Case) -> bytes:
    """Builds a model with static shapes.

    Inputs: x as nn's module takes it ([B, I] for single steps); lengths int32 [B] if the case has
    them; with T = 1 each layer's states h_0, h_1, ... and c_0, ..., [D, B, H].
    Outputs: y as nn's module gives it (h for single steps); each layer's states h_n_0, ... and
    c_n_0, ..., [D, B, H].
    """
    T, B, H, D = case.T, case.B, case.H, case.directions
    input_shape = (B, case.I) if case.is_cell else (T, B, case.I)
    output_shape = (B, H) if case.is_cell else (T, B, D * H)
    if case.batch_first:
        input_shape, output_shape = (B, T, case.I), (B, T, D * H)
    graph = _Graph()
    graph.inputs.append(graph.value("x", *input_shape))
    graph.outputs.append(graph.value("y", *output_shape))
    if case.layout == "lengths":
        graph.inputs.append(graph.value("lengths", B, integer=True))
    x = "x"
    if case.is_cell:
        x = graph.node("Unsqueeze", [x, graph.constant("first", torch.tensor([0]))], ["steps"])
    elif case.batch_first:
        x = graph.node("Transpose", [x], ["steps"], perm=[1, 0, 2])
    for layer in range(case.layers):
        x = _add_layer(graph, module, case, layer, x)
    if case.is_cell:
        graph.node("Squeeze", [x, "first"], ["y"])
    elif case.batch_first:
        graph.node("Transpose", [x], ["y"], perm=[1, 0, 2])
    else:
        graph.node("Identity", [x], ["y"])
    return graph.serialize(case.name)


def _add_layer(graph: _Graph, module: nn.Module, case: Case, layer: int, x: str) -> str:
    """Adds a layer that reads x [T, B, I]; gives the name of its output [T, B, D * H]."""
    T, B, H, D = case.T, case.B, case.H, case.directions
    weights = [
        graph.constant(f"{name}_{layer}", tensor)
        for name, tensor in zip("WRB", _parameters(module, case, layer), strict=True)
    ]
    states = case.recurrence.states
    before = [f"{state}_{layer}" for state in states] if T == 1 else []
    after = [f"{state}_n_{layer}" for state in states]
    graph.inputs += [graph.value(name, D, B, H) for name in before]
    graph.outputs += [graph.value(name, D, B, H) for name in after]
    graph.node(
        case.recurrence.torch_name,
        [x, *weights, "lengths" if case.layout == "lengths" else "", *before],
        [f"y_{layer}", *after],
        hidden_size=H,
        direction="bidirectional" if D == 2 else "forward",
        **case.recurrence.onnx_attributes(D),
    )
    # [T, D, B, H] -> [T, B, D * H]
    y = f"output_{layer}"
    if D == 1:
        axis = graph.constant(f"axis_{layer}", torch.tensor([1]))
        graph.node("Squeeze", [f"y_{layer}", axis], [y])
    else:
        graph.node("Transpose", [f"y_{layer}"], [f"joined_{layer}"], perm=[0, 2, 1, 3])
        shape = graph.constant(f"shape_{layer}", torch.tensor([T, B, D * H]))
        graph.node("Reshape", [f"joined_{layer}", shape], [y])
    return y
