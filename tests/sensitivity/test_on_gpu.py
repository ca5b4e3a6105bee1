"""Probes on a GPU that only computes shapes: one device, nothing fetched but the results; memory that runs out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mpq_deploy.calls.recorded import RecordedCalls  # noqa: E402
from mpq_deploy.formats.minifloat import E2M1, E4M3  # noqa: E402
from mpq_deploy.formats.scheme import SCHEMES  # noqa: E402
from mpq_deploy.onnx_torch import torch_graph  # noqa: E402
from mpq_deploy.recipe import MeasureSettings  # noqa: E402
from mpq_deploy.sensitivity import probe as probe_module  # noqa: E402
from mpq_deploy.sensitivity.exhaustive import measure_exhaustive  # noqa: E402
from mpq_deploy.sensitivity.probe import measure_probe  # noqa: E402
from mpq_deploy.sensitivity.salience import channel_errors  # noqa: E402
from mpq_deploy.sensitivity.subject import Subject  # noqa: E402
from mpq_deploy.system.compute import Compute, compute_on, computing_on  # noqa: E402
from mpq_deploy.system.progress import Talk  # noqa: E402
from tests.fake_gpu import CPU, GPU, fake_gpu  # noqa: E402
from tests.graphs import denoiser_graph  # noqa: E402
from tests.sensitivity.cases import Setting, setting  # noqa: E402
from tests.sensitivity.kinds import kinds  # noqa: E402

pytestmark = pytest.mark.torch
STEPS, CALLS = 2, 2


@pytest.fixture(scope="module")
def mixed() -> Setting:
    return setting(kinds(), (4, 7, 6), STEPS, CALLS)


@pytest.fixture(scope="module")
def denoiser() -> Setting:
    return setting(denoiser_graph(channels=16, size=8), (3, 8, 8), STEPS, CALLS)


class Said(Talk):
    def __init__(self) -> None:
        self.lines = list[str]()

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize("way", ["", "forward", "weights"])
@pytest.mark.parametrize("free", [64 << 30, 30_000])
@pytest.mark.parametrize("which", ["mixed", "denoiser"])
def test_probes_fetch_their_results_and_no_more(
    which: str,
    free: int,
    way: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Per batch the output's power and the products; before, whether values are finite and apart."""
    case = request.getfixturevalue(which)
    original = probe_module.project_layer
    monkeypatch.setattr(probe_module, "project_layer", lambda *a: original(*a, way=way))
    gradients, cut = probe_module.layer_gradients, set[int]()

    def counting(graph: Any, feeds: Any, parts: Any, *rest: Any) -> Any:
        cut.add(len(parts))
        return gradients(graph, feeds, parts, *rest)

    monkeypatch.setattr(probe_module, "layer_gradients", counting)
    options = MeasureSettings(probes=2, calls=CALLS, batch_size=1)
    with fake_gpu(monkeypatch, free) as gpu:
        table = measure_probe(Subject(*case, options, Talk()))
    assert max(cut) > 2 if free < 1 << 20 else cut == {1}
    assert gpu.fetched <= 2 * STEPS * CALLS + 1
    assert set(table.losses) == {layer.name for layer in case.graph.layers}


def test_channels_and_single_layers_fetch_once(
    mixed: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = SCHEMES["w4a16-b32"].weight_form
    bodies = {name: c.weight_matrix(form) for name, c in mixed.candidates.items()}
    recorded = RecordedCalls(mixed.calibration, mixed.spec)
    with fake_gpu(monkeypatch) as gpu:
        found = channel_errors(mixed.graph, bodies, recorded, CALLS, Talk())
        assert gpu.fetched == STEPS
    assert set(found) == set(bodies)
    options = MeasureSettings(calls=CALLS, batch_size=CALLS)
    with fake_gpu(monkeypatch) as gpu:
        measure_exhaustive(Subject(*mixed, options, Talk()), use_torch=True)
    assert gpu.fetched == STEPS * (1 + len(mixed.graph.layers))


@pytest.mark.parametrize("kind", [E4M3, E2M1], ids=lambda kind: kind.name)
def test_small_floats_round_where_they_are(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu(monkeypatch) as gpu:
        assert kind.nearest(torch.randn(8, 16, device=GPU), torch).device == GPU
        assert gpu.fetched == 0


def probes(case: Setting, options: MeasureSettings, talk: Talk) -> dict[str, dict[str, Any]]:
    found = measure_probe(Subject(*case, options, talk)).projections
    assert found is not None
    return found


@pytest.mark.parametrize("fails", [1, 3, 99])
def test_where_memory_runs_out_less_is_computed_at_once(
    mixed: Setting, fails: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First fewer calls, then parts of the graph, then the CPU: the same numbers."""
    options = MeasureSettings(probes=2, calls=CALLS, batch_size=CALLS)
    expected, talk = probes(mixed, options, Talk()), Said()
    original, left = probe_module.layer_gradients, [fails]

    def refusing(graph: Any, *rest: Any) -> Any:
        if graph.refuses and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(graph, *rest)

    monkeypatch.setattr(Compute, "torch_device", lambda _: CPU)
    monkeypatch.setattr(probe_module, "layer_gradients", refusing)

    class Marked(torch_graph.TorchGraph):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.refuses = computing_on().torch is not None

    monkeypatch.setattr(probe_module, "TorchGraph", Marked)
    with compute_on(Compute(None, 0)):
        found = probes(mixed, options, talk)
    for layer, row in expected.items():
        for scheme, vector in row.items():
            error = np.linalg.norm(found[layer][scheme] - vector)
            assert error <= 1e-3 * np.linalg.norm(vector) + 1e-9, (layer, scheme)
    assert all("probes: the GPU's memory ran out, " in line for line in talk.lines)
    assert [line.endswith("the rest runs on the CPU") for line in talk.lines].count(True) == (
        fails == 99
    )
    assert len(talk.lines) >= min(fails, 3)
