"""On a machine with an NVIDIA GPU: what torch computes there agrees with the CPU.

Both compute in whole FP32, in other orders of summation: of sums of a thousand terms the last three
or four of 24 bits differ, more where products cancel. TF32 has 11 bits, and would differ by 1e-3. A
value that lies between two codes may be rounded to the other: rare, but in a tiny layer it shows.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

from mpq_deploy.calls.recorded import RecordedCalls  # noqa: E402
from mpq_deploy.formats.minifloat import E2M1, E4M3  # noqa: E402
from mpq_deploy.formats.scheme import SCHEMES  # noqa: E402
from mpq_deploy.onnx_torch.torch_graph import TorchGraph  # noqa: E402
from mpq_deploy.recipe import MeasureSettings, RecoverSettings, load_recipe  # noqa: E402
from mpq_deploy.recover.recover import recover  # noqa: E402
from mpq_deploy.run.pipeline import open_pipeline  # noqa: E402
from mpq_deploy.sensitivity import probe as probe_module  # noqa: E402
from mpq_deploy.sensitivity.exhaustive import measure_exhaustive  # noqa: E402
from mpq_deploy.sensitivity.probe import measure_probe  # noqa: E402
from mpq_deploy.sensitivity.salience import channel_errors  # noqa: E402
from mpq_deploy.sensitivity.subject import Subject  # noqa: E402
from mpq_deploy.sensitivity.table import SensitivityTable  # noqa: E402
from mpq_deploy.system.compute import Compute, compute_on, why_no_cuda_torch  # noqa: E402
from mpq_deploy.system.progress import Talk  # noqa: E402
from tests.graphs import awkward_graph, denoiser_graph  # noqa: E402
from tests.onnx_torch.test_operators import CASES, Case, model_of  # noqa: E402
from tests.recover.cases import make_case  # noqa: E402
from tests.sensitivity.cases import Setting, setting  # noqa: E402
from tests.sensitivity.kinds import kinds  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch]
ON_GPU, ON_CPU = Compute(None, 0), Compute()
# Relative, in the norm.
CLOSE = 1e-4
# Far from what TF32 does, and room for Winograd's convolutions.
EXACT = 5e-5


@pytest.fixture(autouse=True, scope="module")
def a_gpu() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip(why_no_cuda_torch())
    yield


def distance(found: Any, wanted: Any) -> float:
    found, wanted = (np.asarray(one, np.float64) for one in (found, wanted))
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-30))


def agree(distances: dict[tuple[str, str], float]) -> None:
    """Nearly all pairs of layer and scheme within 1e-3, none far off; weights alone are never rounded otherwise."""
    rounding = {
        pair: SCHEMES[pair[1]].activation is not None if pair[1] in SCHEMES else True
        for pair in distances
    }
    weights = [d for pair, d in distances.items() if not rounding[pair]]
    both = [d for pair, d in distances.items() if rounding[pair]]
    assert np.quantile(weights, 0.99) < 1e-3 and max(weights) < 2e-2, sorted(weights)[-5:]
    assert np.quantile(both, 0.9) < 1e-3 and max(both) < 0.3, sorted(both)[-5:]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_operators(case: Case) -> None:
    model = model_of(case)
    fed = {
        f"in{i}": x for i, x in enumerate(case.inputs) if x is not None and i not in case.constants
    }
    outputs = []
    for place in (ON_CPU, ON_GPU):
        with compute_on(place):
            graph = TorchGraph(ir.from_proto(model))
            found = graph.run(graph.feed(fed))
            outputs.append([found[name].cpu().numpy() for name in graph.outputs])
    for wanted, found in zip(*outputs, strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [denoiser_graph, awkward_graph, kinds], ids=lambda b: b.__name__)
def test_the_float_graph_and_its_gradients(build: Any) -> None:
    proto = build().model()
    random = np.random.default_rng(0)
    shapes = {
        v.name: [d.dim_value or 2 for d in v.type.tensor_type.shape.dim] for v in proto.graph.input
    }
    arrays = {name: random.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    found = []
    for place in (ON_CPU, ON_GPU):
        with compute_on(place):
            graph = TorchGraph(ir.from_proto(proto))
            names = [name for name in graph.values if name not in graph.read_on_host]
            first = graph.run(graph.feed(arrays), keep=graph.values)
            wanted = [name for name in names if first[name].is_floating_point()][:1]
            values = graph.run(graph.feed(arrays), keep=wanted, differentiate=wanted)
            output = values[graph.outputs[0]]
            assert output.device == place.torch_device()
            (gradient,) = torch.autograd.grad(output.square().sum(), [values[wanted[0]]])
            found.append((output.detach().cpu(), gradient.cpu()))
    for wanted_one, found_one in zip(*found, strict=True):
        assert distance(found_one, wanted_one) < 3 * CLOSE


@pytest.mark.parametrize("tokens", [77, 1024])
@pytest.mark.parametrize("channels", [40, 64, 160])
def test_attention_is_no_less_exact_than_whole_fp32(tokens: int, channels: int) -> None:
    """Its kernel for FP32 sums three products of TF32 for each: far nearer to FP64 than one."""
    generator = torch.manual_seed(0)
    parts = [torch.randn(2, 8, tokens, channels, generator=generator) for _ in range(3)]
    attention = torch.nn.functional.scaled_dot_product_attention
    exact = attention(*(part.double() for part in parts), scale=0.2)
    with compute_on(ON_GPU):
        moved = [part.cuda().requires_grad_() for part in parts]
        found = attention(*moved, scale=0.2)
        gradients = torch.autograd.grad(found.square().sum(), moved)
    leaves = [part.double().requires_grad_() for part in parts]
    wanted = torch.autograd.grad(attention(*leaves, scale=0.2).square().sum(), leaves)
    assert distance(found.detach().cpu(), exact) < EXACT
    for one, other in zip(gradients, wanted, strict=True):
        assert distance(one.cpu(), other) < EXACT


@pytest.mark.parametrize("size", [64, 640])
def test_products_and_convolutions_use_no_tf32(size: int) -> None:
    generator = torch.manual_seed(0)
    x = torch.randn(2, size, 16, 16, generator=generator)
    weight = torch.randn(size, size, 3, 3, generator=generator)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    with compute_on(ON_GPU):
        found = torch.nn.functional.conv2d(x.cuda(), weight.cuda(), padding=1)
        product = weight.reshape(size, -1).cuda() @ weight.reshape(size, -1).T.cuda()
    assert distance(found.cpu(), exact) < EXACT
    flat = weight.reshape(size, -1).double()
    assert distance(product.cpu(), flat @ flat.T) < EXACT


@pytest.fixture(scope="module")
def mixed() -> Setting:
    return setting(kinds(), (4, 7, 6))


@pytest.fixture(scope="module")
def denoiser() -> Setting:
    return setting(denoiser_graph(channels=32, size=8), (3, 8, 8))


@pytest.mark.parametrize("way", ["", "forward", "weights"])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("which", ["mixed", "denoiser"])
def test_probes(
    which: str,
    batch_size: int,
    way: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = request.getfixturevalue(which)
    original = probe_module.project_layer
    monkeypatch.setattr(probe_module, "project_layer", lambda *a: original(*a, way=way))
    options = MeasureSettings(probes=2, calls=3, batch_size=batch_size)
    tables = []
    for place in (ON_CPU, ON_GPU):
        with compute_on(place):
            tables.append(measure_probe(Subject(*case, options, Talk())).projections)
    assert tables[0] is not None and tables[1] is not None
    agree(
        {
            (layer, scheme): distance(tables[1][layer][scheme], vector)
            for layer, row in tables[0].items()
            for scheme, vector in row.items()
        }
    )


def test_channels_and_single_layers(mixed: Setting) -> None:
    form = SCHEMES["w4a16-b32"].weight_form
    bodies = {name: c.weight_matrix(form) for name, c in mixed.candidates.items()}
    recorded = RecordedCalls(mixed.calibration, mixed.spec)
    options = MeasureSettings(calls=3)
    errors, tables = [], []
    for place in (ON_CPU, ON_GPU):
        with compute_on(place):
            errors.append(channel_errors(mixed.graph, bodies, recorded, 3, Talk()))
            tables.append(measure_exhaustive(Subject(*mixed, options, Talk()), use_torch=True))
    for name, wanted in errors[0].items():
        assert distance(errors[1][name], wanted) < 1e-3, name
    agree(
        {
            (layer, scheme): distance(tables[1].losses[layer][scheme], loss)
            for layer, row in tables[0].losses.items()
            for scheme, loss in row.items()
        }
    )


@pytest.mark.parametrize("kind", [E4M3, E2M1], ids=lambda kind: kind.name)
def test_small_floats_round_to_the_same_levels(kind: Any) -> None:
    """Steps are powers of two, which have to be exact on the GPU, too."""
    x = torch.randn(100_000, generator=torch.manual_seed(0)) * torch.logspace(-4, 3, 100_000)
    on_gpu = kind.nearest(x.cuda(), torch).cpu()
    assert torch.equal(on_gpu, kind.nearest(x, torch))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SensitivityTable]:
    """The digits demo's losses, by the device that torch measured on."""
    tables = {}
    for device in ("cpu", "cuda"):
        run = tmp_path_factory.mktemp(device) / "run"
        settings = {"model": "digits", "compute.device": "cpu", "quantize.salience": "kurtosis"}
        recipe = load_recipe("quick", settings)
        with open_pipeline(recipe, run, Talk()) as pipeline:
            pipeline.run_until("candidates")
            place = ON_GPU if device == "cuda" else ON_CPU
            with compute_on(place):
                pipeline.run_until("measure")
        tables[device] = SensitivityTable.load(run / "measure")
    return tables


