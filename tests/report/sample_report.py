"""A synthetic report: the numbers are made up, in the proportions of a real small UNet. For tests of the page only."""

import numpy as np
from PIL import Image, ImageDraw

from mpq_deploy.report.data import (
    BudgetPlan,
    BudgetPlans,
    Check,
    Control,
    CpuLatencyInfo,
    EngineInfo,
    EvaluationInfo,
    ExpectedLatency,
    ImageSet,
    Interval,
    LayerOption,
    LayerRow,
    LoraInfo,
    ModelInfo,
    OtherRow,
    PlanTimes,
    ReportData,
    SolverInfo,
    StageRow,
    TargetInfo,
)

LABELS = (
    "grinning face",
    "winking face",
    "flag: Japan",
    "flag: France",
    "sun",
    "sad face",
    "ball",
    "green heart",
)


def layer_shapes():
    """Names and shapes in the order of a UNet2DModel's graph."""
    yield "time_embedding.linear_1", (256, 64)
    yield "time_embedding.linear_2", (256, 256)
    yield "conv_in", (64, 3, 3, 3)
    widths = (64, 96, 128)
    before = 64
    for level, width in enumerate(widths):
        for block in range(2):
            yield from resnet(f"down_blocks.{level}.resnets.{block}", before, width)
            before = width
            if level == 2:
                yield from attention(f"down_blocks.{level}.attentions.{block}", width)
        if level < 2:
            yield f"down_blocks.{level}.downsamplers.0.conv", (width, width, 3, 3)
    yield from resnet("mid_block.resnets.0", 128, 128)
    yield from attention("mid_block.attentions.0", 128)
    yield from resnet("mid_block.resnets.1", 128, 128)
    for level, width in enumerate(reversed(widths)):
        for block in range(3):
            yield from resnet(f"up_blocks.{level}.resnets.{block}", before + width, width)
            before = width
        if level < 2:
            yield f"up_blocks.{level}.upsamplers.0.conv", (width, width, 3, 3)
    yield "conv_out", (3, 64, 3, 3)


def resnet(name, before, width):
    yield f"{name}.conv1", (width, before, 3, 3)
    yield f"{name}.time_emb_proj", (width, 256)
    yield f"{name}.conv2", (width, width, 3, 3)
    if before != width:
        yield f"{name}.conv_shortcut", (width, before, 1, 1)


def attention(name, width):
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        yield f"{name}.{part}", (width, width)


def layer_rows():
    rng = np.random.default_rng(0)
    bits = {
        "fp16": 16,
        "w8a8": 8.1,
        "w8a16": 8.1,
        "w4a16-b32": 4.5,
        "w4a16-b64": 4.25,
        "w4a8-b32": 4.5,
    }
    rows = []
    for name, shape in layer_shapes():
        weights = int(np.prod(shape))
        op = "Conv" if len(shape) == 4 else "Gemm" if "time" in name else "MatMul"
        if name in ("conv_in", "conv_out", "time_embedding.linear_1"):
            scheme = "fp16"
        else:
            scheme = str(
                rng.choice(
                    ["w4a16-b32", "w4a16-b64", "w4a8-b32", "w8a16", "w8a8"],
                    p=[0.4, 0.25, 0.2, 0.1, 0.05],
                )
            )
        refused = {}
        if name == "conv_in":
            refused = dict.fromkeys(
                ("w8a8", "w8a16", "w4a16", "w4a8"), "the recipe protects 'conv_in'"
            )
        if name == "conv_out":
            refused = {"w4a16-b64": "blocks of 64 do not divide 3 x 576"}
        rows.append(
            LayerRow(
                name=name,
                op=op,
                scheme=scheme,
                bytes=int(weights * bits[scheme] / 8),
                fp16_bytes=2 * weights,
                weights=weights,
                weight_shape=shape,
                predicted_loss=0.0 if scheme == "fp16" else float(10 ** rng.uniform(-9, -7)),
                refused=refused,
                loss_by_timestep=tuple(float(loss) for loss in 10 ** rng.uniform(-9, -7, 10)),
                kurtosis=float(rng.uniform(2, 9)),
            )
        )
    return tuple(rows)


