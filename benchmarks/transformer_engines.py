"""Diffusion transformers and UNets as TensorRT-RTX engines: which plans build, and whether they stay packed.

    python benchmarks/transformer_engines.py [--models dit,pixart,sd3,sd3.5] [--plans "mix;all w8a8;..."]

By default the transformers and the plans that any RTX GPU takes; `--floats` has the UNets too, and the plans in FP8
(Ada, SM89) and FP4 (Blackwell, SM120). Flux needs its pipeline: tests/pipeline/test_float_transformers.py builds it.

Each model is a diffusers folder with random weights, two blocks of width 128, and goes through every stage. The engine
is held against its plan in the builder's own log: each layer's kernel, the type that it computes in, the type in which
its weight lies in the engine, and the bytes of all constants. Nothing is run on a GPU; the errors are ONNX Runtime's,
of a model that nobody trained, so they say that the graph works and nothing of quality. Exit code 1 unless all engines
are as planned, and in FP8 or FP4 wherever the plan is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from table import Page, bench_parser, bench_recipe, markdown, verdict

from mpq_deploy.engine.record import EngineRecord
from mpq_deploy.errors import EngineError
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.system.progress import PlainTalk

HEADS, WIDTH, TEXT, POOLED, ROWS, TOKENS = 4, 128, 48, 32, 3, 12
BLOCKS: dict[str, Any] = {"num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS}
LATENT: dict[str, Any] = {
    **BLOCKS,
    "num_layers": 2,
    "in_channels": 4,
    "sample_size": 16,
    "patch_size": 2,
}
JOINT: dict[str, Any] = {"joint_attention_dim": TEXT, "pooled_projection_dim": POOLED}
SD3: dict[str, Any] = {
    **LATENT,
    **JOINT,
    "out_channels": 4,
    "caption_projection_dim": WIDTH,
    "pos_embed_max_size": 16,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dit": ("DiTTransformer2DModel", {**LATENT, "out_channels": 8, "num_embeds_ada_norm": 10}),
    "pixart": (
        "PixArtTransformer2DModel",
        {**LATENT, "out_channels": 8, "cross_attention_dim": WIDTH, "caption_channels": TEXT},
    ),
    "sd3": ("SD3Transformer2DModel", SD3),
    "sd3.5": (
        "SD3Transformer2DModel",
        {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0,)},
    ),
}
UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (64, 128),
    "layers_per_block": 1,
    "norm_num_groups": 16,
}
UNETS: dict[str, tuple[str, dict[str, Any]]] = {
    "unet2d": (
        "UNet2DModel",
        {
            **UNET,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
    ),
    "unet2dcondition": (
        "UNet2DConditionModel",
        {
            **UNET,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": TEXT,
            "attention_head_dim": HEADS,
        },
    ),
}
BRANCHES = ["rows", "cols", "lowrank", "scale"]


def everything(scheme: str) -> dict[str, Any]:
    """Every layer in one scheme."""
    return {"budget": 1.0, "allocate.protect": [{"layers": "*", "schemes": [scheme]}]}


PLANS: dict[str, dict[str, Any]] = {
    "mix": {"budget": 0.4, "allocate.branches": BRANCHES},
    "mix, INT8 compute": {
        "budget": 0.45,
        "allocate.schemes": ["fp16", "w8a8", "w4a8"],
        "allocate.branches": BRANCHES,
    },
    **{f"all {scheme}": everything(scheme) for scheme in ("w8a8", "w8a16", "w4a16", "w4a8")},
}
ADA, BLACKWELL = {"target": "rtx-ada"}, {"target": "rtx-blackwell"}
FLOAT_PLANS: dict[str, dict[str, Any]] = {
    "Ada, mix": {**ADA, "budget": 0.45, "allocate.schemes": ["fp16", "f8a8", "w4f8"]},
    "Ada, all f8a8": {**ADA, **everything("f8a8")},
    "Blackwell, mix": {
        **BLACKWELL,
        "budget": 0.45,
        "allocate.schemes": ["fp16", "f8a8", "w4f8", "nvfp4"],
    },
    "Blackwell, f8a8 and nvfp4": {
        **BLACKWELL,
        "budget": 0.35,
        "allocate.protect": [{"layers": "*", "schemes": ["f8a8", "nvfp4"]}],
    },
}
# Convolutions have no FP4: within less, UNets have no such plan.
UNET_BUDGET = 0.48
# Enough to fill every statistic; the weights are random, so more would say nothing.
SMALL: dict[str, Any] = {
    "calibrate.timesteps": 2,
    "calibrate.samples": 4,
    "calibrate.steps": 4,
    "calibrate.batch_size": 4,
    "measure.probes": 2,
    "measure.samples": 2,
    "measure.batch_size": 2,
    "quantize.hessian_rows": 512,
    "evaluate.samples": 2,
    "evaluate.steps": 3,
    "evaluate.timesteps": 2,
    "evaluate.controls": False,
    "target": "rtx",
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
DDIM = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "clip_sample": False}


def write_model(
    name: str, folder: Path, seed: int, larger: dict[str, Any] | None = None
) -> dict[str, str]:
    """Write a model with random weights and its conditions; return what the recipe says of it.

    ``larger``: options in place of the small ones.
    """
    class_name, options = {**MODELS, **UNETS}[name]
    options = {**options, **(larger or {})}
    torch.manual_seed(seed)
    model = getattr(diffusers, class_name)(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            # Fresh norms are all ones and fresh gates zeros, which hides layers from the output.
            parameter.add_(0.02 * torch.randn(parameter.shape))
    model.save_pretrained(folder, safe_serialization=True)
    scheduler = folder / "scheduler_config.json"
    scheduler.write_text(json.dumps(FLOW if name.startswith("sd3") else DDIM), encoding="utf-8")
    described = {"model": str(folder), "scheduler": str(scheduler)}
    if name in ("dit", "unet2d"):
        return described
    rng = np.random.default_rng(seed)
    arrays: dict[str, Any] = {
        "encoder_hidden_states": rng.standard_normal((ROWS, TOKENS, TEXT), np.float32)
    }
    if name == "pixart":
        arrays["encoder_attention_mask"] = np.ones((ROWS, TOKENS), np.float32)
    elif name.startswith("sd3"):
        arrays["pooled_projections"] = rng.standard_normal((ROWS, POOLED), np.float32)
    np.savez(folder / "conditions.npz", **arrays, _uncond_row=np.array(ROWS - 1))
    return {**described, "conditions": str(folder / "conditions.npz")}


def row_of(run: Path) -> list[str]:
    """Describe a finished run: layers by family, bytes, kernels that compute, error."""
    record = EngineRecord.load(run / "engine" / "build.json")
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    layers = [SCHEMES[layer["scheme"]] for layer in report["layers"]]
    families = Counter(scheme.family for scheme in layers)
    branched = sum(bool(scheme.branch) for scheme in layers)
    shown = ", ".join(f"{count} {family}" for family, count in sorted(families.items()))
    kernels = ", ".join(f"{count} {name}" for name, count in record.kernels.items() if " " in name)
    return [
        f"{shown}{f'; {branched} with a branch' if branched else ''}",
        f"{record.planned_bytes:,}",
        f"{record.weights_bytes or 0:,}",
        kernels,
        "yes" if record.verified and not record.problems else "; ".join(map(str, record.problems)),
        f"{report['measured_nmse']:.1e}",
    ]


def build(name: str, plans: list[str], chosen: argparse.Namespace) -> tuple[list[list[str]], bool]:
    """Build every plan of one model in one run folder; return the table's rows and whether all are as planned."""
    folder = chosen.out / f"bench-transformer-{name}"
    given = write_model(name, folder / "model", chosen.seed)
    rows, passed = [], True
    for plan in plans:
        settings = {**PLANS, **FLOAT_PLANS}[plan]
        if name in UNETS and settings["budget"] < UNET_BUDGET:
            settings = {**settings, "budget": UNET_BUDGET}
        recipe = bench_recipe(None, chosen.set, {**SMALL, **settings, **given})
        try:
            with open_pipeline(recipe, folder / "run", PlainTalk()) as pipeline:
                pipeline.run_until("report")
        except EngineError as error:
            rows.append([name, plan, "", "", "", "", error.message, ""])
            passed = False
            continue
        rows.append([name, plan, *row_of(folder / "run")])
    return rows, passed


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--models", help="of those in the table, by comma")
    parser.add_argument("--plans", help="of those in the table, by semicolon")
    parser.add_argument("--floats", action="store_true", help="plans in FP8 and FP4, UNets too")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("runs"), help="where the run folders are"
    )
    chosen = parser.parse_args()
    page = Page("Engines of diffusion transformers")
    page.say((__doc__ or "").split("\n\n")[3].replace("\n", " "))
    models = (
        chosen.models.split(",") if chosen.models else [*MODELS, *(UNETS if chosen.floats else ())]
    )
    plans = (
        chosen.plans.split(";") if chosen.plans else [*(FLOAT_PLANS if chosen.floats else PLANS)]
    )
    rows, verdicts = [], []
    for name in models:
        found, passed = build(name, plans, chosen)
        rows += found
        verdicts.append((name, passed))
    header = (
        "model",
        "plan",
        "layers",
        "planned bytes",
        "engine's bytes",
        "kernels",
        "as planned",
        "NMSE",
    )
    page.say(markdown(header, rows))
    page.say(
        "\n".join(
            verdict(passed, f"{name}: every engine is as planned", "as above")
            for name, passed in verdicts
        )
    )
    page.save(chosen.page)
    sys.exit(0 if all(passed for _, passed in verdicts) else 1)


if __name__ == "__main__":
    main()
