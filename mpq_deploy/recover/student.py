"""The quantized model in torch: the exported graph with the inputs of its layers replaced.

In float32 the student computes what ONNX Runtime computes on the written graph
(``model.fp32.onnx``), up to rounding. The teacher (the float model) is the same graph with the
original inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from mpq_deploy.calibrate.stats import CalibrationStats
from mpq_deploy.formats.interfaces import ActivationGrid
from mpq_deploy.graph.fp16_region import fp16_region, split_initializers
from mpq_deploy.graph.layers import Layer, layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.graph.writers.prescale import NORM_AXES, factor_constants
from mpq_deploy.graph.writers.quantize_layers import LayerRewrite, folded_activations
from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.onnx_torch.torch_graph import TorchGraph
from mpq_deploy.recipe import RecoverSettings
from mpq_deploy.recover.torch_quantizers import ActivationScale, halved
from mpq_deploy.recover.trained_weights import LayerWeight, StartingWeight, layer_weight

Tensor = Any  # torch.Tensor; torch is not followed by mypy here
# Constants of these nodes are biases and affines of norms. They are stored in FP16 anyway, so
# learning them costs no byte.
AFFINE = ("Add", "Mul", *NORM_AXES)
KINDS = ("adapters", "weight_scales", "activation_scales", "constants", "factors")


class Student(torch.nn.Module):  # type: ignore[misc]
    """A plan's model whose codes, scales and FP16 constants are functions of parameters.

    Reads these of ``options``: ``rank`` and ``seed`` of the adapters, ``margin`` of the latent
    weights (see ``Grid``), ``segments``: parts of the graph, recomputed in the backward pass.
    """

    def __init__(
        self,
        exported: Path,
        spec: DenoiserSpec,
        starts: Sequence[StartingWeight],
        stats: CalibrationStats,
        options: RecoverSettings,
    ) -> None:
        super().__init__()
        model = load_model(exported)
        self.layers = {start.layer.name: start.layer for start in starts}
        self._folds = _folds(model, starts)
        self._folded_tensors = set(folded_activations(model, list(starts)))
        halves = split_initializers(model, fp16_region(model, spec.timestep_name, spec.sample.name))
        self.graph = TorchGraph(model)
        self.output, self._timestep = spec.output, spec.timestep_name
        self.feature, self.feature_axis = last_features(model)
        self.segments, self.training_type = options.segments, torch.float32
        weights = [
            layer_weight(
                start, options.rank, options.margin, np.random.default_rng((options.seed, number))
            )
            for number, start in enumerate(starts)
        ]
        self.weights = torch.nn.ModuleList(weights)
        self._scale_keys: list[str] = []
        self.scales = torch.nn.ModuleList(self._activation_scales(starts, stats))
        self._uses = self._layer_uses(starts)
        self._inputs = {use.node: use.input for start in starts for use in start.layer.uses}
        own = {layer.weight for layer in self.layers.values()}
        stored = {value.name or "": value for value in halves if value.name not in own}
        self._constant_names = sorted(name for name, value in stored.items() if self._learns(value))
        self.constants = torch.nn.ParameterList(
            [
                torch.nn.Parameter(self.graph.constants[name].clone())
                for name in self._constant_names
            ]
        )
        fixed = [
            name
            for name in stored
            if name not in self._constant_names and name in self.graph.constants
        ]
        self._fixed = {name: self._stored(name, self.graph.constants[name]) for name in fixed}
        self._to_device()

    def _to_device(self) -> None:
        """Move parameters, folds, fixed constants and factors to the graph's device."""
        device = self.graph.device
        self.to(device)
        self._folds = {name: fold.to(device) for name, fold in self._folds.items()}
        self._fixed = {
            name: value if name in self.graph.read_on_host else value.to(device)
            for name, value in self._fixed.items()
        }
        self._factors = {
            number: _channels(weight.factors, weight.layer).to(device)
            for number, weight in enumerate(self.layer_weights)
            if weight.factors is not None
        }

    def _activation_scales(
        self, starts: Sequence[StartingWeight], stats: CalibrationStats
    ) -> list[ActivationScale]:
        made = []
        for start in starts:
            if start.matrix is None or start.scheme.activation is None:
                continue
            form = start.scheme.activation_form
            for tensor in start.layer.inputs:
                if tensor + form not in self._scale_keys:
                    known = stats.activations[tensor]
                    self._scale_keys.append(tensor + form)
                    made.append(
                        ActivationScale(
                            start.scheme.input_grid(known),
                            start.scheme.branch.left_out(known),
                            start.scheme.range,
                            start.layer.op == "Conv",
                        )
                    )
        return made

    def _layer_uses(self, starts: Sequence[StartingWeight]) -> dict[str, tuple[int, str | None]]:
        """Return node name -> (number of its layer, key of its activation scale or None)."""
        uses = {}
        for number, start in enumerate(starts):
            rounds = start.matrix is not None and start.scheme.activation is not None
            for use in start.layer.uses:
                uses[use.node] = (
                    number,
                    use.input + start.scheme.activation_form if rounds else None,
                )
        return uses

    def _learns(self, value: ir.Value) -> bool:
        """Whether a constant is learned: a bias or affine of two or more values, all finite."""
        tensor = self.graph.constants.get(value.name or "")
        if tensor is None or tensor.numel() < 2 or not bool(torch.isfinite(halved(tensor)).all()):
            return False
        slots = [
            (node.op_type, node.name in self._uses and index == 2, index)
            for node, index in value.uses()
        ]
        return all(
            bias or (op in AFFINE and (index > 0 or op in ("Add", "Mul")))
            for op, bias, index in slots
        )

    def feed(self, arrays: Mapping[str, Array]) -> dict[str, Tensor]:
        """Turn NumPy inputs into tensors on the model's device."""
        return self.graph.feed(arrays)

    def place(self, array: Array) -> Tensor:
        """Turn an array into a tensor on the model's device."""
        return torch.from_numpy(array).to(self.device)

    @property
    def device(self) -> torch.device:
        """The device of the graph and the parameters."""
        return torch.device(self.graph.device)

    def run(self, feeds: Mapping[str, Tensor], keep: Collection[str] = ()) -> dict[str, Tensor]:
        """Evaluate the quantized model; return the output and the values named in ``keep``.

        With gradients enabled it is evaluated in ``training_type`` and in ``segments``; otherwise
        in float32 and in one piece.
        """
        learning = torch.is_grad_enabled()
        made, timesteps = [weight() for weight in self.weights], self.timesteps(feeds)
        rewire = {
            node: partial(self.rewired, node, made[number], timesteps=timesteps)
            for node, (number, _) in self._uses.items()
        }
        known = {
            **self._fixed,
            **{n: self._stored(n, c) for n, c in zip(self._constant_names, self.constants)},
        }
        half = learning and self.training_type != torch.float32
        with torch.autocast(self.device.type, self.training_type) if half else nullcontext():
            values = self.graph.run(
                feeds,
                keep=keep,
                rewire=rewire,
                known=known,
                segments=self.segments if learning else 1,
            )
        return {name: value.float() for name, value in values.items()}

    def teach(self, feeds: Mapping[str, Tensor], keep: Collection[str] = ()) -> dict[str, Tensor]:
        """Evaluate the float model without gradients; return as ``run`` does."""
        with torch.no_grad():
            return self.graph.run(feeds, keep=keep)

    def observe(
        self, feeds: Mapping[str, Tensor], see: Callable[[int, str, list[Any]], None]
    ) -> None:
        """Evaluate the float model and call ``see`` with each layer's number, node and inputs."""

        def seen(number: int, node: str, inputs: list[Any]) -> list[Any]:
            see(number, node, inputs)
            return inputs

        with torch.no_grad():
            self.graph.run(
                feeds,
                rewire={
                    node: partial(seen, number, node) for node, (number, _) in self._uses.items()
                },
            )

    def _stored(self, name: str, constant: Tensor) -> Tensor:
        """Return a constant as in the written graph: times its folded factors, rounded to FP16."""
        fold = self._folds.get(name)
        return halved(constant if fold is None else constant * fold)

    def timesteps(self, feeds: Mapping[str, Tensor]) -> Tensor | None:
        """Return the timestep input, float [N] or [1]; None for a model without one."""
        return feeds[self._timestep].float().reshape(-1) if self._timestep else None

    def rewired(
        self,
        node: str,
        weight: Tensor,
        inputs: list[Any],
        of_float: bool = False,
        timesteps: Tensor | None = None,
    ) -> list[Any]:
        """Return the inputs of a layer's ``node`` in the quantized model: rounded x, ``weight``.

        ``timesteps``: from the method of that name. ``of_float``: ``inputs`` are those of the float
        model, in which no norm has channel factors folded in.
        """
        number, key = self._uses[node]
        x = inputs[0]
        layer_weight = self.layer_weights[number]
        factors = self._factors.get(number)
        if factors is not None and (of_float or self._inputs[node] not in self._folded_tensors):
            x = x * factors
        if key is not None:
            scale = self.scales[self._scale_keys.index(key)]
            assert isinstance(scale, ActivationScale)
            axis = 1 if layer_weight.layer.op == "Conv" else -1
            x = scale.quantize(x, axis, timesteps)
        return [x, weight, *inputs[2:]]

    def kinds(self) -> dict[str, list[tuple[torch.nn.Parameter, float]]]:
        """Return every parameter by kind, with the unit of its learning rate.

        The unit is the layer's mean weight step for adapters, 1 for logarithms of scales, and the
        rms of the values for constants and factors.
        """
        kinds: dict[str, list[tuple[torch.nn.Parameter, float]]] = {kind: [] for kind in KINDS}
        for weight in self.layer_weights:
            for name, parameter in weight.named_parameters():
                if name.startswith("adapter."):
                    kinds["adapters"].append((parameter, weight.step))
                elif name.endswith("log_ratio"):
                    kinds["weight_scales"].append((parameter, 1.0))
                else:
                    kinds["factors"].append((parameter, _rms(parameter)))
        kinds["activation_scales"] = [(p, 1.0) for p in self.scales.parameters()]
        kinds["constants"] = [(p, _rms(p)) for p in self.constants]
        return kinds

    @property
    def layer_weights(self) -> list[LayerWeight]:
        """The layers' weights, in graph order."""
        return [weight for weight in self.weights if isinstance(weight, LayerWeight)]

    def rewrites(self, starts: Sequence[StartingWeight]) -> list[LayerRewrite]:
        """Return every layer's scheme with its trained codes and scales, to write."""
        return [
            LayerRewrite(start.layer, start.scheme, weight.deployed())
            for start, weight in zip(starts, self.layer_weights, strict=True)
        ]

    def activation_scales(self) -> dict[str, ActivationGrid]:
        """Return the activation quantizers to write, by tensor name + activation form."""
        modules = [scale for scale in self.scales if isinstance(scale, ActivationScale)]
        return {key: scale.grid() for key, scale in zip(self._scale_keys, modules, strict=True)}

    def learned_constants(self) -> dict[str, Array]:
        """Return the learned constants of the exported graph (biases, FP16 weights), float32."""
        # Constants with folded factors are rounded to FP16 after the writer multiplies them.
        constants = {
            name: (constant if name in self._folds else halved(constant)).detach().cpu().numpy()
            for name, constant in zip(self._constant_names, self.constants)
        }
        for weight in self.layer_weights:
            constants.update(weight.constants())
        return constants


