"""Stable Diffusion 1.5's UNet as most people have it in ONNX, through export and check.

    python benchmarks/legacy.py [SIZE] [--page docs/results/legacy.md]

The TorchScript exporter at opset 14, dynamic batch, height and width, an int64 timestep and weights beside the file:
what optimum writes. SIZE is one of benchmarks/scale.py's (860M: Stable Diffusion 1.5's shapes; random weights). The
folder holds unet/model.onnx, its configuration and a scheduler; nothing else describes it. Each command runs in a
process of its own; memory is the peak of its resident memory and its children's.
Checked: the export equals the file in ONNX Runtime at another size of batch, all its Conv, Gemm and constant MatMul
are layers, and `check` finds nothing in the exported graph that TensorRT-RTX refuses or computes wrongly.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from scale import in_child
from scale_models import SCHEDULER, SIZES, TOKENS, Size, make_model, unet_config
from table import Page, bench_parser, markdown, verdict

from mpq_deploy.cli import main as mpq_deploy_main

OPSET, LATENT = 14, 64
# Of the largest output; what FP32 sums in another order may differ by.
SAME = 1e-4


def write_legacy(size: Size, latent: int, folder: Path) -> None:
    """Write the folder that optimum would."""
    import torch
    from diffusers import UNet2DConditionModel

    class Called(torch.nn.Module):
        """Positional arguments in, a tensor out."""

        def __init__(self, unet: Any) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
            return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]

    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        made = Path(aside) / "pipeline"
        make_model(size, latent, made)
        unet = UNet2DConditionModel.from_pretrained(made / "unet", torch_dtype=torch.float32).eval()
        # The exporter takes no fused attention at this opset.
        unet.set_default_attn_processor()
    unet.save_config(folder / "unet")
    (folder / "scheduler").mkdir()
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(SCHEDULER), encoding="utf-8")
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "OnnxStableDiffusionPipeline"}), encoding="utf-8"
    )
    channels = unet_config(size, latent).get("in_channels", 4)
    example = (
        torch.randn(2, channels, latent, latent),
        torch.tensor([999, 1]),
        torch.randn(2, TOKENS, size.text),
    )
    axes = {0: "batch", 2: "height", 3: "width"}
    torch.onnx.export(
        Called(unet),
        example,
        # A text: of a path object it would not write over 2 GB.
        str(folder / "unet" / "model.onnx"),
        dynamo=False,
        opset_version=OPSET,
        input_names=["sample", "timestep", "encoder_hidden_states"],
        output_names=["out_sample"],
        dynamic_axes={
            "sample": axes,
            "timestep": {0: "batch"},
            "encoder_hidden_states": {0: "batch", 1: "sequence"},
            "out_sample": axes,
        },
    )
    rng = np.random.default_rng(0)
    states = rng.standard_normal((4, TOKENS, size.text), np.float32)
    np.savez(folder / "conditions.npz", encoder_hidden_states=states)


def difference(original: Path, exported: Path, size: Size, latent: int) -> float:
    """The largest difference of both files' outputs for three samples, of the largest output."""
    rng = np.random.default_rng(1)
    given = {
        "sample": rng.standard_normal((3, 4, latent, latent), np.float32),
        "timestep": np.array([500, 20, 980]),
        "encoder_hidden_states": rng.standard_normal((3, TOKENS, size.text), np.float32),
    }
    found = []
    for path in (original, exported):
        session = ort.InferenceSession(path)
        types = {entry.name: entry.type for entry in session.get_inputs()}
        feeds = {
            name: value.astype(np.int64 if types[name] == "tensor(int64)" else np.float32)
            for name, value in given.items()
        }
        found.append(session.run(None, feeds)[0])
        del session
    return float(np.abs(found[1] - found[0]).max() / np.abs(found[0]).max())


def command_line(given: list[str]) -> None:
    """Run an mpq-deploy command in this process."""
    sys.argv = ["mpq-deploy", *given]
    mpq_deploy_main()


def main() -> None:
    """Run the benchmark."""
    # In a child: a command of mpq-deploy, or the file to be made.
    if sys.argv[1:2] == ["--command"]:
        command_line(sys.argv[2:])
        return
    if sys.argv[1:2] == ["--model"]:
        write_legacy(SIZES[sys.argv[2]], int(sys.argv[3]), Path(sys.argv[4]))
        return
    parser = bench_parser(__doc__, recipe=False)
    parser.add_argument("size", nargs="?", default="860M", choices=sorted(SIZES))
    parser.add_argument("--latent", type=int, default=LATENT)
    chosen = parser.parse_args()
    page = Page("Stable Diffusion 1.5's UNet by the TorchScript exporter")
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside) / "model"
        folder.mkdir()
        measure(page, chosen.size, chosen.latent, folder, chosen.page)


def measure(page: Page, name: str, latent: int, folder: Path, saved: Path | None) -> None:
    """Make the file, export and check it, compare, and conclude the page."""
    size, run = SIZES[name], folder.parent / "run"
    costs = [in_child(["--model", name, str(latent), str(folder)], __file__)]
    conditions = ["--conditions", str(folder / "conditions.npz")]
    export = ["export", str(folder), "-o", str(run), *conditions]
    exported = run / "export" / "model.onnx"
    check = ["check", str(exported), "--target", "rtx"]
    costs += [in_child(["--command", *given], __file__) for given in (export, check)]
    steps = ("torch.onnx.export(dynamo=False)", "mpq-deploy export", "mpq-deploy check")
    rows = [
        [step, f"{cost.seconds / 60:.1f}", f"{cost.peak_bytes / 1e9:.2f}"]
        for step, cost in zip(steps, costs, strict=True)
    ]
    facts = json.loads((run / "export" / "facts.json").read_text(encoding="utf-8"))
    page.say(
        f"{name}, latents of {latent} x {latent}, opset {OPSET}: {facts['layers']} layers, "
        f"{facts['fp16_size_bytes'] / 1e6:.1f} MB in FP16."
    )
    page.say(markdown(["step", "minutes", "peak GB"], rows))
    apart = difference(folder / "unet" / "model.onnx", exported, size, latent)
    page.conclude(
        [
            (apart < SAME, verdict(apart < SAME, "the export equals the file", f"{apart:.1e}")),
            every_product(facts["layers"], folder / "unet" / "model.onnx"),
        ],
        saved,
    )


def every_product(layers: int, original: Path) -> tuple[bool, str]:
    """Compare the number of layers with the file's Conv, Gemm and MatMul of a constant."""
    model = onnx.load(original, load_external_data=False)
    constants = {weight.name for weight in model.graph.initializer}
    constants |= {n.output[0] for n in model.graph.node if n.op_type in ("Constant", "Identity")}
    products = [
        node
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in constants
    ]
    same = len(products) == layers
    return same, verdict(same, "every product of a constant is a layer", f"{len(products)}")


if __name__ == "__main__":
    main()
