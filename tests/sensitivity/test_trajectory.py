"""Trajectory probes against brute force: the whole sampling loop with a little of one layer's error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from mpq_deploy.calls.loop import (  # noqa: E402
    GuidedDenoiser,
    denoise,
    first_samples,
    initial_noise,
)
from mpq_deploy.calls.recorded import InputCalls  # noqa: E402
from mpq_deploy.calls.sampler import make_sampler  # noqa: E402
from mpq_deploy.calls.sampler_tape import sampler_tape  # noqa: E402
from mpq_deploy.calls.trajectories import cycled_rows  # noqa: E402
from mpq_deploy.graph.layers import layer_graph  # noqa: E402
from mpq_deploy.models.spec import InputSpec  # noqa: E402
from mpq_deploy.onnx_torch.torch_graph import TorchGraph  # noqa: E402
from mpq_deploy.recipe import MeasureSettings  # noqa: E402
from mpq_deploy.sensitivity import probe as probe_module  # noqa: E402
from mpq_deploy.sensitivity import trajectory as trajectory_module  # noqa: E402
from mpq_deploy.sensitivity.layer_weights import form_stack, input_roundings  # noqa: E402
from mpq_deploy.sensitivity.measure import measure  # noqa: E402
from mpq_deploy.sensitivity.subject import Sampling, Subject, timestep_of  # noqa: E402
from mpq_deploy.sensitivity.torch_projection import lost_by_rounding  # noqa: E402
from mpq_deploy.sensitivity.trajectory import (  # noqa: E402
    drawn_probes,
    measure_trajectory,
    measured_products,
)
from mpq_deploy.system.progress import Talk  # noqa: E402
from tests.graphs import GraphBuilder  # noqa: E402
from tests.sensitivity.cases import Setting, setting  # noqa: E402

pytestmark = pytest.mark.torch
STEPS, GUIDANCE = 4, 2.5
BETAS = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
SAMPLERS = {
    "ddim, guidance": ({"_class_name": "DDIMScheduler", **BETAS}, GUIDANCE),
    "euler": ({"_class_name": "EulerDiscreteScheduler", **BETAS}, 1.0),
    "ancestral noise": ({"_class_name": "EulerAncestralDiscreteScheduler", **BETAS}, 1.0),
    "multistep, guidance": ({"_class_name": "DPMSolverMultistepScheduler", **BETAS}, GUIDANCE),
    "corrected multistep": ({"_class_name": "UniPCMultistepScheduler", **BETAS}, 1.0),
    "two calls a step": ({"_class_name": "HeunDiscreteScheduler", **BETAS}, 1.0),
    "sample, clipped": (
        {
            "_class_name": "DDPMScheduler",
            "prediction_type": "sample",
            "clip_sample": True,
            "clip_sample_range": 0.5,
        },
        1.0,
    ),
    "clipped pixels": ({"_class_name": "DDIMScheduler", **BETAS, "clip_sample": False}, 1.0),
}


def conditioned() -> GraphBuilder:
    """A denoiser of 2x4x4 samples with a condition of two numbers and a smooth nonlinearity."""
    g = GraphBuilder(seed=3)
    g.input("sample", ["N", 2, 4, 4])
    g.input("timestep", ["N"])
    g.input("condition", ["N", 2])
    axes = g.weight("axes1", np.array([1], np.int64))
    slow = g.weight("slow", np.array([[1e-3]], np.float32))
    time = g.op("Mul", [g.op("Unsqueeze", ["timestep", axes], "column"), slow], "time")
    both = g.op("Concat", [time, "condition"], "both", axis=1)
    shift = g.op("Tanh", [g.gemm(both, "embed", 6, 3)], "tanh_embed")
    axes23 = g.weight("axes23", np.array([2, 3], np.int64))
    x = g.conv("sample", "first", 6, 2)
    x = g.op("Tanh", [g.op("Add", [x, g.op("Unsqueeze", [shift, axes23], "shift")], "add")], "tanh")
    x = g.op("Add", [g.conv(x, "middle", 6, 6), x], "skip")
    g.conv(x, "last", 2, 6)
    g.nodes[-1].output[0] = "out_sample"
    g.output("out_sample", ["N", 2, 4, 4])
    return g


@dataclass(frozen=True)
class Case:
    """A model that is sampled, and what is measured of it."""

    setting: Setting
    subject: Subject

    @property
    def rows(self) -> Any:
        subject = self.subject
        count, seed = subject.settings.calls, subject.settings.seed
        return cycled_rows(subject.spec, dict(subject.sampling.conditions), count, seed)

    def images(self, denoiser: Callable[..., Any]) -> Any:
        """Sample all trajectories by the loop that evaluation has; clip to the range of pixels."""
        subject = self.subject
        spec, conditions = subject.spec, dict(subject.sampling.conditions)
        model = GuidedDenoiser(denoiser, spec, conditions)
        sampler = make_sampler(spec.scheduler, STEPS, subject.settings.seed)
        noise = first_samples(spec, self.rows, conditions, subject.settings.seed)
        final = denoise(model, sampler, noise, self.rows, 16).astype(np.float64)
        low, high = spec.pixel_range
        return np.clip((final - low) / (high - low), 0, 1)


@pytest.fixture(scope="module", params=list(SAMPLERS))
def case(request: pytest.FixtureRequest) -> Case:
    high = 1.0 if request.param == "clipped pixels" else 50.0
    return made(*SAMPLERS[request.param], high)


@pytest.fixture
def every_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of random probes an orthogonal basis, whose mean square is the expectation."""
    basis = np.sqrt(32) * np.eye(32, dtype=np.float32).reshape(32, 1, 2, 4, 4)
    monkeypatch.setattr(
        trajectory_module,
        "drawn_probes",
        lambda seed, numbers, shape: basis.repeat(len(numbers), 1),
    )