def test_the_demo_s_losses(measured: dict[str, SensitivityTable]) -> None:
    agree(
        {
            (layer, scheme): distance(measured["cuda"].losses[layer][scheme], loss)
            for layer, row in measured["cpu"].losses.items()
            for scheme, loss in row.items()
        }
    )


@pytest.mark.parametrize("wanted", ["w4a16", "w8a8", "w8a8-dynamic", "w4a8+rows1"])
def test_a_few_steps_of_training(wanted: str, tmp_path: Path) -> None:
    options = RecoverSettings(
        steps=3,
        batch_size=4,
        trajectories=4,
        held_out=4,
        check_every=3,
        rank=4,
        warmup=1,
        precision="float32",
    )
    case = make_case(tmp_path / "case")
    task, found = case.planned(wanted), []
    for name, place in (("cpu", ON_CPU), ("gpu", ON_GPU)):
        with compute_on(place):
            made = recover(task, options, case.recorder(), Talk(), tmp_path / name, name)
            assert made.student.device == place.torch_device()
            found.append(made.recovery)
    assert found[1].before == pytest.approx(found[0].before, rel=1e-2)
    assert found[1].after == pytest.approx(found[0].after, rel=5e-2)
    # It continues from a checkpoint, and in bfloat16.
    with compute_on(ON_GPU):
        more = options.replace(steps=6, precision="auto")
        recover(task, more, case.recorder(), Talk(), tmp_path / "gpu", "gpu")


def test_memory_that_runs_out_is_said_and_the_cpu_goes_on(mixed: Setting) -> None:
    """A real refusal: torch may take next to nothing of the GPU."""
    lines, talk = list[str](), Talk()
    talk.line = lines.append  # type: ignore[method-assign]
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    options = MeasureSettings(probes=2, calls=3, batch_size=3)
    with compute_on(ON_CPU):
        expected = measure_probe(Subject(*mixed, options, Talk())).losses
    try:
        torch.cuda.set_per_process_memory_fraction(1024 / total, 0)
        with compute_on(ON_GPU):
            found = measure_probe(Subject(*mixed, options, talk)).losses
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    assert lines and lines[-1].endswith("the GPU's memory ran out, the rest runs on the CPU")
    for layer, row in expected.items():
        assert found[layer] == pytest.approx(row, rel=1e-2)
