"""A PyTorch module as an ONNX graph: parameters keep their names, nodes get their modules' names.

The exporter stores bias-free Linear weights transposed and norms reshaped, under names such as
``val_215``. Here its graph is taken before its optimizer ran, the shape operators are folded into
the weights under the parameters' own names (``graph.passes.fold_constants``), and only then it is
optimized.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch

from mpq_deploy.errors import ModelError
from mpq_deploy.graph.load import normalise
from mpq_deploy.graph.passes.boolean_where import BooleanWherePass
from mpq_deploy.graph.passes.drop_squeezes import DropSqueezesPass
from mpq_deploy.graph.passes.fold_constants import FoldConstantsPass
from mpq_deploy.graph.passes.hide_near_neutral import HideNearNeutralPass
from mpq_deploy.graph.passes.name_nodes import NameNodesPass
from mpq_deploy.models.spec import EACH_SIZE, Array, InputSpec
from mpq_deploy.models.transformer import forward_of_sizes
from mpq_deploy.system.libraries import gist, silenced
from mpq_deploy.system.progress import Talk

# The last opset with GroupNorm written as InstanceNormalization, which all TensorRT versions run.
EXPORT_OPSET = 20
# Batch of the traced example: 0 and 1 would be taken for constants.
EXAMPLE_BATCH = 2
TOLERANCE = 1e-3
# Parameters that may stay in memory until Python looks for cycles by itself (our choice).
FEW_BYTES = 64 << 20
SCOPES = "pkg.torch.onnx.name_scopes"
PREFIX = "network."
# What the exporter writes for nodes outside any module.
OUTSIDE = "_empty_nn_module_stack_from_metadata_hook"

ELSEWHERE = "Export it to ONNX by other means and give the ONNX file with a YAML."
# What torch.export says where tracing made the batch axis a number.
FIXED_AXIS = "tracing inferred a static shape"

Forward = Callable[..., torch.Tensor]


class TorchNetwork:
    """A PyTorch module with plain tensors in and one tensor out.

    ``call`` gets the module and the inputs in their order (batch first), and returns the output, or
    a tuple with ``more_outputs`` behind it.
    """

    tolerance = TOLERANCE

    def __init__(
        self,
        module: torch.nn.Module,
        inputs: Sequence[InputSpec],
        output: str,
        call: Forward,
        more_outputs: Sequence[str] = (),
    ) -> None:
        self.module = module.eval()
        self.inputs, self.output, self._call = tuple(inputs), output, call
        self.more_outputs = tuple(more_outputs)

    def taking(self, inputs: Sequence[InputSpec]) -> TorchNetwork:
        """Return the network with other shapes of its inputs."""
        return TorchNetwork(self.module, inputs, self.output, self._call, self.more_outputs)

    def to_onnx(self, talk: Talk) -> ir.Model:
        """Export with ``torch.onnx.export`` (dynamo), name everything, raise the declared opset."""
        check_parameters(self.module)
        talk.line(f"  exporting {type(self.module).__name__} to ONNX")
        model = self._exported()
        common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        strip_prefix(model)
        DropSqueezesPass()(model)
        FoldConstantsPass()(model)
        model = optimized(model)
        FoldConstantsPass()(model)
        merge_constants(model, set(self.module.state_dict()))
        BooleanWherePass()(model)
        name_parameters(model, self.module)
        name_after_modules(model)
        return normalise(model)

    def reference(self, feeds: dict[str, Array]) -> Array:
        """Return the module's output for arrays by input name."""
        tensors = [torch.from_numpy(np.ascontiguousarray(feeds[item.name])) for item in self.inputs]
        with torch.no_grad():
            made = self._call(self.module, *tensors)
        return np.asarray((made[0] if self.more_outputs else made).numpy(), np.float32)

    def release(self) -> None:
        """Take the parameters out of memory; the module keeps their shapes."""
        held = sum(one.numel() * one.element_size() for one in self.module.parameters())
        self.module.to("meta")
        # The exporter leaves cycles behind that hold them. Looking for those takes a second.
        if held > FEW_BYTES:
            gc.collect()

    def _exported(self) -> ir.Model:
        example = tuple(self._example(item) for item in self.inputs)
        opened = [(0, *(1 + axis for axis in item.open_axes)) for item in self.inputs]
        axes = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in opened)
        wrapper = _Wrapper(self.module, self._call).eval()
        try:
            with silenced(), torch.no_grad(), self._of_sizes():
                program = torch.onnx.export(
                    wrapper,
                    example,
                    dynamo=True,
                    opset_version=EXPORT_OPSET,
                    dynamic_shapes=(axes,),
                    input_names=[item.name for item in self.inputs],
                    output_names=[self.output, *self.more_outputs],
                    optimize=False,
                    verbose=False,
                )
        except torch.onnx.OnnxExporterError as error:
            self._refuse_unrun(example)
            if shapes := [list(one) for item in self.inputs for one in item.sizes]:
                raise ModelError(
                    f"PyTorch can export {type(self.module).__name__} for one size alone, not for samples of "
                    f"{', '.join(map(str, shapes))}: {gist(error.__cause__ or error)}",
                    EACH_SIZE,
                ) from error
            if FIXED_AXIS in str(error.__cause__ or error):
                raise ModelError(
                    f"{type(self.module).__name__} computes with the number of samples as a Python number, so that "
                    "PyTorch can export it for one number of samples alone.",
                    ELSEWHERE,
                ) from error
            raise ModelError(
                f"PyTorch cannot export {type(self.module).__name__} to ONNX: {gist(error)}",
                ELSEWHERE,
            ) from error
        return program.model  # type: ignore[no-any-return]

    def _refuse_unrun(self, example: Sequence[torch.Tensor]) -> None:
        """Raise ModelError where PyTorch itself cannot run the module on the inputs."""
        try:
            with torch.no_grad():
                self._call(self.module, *example)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            sample = [*self.inputs[0].shape]
            raise ModelError(
                f"{type(self.module).__name__} cannot be run in PyTorch on samples of {sample}: {gist(error)}",
                "Give all that it is called with (--conditions FILE.npz), or correct its config.json: sample_size must "
                "be one that it takes (a UNet that halves it n times: a multiple of 2 to the n).",
            ) from error

    @contextmanager
    def _of_sizes(self) -> Iterator[None]:
        """Give the module the forward that takes all sizes, where there are several."""
        sized = any(item.open_axes for item in self.inputs)
        if sized:
            self.module.forward = forward_of_sizes(self.module)
        try:
            yield
        finally:
            vars(self.module).pop("forward", None)

    def _example(self, item: InputSpec) -> torch.Tensor:
        shape = (EXAMPLE_BATCH, *item.shape)
        dtype = getattr(torch, item.dtype)
        if dtype.is_floating_point:
            return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        return torch.zeros(shape, dtype=dtype)