def made(scheduler: dict[str, Any], guidance: float, high: float = 2.0, **options: int) -> Case:
    """The tiny model under a sampler: its activations are observed at single calls, whose condition is 0."""
    own = setting(_without_condition(), (2, 4, 4))
    whole = setting_of(conditioned(), own)
    spec = whole.spec.model_copy(
        update={
            "scheduler": scheduler,
            "conditions": (InputSpec(name="condition", shape=(2,)),),
            "guidance_scale": guidance,
            "uncond_row": 0,
            "pixel_range": (-high, high),
        }
    )
    whole = replace(whole, spec=spec)
    conditions = {"condition": np.float32([[0, 0], [1, -1], [-0.5, 2]])}
    sampled = Sampling(conditions, STEPS, "auto")
    settings = MeasureSettings(calls=3, **{"batch_size": 8, "probes": 32, **options})
    return Case(whole, Subject(*whole, settings, Talk(), sampling=sampled))


def _without_condition() -> GraphBuilder:
    builder = conditioned()
    builder.inputs = builder.inputs[:2]
    builder.weight("condition", np.zeros((3, 2), np.float32))
    return builder


def setting_of(builder: GraphBuilder, observed: Setting) -> Setting:
    """The graph with its condition, the calls of another's inputs beside a condition of zeros."""
    model = builder.model()
    graph = layer_graph(ir.from_proto(model))
    calls = observed.calibration
    steps = (len(calls.timesteps), calls.count)
    given = InputCalls(np.zeros((1, 2), np.float32), np.zeros(steps, np.int64))
    calibration = replace(calls, inputs={**calls.inputs, "condition": given})
    return replace(observed, graph=graph, calibration=calibration, model=model)


def with_error(case: Case, layer: Any, scheme: Any, share: float) -> Callable[..., Any]:
    """The denoiser in float64 with ``share`` of a layer's errors: of its weight, and of its input's rounding."""
    subject = case.subject
    graph = TorchGraph(subject.graph.model, torch.float64)
    stack = form_stack(subject.candidates[layer.name].weight, subject.candidates[layer.name])
    difference = stack.difference(scheme.name)
    lost = torch.from_numpy(difference if layer.out_axis == 0 else difference.T.copy())
    lost = share * lost.reshape(layer.weight_shape).double()

    def denoiser(sample: Any, timestep: float, conditions: dict[str, Any]) -> Any:
        feeds = {
            "sample": sample,
            "timestep": np.full(len(sample), timestep, np.float32),
            **conditions,
        }
        given = {name: torch.from_numpy(value).double() for name, value in feeds.items()}

        def change(use: Any) -> Callable[[list[Any]], list[Any]]:
            found = input_roundings(subject.stats, use, [scheme]).values()

            def rewired(inputs: list[Any]) -> list[Any]:
                x, weight, *rest = inputs
                for rounding in found:
                    now = rounding.at(timestep_of(subject.spec, feeds))
                    x = x - share * lost_by_rounding(x.float(), now, layer).double()
                return [x, weight + lost, *rest]

            return rewired

        rewire = {use.node: change(use) for use in layer.uses}
        # Schedulers draw noise in the type of the output.
        return graph.run(given, rewire=rewire)["out_sample"].float().numpy()

    return denoiser


