"""Dialects: what the parser and builder of a TensorRT release take, as data.

Sources: ``tensorrt_rtx`` 1.7.1.116 on CPU (its own ``supports_operator`` and builds,
docs/engine-forms.md), and for TensorRT proper NvInfer.h per release, the parser's ``operators.md``
and source. What only the latter state is documented, not proven.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpq_deploy.errors import UsageError, nearest

# What no TensorRT parser takes: the operators that tensorrt_rtx 1.7.1 refuses, which are those of
# operators.md (10.15).
UNSUPPORTED = frozenset({
    "AffineGrid", "Bernoulli", "BitCast", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr",
    "BitwiseXor", "CenterCropPad", "Col2Im", "Compress", "ConcatFromSequence", "ConvInteger",
    "CumProd", "DFT", "Det", "DynamicQuantizeLinear", "ImageDecoder", "MatMulInteger", "MaxRoiPool",
    "MaxUnpool", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss", "Optional",
    "OptionalGetElement", "OptionalHasElement", "QLinearConv", "QLinearMatMul", "RegexFullMatch",
    "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert",
    "SequenceLength", "SequenceMap", "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat",
    "StringNormalizer", "StringSplit", "SwiGLU", "TfIdfVectorizer", "Unique",
})  # fmt: skip
# Operators of opset 23 and later: in operators.md of 10.15, not in the parser of 2024.
SINCE_2025 = frozenset({"Attention", "RMSNormalization", "RotaryEmbedding"})
SINCE_2026 = frozenset({"CausalConvWithState", "LinearAttention", "Swish", "TensorScatter"})
TYPES = frozenset(
    {"FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "INT32", "INT64", "INT8", "INT4", "UINT8", "BOOL"}
)
FP8, FP4 = "FLOAT8E4M3FN", "FLOAT4E2M1"


@dataclass(frozen=True)
class Dialect:
    """What one family of releases reads.

    ``opsets``: the smallest and the largest that it is known to read; the writer lowers what is
    above. ``unsupported``: operators that its parser refuses; ``doubtful``: those of which no
    source says that it takes them. ``types``: element types of constants. ``block_types``: types
    that may be quantized in blocks; ``block_rank``: the only rank of such a weight (None: any).
    ``constant_scales``: every scale must be a build-time constant. ``group_norm``: takes
    GroupNormalization with a scale per channel (opset 21). ``odd_rows``: takes INT4 whose last
    dimension is odd. ``requantized``, ``int4_conv``, ``int8_weights_only``: forms that are proven
    there.
    """

    name: str
    runtime: str
    opsets: tuple[int, int]
    unsupported: frozenset[str]
    doubtful: frozenset[str] = frozenset()
    types: frozenset[str] = TYPES
    block_types: frozenset[str] = frozenset({"INT4"})
    block_rank: int | None = None
    constant_scales: bool = False
    group_norm: bool = True
    odd_rows: bool = False
    requantized: bool = False
    int4_conv: bool = False
    int8_weights_only: bool = False

    @property
    def tensorrt(self) -> bool:
        """Whether it is a TensorRT, not ONNX Runtime."""
        return self.name.startswith("trt-")

    @property
    def proper(self) -> bool:
        """Whether it is TensorRT itself, with which nothing was built here, not TensorRT-RTX."""
        return self.tensorrt and self.name != "trt-rtx"


DIALECTS: dict[str, Dialect] = {
    one.name: one
    for one in (
        Dialect(
            "trt-10.3",
            "TensorRT 10.3",
            # operators.md says 20; INT4 needs 21, which the parser reads since 10.0 (NVIDIA's own
            # exporter writes it).
            (9, 21),
            UNSUPPORTED | SINCE_2025 | SINCE_2026,
            types=TYPES | {FP8},
            block_rank=2,
            constant_scales=True,
            group_norm=False,
        ),
        Dialect(
            "trt-10.13",
            "TensorRT 10.13",
            (9, 24),
            UNSUPPORTED | SINCE_2026,
            doubtful=SINCE_2025,
            types=TYPES | {FP8, FP4},
            block_types=frozenset({"INT4", FP8, FP4}),
        ),
        Dialect(
            "trt-11",
            "TensorRT 11",
            (9, 25),
            UNSUPPORTED,
            doubtful=SINCE_2026,
            types=TYPES | {FP8, FP4},
            block_types=frozenset({"INT4", FP8, FP4}),
        ),
        Dialect(
            "trt-rtx",
            "TensorRT-RTX 1.7",
            (9, 25),
            UNSUPPORTED | {"DeformConv"},
            types=TYPES | {FP8, FP4},
            block_types=frozenset({"INT4", "INT8", FP8, FP4}),
            odd_rows=True,
            requantized=True,
            int4_conv=True,
            int8_weights_only=True,
        ),
        Dialect("onnxruntime", "ONNX Runtime", (7, 25), frozenset(), odd_rows=True),
    )
}


def dialect_named(name: str) -> Dialect:
    """Return the dialect of that name. Raises UsageError for an unknown one."""
    if name not in DIALECTS:
        hint = f"{nearest(name, DIALECTS)}Known dialects: {', '.join(DIALECTS)}."
        raise UsageError(f"Unknown dialect '{name}'.", hint)
    return DIALECTS[name]