class _Wrapper(torch.nn.Module):  # type: ignore[misc]
    """Gives the module a signature of plain tensors."""

    def __init__(self, network: torch.nn.Module, call: Forward) -> None:
        super().__init__()
        self.network = network
        self._call = call

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Call the module."""
        for values in inputs[1:]:
            # One batch for all: the exporter would take each input's own axis for another size.
            torch._check(values.shape[0] == inputs[0].shape[0])
        return self._call(self.network, *inputs)


def check_parameters(module: torch.nn.Module) -> None:
    """Raise ModelError naming the first parameter or buffer that holds NaN or Inf."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            wrong = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"The weight '{name}' holds {wrong:,} values that are NaN or infinite.",
                "The file is damaged, or the model diverged in training: use another checkpoint.",
            )


def strip_prefix(model: ir.Model) -> None:
    """Give the initializers the names of the module's own parameters."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if name.startswith(PREFIX):
            value.name = name.removeprefix(PREFIX)


def optimized(model: ir.Model) -> ir.Model:
    """Return ``model`` after the exporter's optimizer, without redundant shapes and casts."""
    from mpq_deploy.models.export_rewrites import optimize

    HideNearNeutralPass()(model)
    with silenced():
        optimize(model)
    return model


def merge_constants(model: ir.Model, parameters: Collection[str]) -> None:
    """Store equal constants that the exporter computed once: rotary tables, one per attention.

    ``parameters`` stay apart, equal or not: their names say which layer they are of.
    """
    initializers, first = model.graph.initializers, dict[tuple[Any, ...], ir.Value]()
    for name, value in list(initializers.items()):
        tensor = value.const_value
        if tensor is None or name in parameters or value.is_graph_output():
            continue
        digest = hashlib.sha256(tensor.tobytes()).digest()
        kept = first.setdefault((tensor.dtype, tuple(tensor.shape), digest), value)
        if kept is not value:
            ir.convenience.replace_all_uses_with(value, kept)
            del initializers[name]


