"""A small FP16 graph being written: the pieces that quantized forms are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]
FLOATS = {np.dtype(np.float16): TensorProto.FLOAT16, np.dtype(np.float32): TensorProto.FLOAT}


class Draft:
    """One input ``x`` [batch, *shape] in FP16. Weights are random from one seed; nodes are named after their order."""

    def __init__(self, *shape: int, opset: int = 21, dtype: int = TensorProto.FLOAT16) -> None:
        self.shape, self.opset, self.dtype = shape, opset, dtype
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(0)
        self.count = 0
        self.batch: int | str = "batch"

    def const(self, array: Array, what: str = "const") -> str:
        self.count += 1
        name = f"{what}_{self.count}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def raw(self, data_type: int, shape: list[int], content: bytes) -> str:
        """A constant of a type that NumPy does not have."""
        self.count += 1
        tensor = TensorProto(
            name=f"raw_{self.count}", data_type=data_type, dims=shape, raw_data=content
        )
        self.constants.append(tensor)
        return tensor.name

    def op(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        self.count += 1
        out = f"{op.lower()}_{self.count}"
        self.nodes.append(
            helper.make_node(op, list(inputs), [out], name=f"n.{out}", domain=domain, **attributes)
        )
        return out

    def relu(self) -> str:
        return self.op("Relu", "x")

    def half(self, *shape: int) -> str:
        return self.const((self.rng.standard_normal(shape) * 0.05).astype(np.float16), "w")

    def scale(
        self, value: float = 0.05, shape: tuple[int, ...] = (), dtype: Any = np.float16
    ) -> str:
        return self.const(np.full(shape, value, dtype), "scale")

    def act(self, x: str, scale: str = "", **more: Any) -> str:
        """Q and DQ of an activation."""
        s = scale or self.scale()
        q = self.op("QuantizeLinear", x, s, output_dtype=TensorProto.INT8, **more)
        return self.op("DequantizeLinear", q, s, **more)

    def codes(self, dtype: str, *shape: int) -> str:
        low, high, kind = {"int8": (-127, 128, np.int8), "int4": (-7, 8, ml_dtypes.int4)}[dtype]
        return self.const(self.rng.integers(low, high, shape).astype(kind), "w")

    def int8(self, *shape: int, axis: int = 0) -> str:
        return self.op(
            "DequantizeLinear",
            self.codes("int8", *shape),
            self.scale(0.01, (shape[axis],)),
            axis=axis,
        )

    def int4(
        self,
        *shape: int,
        block: int | None = 64,
        axis: int = 0,
        scale: Any = np.float16,
        **more: Any,
    ) -> str:
        """INT4 in blocks along ``axis``; with block None one scale per entry of that axis."""
        if block is None:
            return self.op(
                "DequantizeLinear",
                self.codes("int4", *shape),
                self.scale(0.01, (shape[axis],), scale),
                axis=axis,
                **more,
            )
        size = list(shape)
        size[axis] = -(-shape[axis] // block)
        scales = self.const((self.rng.random(size) * 0.01 + 0.01).astype(scale), "scales")
        return self.op(
            "DequantizeLinear",
            self.codes("int4", *shape),
            scales,
            axis=axis,
            block_size=block,
            **more,
        )

    def requant(self, w: str, channels: int, axis: int, scale: str = "") -> str:
        s = scale or self.scale(0.003, (channels,))
        q = self.op("QuantizeLinear", w, s, axis=axis, output_dtype=TensorProto.INT8)
        return self.op("DequantizeLinear", q, s, axis=axis)

    def reshape(self, w: str, *shape: int) -> str:
        return self.op("Reshape", w, self.const(np.array(shape, np.int64), "shape"))

    def conv(self, x: str, w: str, pad: int = 1, **more: Any) -> str:
        return self.op("Conv", x, w, pads=[pad] * 4, **more)

    def resize(self, x: str) -> str:
        sizes = self.const(np.array([1, 1, 2, 2], np.float32), "sizes")
        return self.op(
            "Resize",
            x,
            "",
            sizes,
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )

    def model(self, y: str) -> onnx.ModelProto:
        x = helper.make_tensor_value_info("x", self.dtype, [self.batch, *self.shape])
        output = helper.make_empty_tensor_value_info(y)
        output.type.tensor_type.elem_type = self.dtype
        graph = helper.make_graph(self.nodes, "form", [x], [output], self.constants)
        ir_version = helper.find_min_ir_version_for([helper.make_opsetid("", self.opset)])
        domains = sorted({node.domain for node in self.nodes} - {""})
        opsets = [
            helper.make_opsetid("", self.opset),
            *(helper.make_opsetid(name, 1) for name in domains),
        ]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=max(ir_version, 10))
        inferred = onnx.shape_inference.infer_shapes(model).graph.output[0].type.tensor_type
        # An output that nobody can infer has some shape of four dimensions.
        unknown = helper.make_tensor_value_info(y, self.dtype, [None] * 4).type.tensor_type
        shape = inferred.shape if inferred.HasField("shape") else unknown.shape
        model.graph.output[0].type.tensor_type.shape.CopyFrom(shape)
        return model

    def save(self, y: str, path: Path) -> Path:
        onnx.save(self.model(y), path)
        return path