def make_budgets(
    layers, command="mpq-deploy build --recipe runs/emoji/recipe.yaml -o runs/emoji", timed=False
):
    """Nine plans: from every layer in w4a16-b64 to the first half of them in w8a16, and an eighth more each time.

    ``timed``: two more of each size, a slower one of less error and a faster one of more.
    """
    forms = {"w4a16-b64": 4.25, "w8a16": 8.1}
    sizes = tuple(
        {i: int(row.weights * bits / 8) for i, bits in enumerate(forms.values())} for row in layers
    )
    plans = []
    for step in range(9):
        large = step * len(layers) // 16
        schemes = tuple(int(number < large) for number in range(len(layers)))
        total = sum(row[scheme] for row, scheme in zip(sizes, schemes, strict=True)) + 25_000 + step
        for variant in range(3 if timed else 1):
            moved = (*schemes[:variant], *schemes[: len(schemes) - variant])[: len(schemes)]
            plan = BudgetPlan(
                size_bytes=total,
                predicted_nmse=3e-5 * 0.5**step * 3**variant,
                latency_ms=0.9 - 0.03 * step - 0.11 * variant if timed else None,
                schemes=moved,
            )
            plans.append(plan)
    smaller = {
        row.name: LayerOption(scheme="w4a16-b64", bytes=row.bytes // 2, predicted_loss=1e-5)
        for row in layers
    }
    larger = {
        row.name: LayerOption(scheme="fp16", bytes=2 * row.weights + 1, predicted_loss=0.0)
        for row in layers
    }
    return BudgetPlans(
        layers=tuple(row.name for row in layers),
        schemes=tuple(forms),
        layer_bytes=sizes,
        plans=tuple(plans),
        times=PlanTimes(fp16_ms=0.7, source="estimated", batch=2) if timed else None,
        smaller=smaller,
        larger=larger,
        command=command,
    )


def pictures(noise):
    """Eight drawings of 32 x 32 pixels, with ``noise`` standard deviations of 8-bit levels."""
    draws = []
    for number in range(8):
        image = Image.new("RGB", (32, 32), "#ffffff")
        draw = ImageDraw.Draw(image)
        if number == 2:
            draw.rectangle((1, 6, 30, 25), "#ffffff", "#cccccc")
            draw.ellipse((10, 10, 21, 21), "#bc002d")
        elif number == 3:
            for part, colour in enumerate(("#0055a4", "#ffffff", "#ef4135")):
                draw.rectangle((1 + 10 * part, 6, 10 + 10 * part, 25), colour)
        else:
            colour = ("#ffcc33", "#ffcc33", "", "", "#ff9922", "#ffdd55", "#e8e8e8", "#33aa55")[
                number
            ]
            draw.ellipse((2, 2, 29, 29), colour, "#885500")
            draw.ellipse((9, 10, 12, 14), "#442200")
            draw.line((19, 12, 23, 12), "#442200", 2) if number == 1 else draw.ellipse(
                (19, 10, 22, 14), "#442200"
            )
            draw.arc((8, 10, 23, 24), 20, 160, "#442200", 2)
        draws.append(np.asarray(image, np.float64))
    stack = np.stack(draws)
    made = stack + noise * np.random.default_rng(5).standard_normal(stack.shape)
    return np.rint(np.clip(made, 0, 255)).astype(np.uint8)


def make_report(**changes):
    layers = layer_rows()
    fixed = 25_000
    fp16 = sum(layer.fp16_bytes for layer in layers) + fixed
    size = sum(layer.bytes for layer in layers) + fixed
    timesteps = tuple(float(t) for t in range(950, -1, -100))
    rise = np.geomspace(0.4, 2.2, len(timesteps))
    values = {
        "model": ModelInfo(
            name="emoji",
            source="bundled demo",
            labels=LABELS,
            weights=sum(x.weights for x in layers),
            loras=(
                LoraInfo(
                    name="style.safetensors", sha256="ab" * 32, scale=0.8, layers={"unet": 32}
                ),
            ),
        ),
        "target": TargetInfo(name="rtx", title="GeForce RTX, TensorRT-RTX", dialect="trt-rtx"),
        "budget": 0.35,
        "budget_bytes": int(0.35 * fp16),
        "size_bytes": size,
        "fp16_size_bytes": fp16,
        "fixed_bytes": fixed,
        "predicted_nmse": 1.4e-6,
        "measured_nmse": 1.7e-6,
        "psnr_db": 56.64,
        "ssim": 0.99912,
        "timesteps": timesteps,
        "nmse_by_timestep": tuple(float(v) for v in 1.7e-6 * rise),
        "evaluation": EvaluationInfo(
            samples=16, steps=20, seed=1234, sampler="DDIM, eta 0, 20 steps, epsilon (built in)"
        ),
        "controls": {
            "int8": Control(
                title="Everything INT8",
                size_bytes=int(0.503 * fp16),
                size_ratio=0.503,
                measured_nmse=5.0e-4,
                psnr_db=42.2,
                ssim=0.9874,
                nmse_by_timestep=tuple(float(v) for v in 5.0e-4 * rise[::-1]),
            ),
            "int4": Control(
                title="Everything INT4",
                size_bytes=int(0.281 * fp16),
                size_ratio=0.281,
                measured_nmse=1.95e-3,
                psnr_db=27.3,
                psnr_db_each=(27.3,) * 8,
                calls=4,
                behind_db=29.1,
                behind_db_interval=Interval(low=28.2, high=30.0),
                ssim=0.871,
                nmse_by_timestep=tuple(float(v) for v in 1.95e-3 * rise),
            ),
        },
        "engine": EngineInfo(
            backend="TensorRT-RTX",
            version="1.7.1.116",
            file="engine/model.engine",
            sha256="9f2c" * 16,
            weights_bytes=int(1.004 * size),
            planned_weights_bytes=size,
            engine_bytes=size + 310_000,
            verified=True,
            checks=(
                Check(
                    what="Every planned layer has the planned type",
                    passed=True,
                    detail=f"{len(layers)} layers, from the build log",
                ),
                Check(
                    what="Weights memory agrees with the plan within 2 %",
                    passed=True,
                    detail="0.4 % more",
                ),
            ),
            build_seconds=0.53,
        ),
        "cpu_latency": CpuLatencyInfo(
            float_ms=6.1,
            ours_ms=9.4,
            source="ONNX Runtime on this CPU, fake-quantized, batch 1; not the target device",
        ),
        "layers": layers,
        "loss_timesteps": timesteps,
        "others": (
            OtherRow(
                name="class_embedding.weight",
                op="Gather",
                elements=8 * 256,
                reason="Gather is not a Conv, Gemm or MatMul",
            ),
            OtherRow(
                name="up.weight",
                op="ConvTranspose",
                elements=64 * 64 * 4,
                reason="TensorRT has no INT8 or INT4 ConvTranspose: it would dequantize the weight on every call",
            ),
        ),
        "stages": tuple(
            StageRow(name=name, seconds=seconds, peak_rss_bytes=int(memory * 1e6), cached=cached)
            for name, seconds, memory, cached in (
                ("export", 21.4, 1130, True),
                ("calibrate", 9.8, 610, True),
                ("measure", 31.0, 1420, True),
                ("allocate", 0.42, 240, False),
                ("quantize", 5.2, 420, False),
                ("engine", 0.9, 780, False),
                ("evaluate", 6.6, 510, False),
            )
        ),
        "solver": SolverInfo(status="Optimal", gap=3e-5, seconds=0.21),
        "sensitivity": "random adjoint probes",
        "versions": {
            "mpq-deploy": "0.1.0",
            "onnxruntime": "1.31.1",
            "torch": "2.13.0",
            "tensorrt_rtx": "1.7.1.116",
            "numpy": "2.4.6",
        },
        "reproduce": "mpq-deploy build --budget 0.35 --target rtx -o runs/emoji",
        "notes": ("Predicted losses are stated from held-back probes.",),
        "images": ImageSet(
            {
                "float": pictures(0),
                "ours": pictures(0.4),
                "int8": pictures(2),
                "int4": pictures(11),
            },
            LABELS,
        ),
    }
    given = {**values, **changes}
    # Plans of other budgets are of the same layers.
    given.setdefault("budgets", make_budgets(layers) if given["layers"] is layers else None)
    return ReportData(**given)


def distance_row(**changes):
    """A Frechet distance as report.json holds it."""
    row = {
        "variant": "ours",
        "title": "Frechet distance (demo)",
        "network": "demo",
        "network_digest": "n",
    }
    row |= {
        "network_features": 64,
        "against": "float",
        "against_source": "",
        "against_samples": 200,
    }
    row |= {
        "against_digest": "",
        "samples": 200,
        "sampler": "DDIM",
        "steps": 20,
        "seed": 5,
        "distance": 1.0,
    }
    row |= {
        "floor": 0.0,
        "interval": {"low": 0.9, "high": 1.1},
        "increase_interval": {"low": 0.9, "high": 1.1},
    }
    return {**row, "other_noise": 2.0, **changes}


def timed_report(**changes):
    """A report whose plans have times, its own too."""
    expected = {**expected_row(0.75, "a roofline"), "objective": "balanced", "fp16_ms": 0.7}
    layers = layer_rows()
    values = {
        "expected_latency": ExpectedLatency(**expected),
        "budgets": make_budgets(layers, timed=True),
    }
    return make_report(**{"layers": layers, **values, **changes})


def expected_row(milliseconds, basis):
    """An estimated latency as report.json holds it."""
    row = {"ours_ms": milliseconds, "fp16_ms": 4.0, "int8_ms": 3.5, "others_ms": 1.0, "batch": 2}
    return {**row, "source": "estimated", "basis": basis, "measured": 0, "estimated": 4}