def name_parameters(model: ir.Model, module: torch.nn.Module) -> None:
    """Give constants that the exporter computed from a parameter of their module its name.

    Such a constant has the parameter's values in another shape (norms: [C] becomes [C, 1, 1]). Of
    several parameters with equal values (fresh norms, which the exporter merges) the first one in
    the graph gives the name.
    """
    parameters = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    initializers = model.graph.initializers
    for node in model.graph:
        prefix = f"{_module_of(node)}."
        own = {
            name: values
            for name, values in parameters.items()
            if name.rpartition(".")[0] == prefix[:-1]
        }
        for value in node.inputs:
            if value is None or not value.is_initializer() or value.name in parameters:
                continue
            for name, values in own.items():
                if name not in initializers and _same_values(value.const_value, values):
                    value.name = name
                    break


def _same_values(constant: ir.TensorProtocol | None, parameter: torch.Tensor) -> bool:
    if constant is None or constant.size != parameter.numel() or not parameter.is_floating_point():
        return False
    return bool(np.array_equal(constant.numpy().ravel(), parameter.numpy().ravel()))


def name_after_modules(model: ir.Model) -> None:
    """Name nodes ``module.path/Op``, outputs alike, axes ``batch``, ``height``, ``width``; drop traces."""
    graph = model.graph
    for node in graph:
        node.name = f"{_module_of(node)}/{node.op_type}".removeprefix("/")
    NameNodesPass()(model)
    names = {value.name for value in (*graph.inputs, *graph.outputs)} | set(graph.initializers)
    axes = _axis_names(graph.inputs[0])
    for value in (*graph.inputs, *graph.outputs):
        _rename_axes(value, axes)
    for node in graph:
        for index, value in enumerate(node.outputs):
            _rename_axes(value, axes)
            if value.name not in names:
                value.name = node.name if index == 0 else f"{node.name}:{index}"
    common_passes.ClearMetadataAndDocStringPass()(model)
    for initializer in graph.initializers.values():
        initializer.metadata_props.clear()
    graph.name = "denoiser"
    model.producer_name, model.producer_version = "mpq-deploy", None


def _module_of(node: ir.Node) -> str:
    """Return the path of the module that a node comes from; empty when the exporter kept none."""
    scopes = node.metadata_props.get(SCOPES)
    if not scopes:
        return ""
    path = [scope for scope in ast.literal_eval(scopes)[:-1] if scope and scope != OUTSIDE]
    return path[-1].removeprefix(PREFIX.rstrip(".")).removeprefix(".") if path else ""


def _axis_names(sample: ir.Value) -> dict[str, str]:
    """Return what the traced symbols of the sample's axes are called: symbol -> name."""
    shape = tuple(sample.shape or ())
    names = ("batch", *(f"size_{axis}" for axis in range(1, len(shape))))
    if len(shape) == 4:
        names = (*names[:2], "height", "width")
    return {str(s.value): n for s, n in zip(shape, names) if isinstance(s, ir.SymbolicDim)}


def _rename_axes(value: ir.Value, axes: Mapping[str, str]) -> None:
    """Write the traced symbols of axes by their names."""
    if value.shape is None:
        return
    symbol = re.compile("|".join(rf"\b{re.escape(one)}\b" for one in axes) or "(?!)")
    value.shape = ir.Shape(
        symbol.sub(lambda found: axes[found[0]], str(size.value))
        if isinstance(size, ir.SymbolicDim) and size.value is not None
        else size
        for size in value.shape
    )