def _folds(model: ir.Model, starts: Sequence[StartingWeight]) -> dict[str, Tensor]:
    """Return constant of a norm -> channel factors folded into it, shaped to broadcast."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    folds = {}
    for tensor, rewrite in folded_activations(model, list(starts)).items():
        assert rewrite.factors is not None
        factors = rewrite.factors.astype(np.float32)
        for constant, axis in factor_constants(values[tensor], rewrite.layer):
            assert constant.const_value is not None
            shape = [1] * len(constant.const_value.shape.numpy())
            shape[axis] = len(factors)
            folds[constant.name or ""] = torch.from_numpy(factors.reshape(shape))
    return folds


def _channels(factors: Array, layer: Layer) -> Tensor:
    """Return ``factors`` [C] shaped to multiply the channels of the input of ``layer``."""
    return torch.from_numpy(factors.astype(np.float32).reshape(-1, *(1,) * len(layer.kernel)))


def last_features(model: ir.Model) -> tuple[str, int]:
    """Return the tensor whose pixels the relation losses use, and its channel axis (our choice).

    It is the input of the last Conv, or without a Conv that of the last layer (channels last).
    """
    inputs = [
        node.inputs[0].name
        for node in model.graph
        if node.op_type == "Conv" and node.inputs[0] is not None
    ]
    if inputs:
        return inputs[-1] or "", 1
    return layer_graph(model).layers[-1].uses[-1].input, -1


def _rms(parameter: torch.nn.Parameter) -> float:
    return float(parameter.detach().square().mean().sqrt().cpu()) or 1.0