@pytest.mark.usefixtures("every_direction")
def test_losses_are_what_the_error_does_to_the_final_images(case: Case) -> None:
    """Central differences along the loop: all steps at once, with their signs, and the later ones' response.

    What an input's rounding loses depends on the input; where it moves the error is not smooth, so
    roundings are compared on the float trajectory by ``test_errors_of_steps_are_added`` instead.
    """
    table = measured_products(case.subject).table(apart=False)
    power = np.square(case.images(with_error(case, *_pair(case, "first", "w8a16"), 0.0))).sum()
    for name in ("embed", "first", "middle", "last"):
        for scheme in ("w4a16-b32", "w8a16", "w4a16-b32+rows1"):
            if scheme not in table.losses[name]:
                continue
            pair = _pair(case, name, scheme)
            # Samples are in float32, so of small errors a larger part is taken.
            size = 0.2 if scheme == "w8a16" else 0.02
            up, down = (case.images(with_error(case, *pair, sign * size)) for sign in (1, -1))
            wanted = np.square((up - down) / (2 * size)).sum() / power
            # Some pixels meet the clipping within the difference.
            assert table.losses[name][scheme] == pytest.approx(wanted, rel=0.05), (name, scheme)


def _pair(case: Case, name: str, scheme: str) -> tuple[Any, Any]:
    layer = next(n for n in case.subject.graph.layers if n.name == name)
    schemes = case.subject.candidates[name].schemes
    return layer, next(s for s in schemes if s.name == scheme)


def test_errors_of_steps_are_added() -> None:
    """Rounded inputs as well: products of steps taken one by one by autograd through the whole trajectory."""
    case = made(*SAMPLERS["multistep, guidance"], probes=2)
    subject = case.subject
    products = measured_products(subject)
    table = products.table(apart=False)
    graph = TorchGraph(subject.graph.model, torch.float64)
    conditions, spec = dict(subject.sampling.conditions), subject.spec
    rows = np.concatenate([np.zeros_like(case.rows), case.rows])
    sampler = make_sampler(spec.scheduler, STEPS, subject.settings.seed)
    noise = first_samples(spec, case.rows, conditions, subject.settings.seed)

    def feeds(step: int, given: Any) -> dict[str, Any]:
        times = np.full(len(given), sampler.timesteps[step])
        return {
            "sample": given,
            "timestep": torch.from_numpy(times).double(),
            "condition": torch.from_numpy(conditions["condition"][rows]).double(),
        }

    samples: list[Any] = []

    def model(step: int, given: Any) -> Any:
        samples.append(torch.from_numpy(given))
        fed = feeds(step, samples[-1].double())
        return graph.run(fed)["out_sample"].float().numpy()

    tape = sampler_tape(spec, sampler, noise, model)
    low, high = spec.pixel_range
    image = ((tape.final - low) / (high - low)).clip(0, 1)
    layer, scheme = _pair(case, "middle", "w8a8-timestep")
    use = layer.uses[0]
    difference = torch.from_numpy(
        form_stack(subject.candidates["middle"].weight, subject.candidates["middle"]).difference(
            scheme.name
        )
    )
    weight = torch.from_numpy(subject.candidates["middle"].weight)
    total = np.zeros((2, 3))
    for number in range(3):
        seed = np.random.default_rng((subject.settings.seed, 0x7261, number))
        for p, r in enumerate(seed.standard_normal((2, *image.shape[1:]), np.float32)):
            end = torch.zeros_like(image)
            end[number] = torch.from_numpy(r)
            (end,) = torch.autograd.grad(image, [tape.final], [end], retain_graph=True)

            def through(step: int, wanted: Any, p: int = p, number: int = number) -> Any:
                fed = samples[step].double().requires_grad_()
                run = graph.run(feeds(step, fed), keep=[use.input, use.output])
                back, gradient = torch.autograd.grad(
                    run["out_sample"], [fed, run[use.output]], [wanted[0].double()]
                )
                x = run[use.input].detach().float()
                (rounding,) = input_roundings(subject.stats, use, [scheme]).values()
                lost = lost_by_rounding(x, rounding.at(float(sampler.timesteps[step])), layer)
                shape = layer.weight_shape
                error = torch.nn.functional.conv2d(x, difference.reshape(shape), padding=1)
                error -= torch.nn.functional.conv2d(lost, weight.reshape(shape), padding=1)
                total[p, number] += float((error.double() * gradient).sum())
                return {"sample": [back.float()]}

            tape.back([end], through)
    found = table.projections["middle"][scheme.name].reshape(2, 3)
    wanted = total / np.sqrt(6) / np.sqrt(float(image.detach().double().square().sum()) / 3)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6 * np.abs(wanted).max())
    # A plan is chosen by half of that and half of what steps do alone, and images predicted by the sums.
    both, steps = measure_trajectory(subject), products.values["middle"][scheme.name]
    alone = np.square(steps, dtype=np.float64).sum(0).mean() / products.power.mean()
    together = table.losses["middle"][scheme.name]
    loss = both.losses["middle"][scheme.name]
    assert loss == pytest.approx((together + alone) / 2, rel=1e-4)
    assert both.image_losses()["middle"][scheme.name] == pytest.approx(together, rel=1e-4)
    plan = {"middle": scheme.name}
    errors = both.image_errors(both.plan_entries(plan))
    np.testing.assert_allclose(errors, table.errors_by_call(table.plan_entries(plan)), rtol=1e-4)
    halved = both.weighing(np.array([1.0, 0.5, 2.0])).image_errors
    entries = both.weighing(np.array([1.0, 0.5, 2.0])).plan_entries(plan)
    np.testing.assert_allclose(halved(entries), errors * [1.0, 0.5, 2.0], rtol=1e-4)


def test_probes_are_independent_of_the_noise_that_trajectories_begin_with() -> None:
    drawn = drawn_probes(2, range(5, 8), (3, 2, 16, 16))
    noise = initial_noise(made(*SAMPLERS["euler"]).subject.spec, 8, 2)[5:]
    assert drawn.shape == (3, 3, 2, 16, 16)
    for number in range(3):
        flat = drawn[:, number].reshape(-1)
        assert abs(flat[: noise[number].size] @ noise[number].reshape(-1)) < 25
    np.testing.assert_array_equal(drawn[:, 1], drawn_probes(2, range(6, 7), (3, 2, 16, 16))[:, 0])


def test_batches_and_parts_of_the_graph_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure_trajectory(made(*SAMPLERS["ddim, guidance"], probes=2).subject)
    small = made(*SAMPLERS["ddim, guidance"], probes=2, batch_size=2).subject
    few = measure_trajectory(small)
    monkeypatch.setattr(probe_module, "MEMORY_BYTES", 1)
    parts = measure_trajectory(small)
    for layer, row in whole.projections.items():
        for scheme, vector in row.items():
            for other in (few, parts):
                error = np.linalg.norm(other.projections[layer][scheme] - vector)
                assert error <= 1e-4 * np.linalg.norm(vector) + 1e-9, (layer, scheme)


@pytest.mark.parametrize("why", ["recorded", "unknown", "thresholding"])
def test_without_a_sampler_single_outputs_are_measured_and_it_is_said(why: str) -> None:
    scheduler = {**SAMPLERS["ddim, guidance"][0], "thresholding": why == "thresholding"}
    subject = made(scheduler, 1.0, probes=2).subject
    if why == "recorded":
        subject = replace(subject, spec=subject.spec.model_copy(update={"recorded": True}))
    if why == "unknown":
        subject = replace(subject, sampling=None)
    table = measure("trajectory", subject)
    expected = measure("probe", subject)
    assert table.metric == "probe" and table.losses == expected.losses
    assert any("single outputs, not of final images" in note for note in table.notes)
