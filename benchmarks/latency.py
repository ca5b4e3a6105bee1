"""What Stable Diffusion 1.5 and SDXL are estimated to take per call: by rules and by ours, on six targets.

    python benchmarks/latency.py [MODEL ...] --page docs/results/latency.md

MODEL is one of 860M (Stable Diffusion 1.5 at 64 x 64) and 2570M (SDXL at 128 x 128); by default both. The UNets have
their true shapes and no weights: every parameter is one number, so that a graph takes neither minutes nor gigabytes.
Times are the package's own roofline, at the default batch; nothing is built or measured. The error of a scheme is that
of a random Gaussian weight and input, the same for every layer, so errors only keep the solver from the smallest
and fastest scheme everywhere. Ours has neither branches nor ranges that move here, which a build also has. The
checks say for each target whether ours at half of the bytes is faster than FP16, and whether a rule is both smaller
and faster than a plan of ours with no more error; the exit code is 1 when one fails.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
from scale_models import SIZES, Size, unet_config
from table import Page, bench_parser, markdown, verdict

from mpq_deploy.allocate.milp import Allocation, allocate, fastest_plan, limited
from mpq_deploy.allocate.plan_solver import layer_choices, timed_problem
from mpq_deploy.allocate.problem import Problem, protected_schemes
from mpq_deploy.calibrate.scales import activation_scale
from mpq_deploy.calibrate.stats import ActivationStats
from mpq_deploy.engine.target import Target, load_target
from mpq_deploy.errors import InfeasibleBudgetError, UsageError
from mpq_deploy.formats.candidates import choices_for, round_candidates
from mpq_deploy.formats.layer_rounding import InputMoments
from mpq_deploy.formats.scheme import FP16, SCHEMES, Scheme, schemes_named
from mpq_deploy.formats.sizes import FP16_BYTES
from mpq_deploy.graph.layers import Layer, LayerGraph, layer_graph
from mpq_deploy.graph.shapes import inferred_shapes
from mpq_deploy.latency.conv_products import with_products
from mpq_deploy.latency.costs import LatencyCosts
from mpq_deploy.models.spec import InputSpec
from mpq_deploy.models.torch_export import TorchNetwork
from mpq_deploy.recipe import AllocateSettings, Recipe, load_recipe
from mpq_deploy.rounding.control_schemes import (
    CONTROLS,
    SIMULATED_TWIN,
    STATIC_INT8,
    control_plans,
    rank_refusal,
    tensor_ranks,
)
from mpq_deploy.rounding.quantizers import Rounding
from mpq_deploy.system.progress import PlainTalk

MODELS = {"860M": ("Stable Diffusion 1.5", 64), "2570M": ("SDXL", 128)}
TARGETS = (
    "jetson-orin-nano",
    "jetson-agx-orin",
    "jetson-thor-jp7",
    "rtx",
    "rtx-ada",
    "rtx-blackwell",
)
BUDGETS = (0.35, 0.5)
OBJECTIVES = ("balanced", "quality", "latency")
# Every parameter is this number: 0 and 1 would be folded away.
FILL = 0.37
# A weight and an input from which the errors of schemes are measured.
ROWS, COLUMNS, SAMPLES = 256, 1280, 1024
# What the solver may take per plan: estimates need no proof of the last tenth of a percent.
GAP, SECONDS = 2e-3, 4.0
# Sums of floats in another order.
EQUAL = 1 + 1e-9
ABOUT = """**Every time here is an estimate**: the roofline that [plans use](../latency.md), from peak figures that no
kernel reaches. Nothing was built or measured. Weights are random Gaussian numbers and each layer counts alike, so the
errors mean nothing for images: only times and bytes are meant, and errors keep the solver from what is fastest at any
price. Last column of a rule: the fastest plan of ours that is neither larger nor has more error.

FP4 is NVFP4 for products, and FP8 for convolutions and where it is not possible. "NVIDIA's rule" is NVFP4 for products
but q, k and v, which stay FP16, and FP8 for convolutions ([controls](../targets.md#controls)). Ours has neither
branches nor ranges that move here. Layers that a target protects (`conv_in` and `conv_out` of TensorRT 10 and 11) stay
FP16 in ours."""


def unet_graph(size: Size, latent: int) -> LayerGraph:
    """Export a UNet of the true shapes, of which no parameter takes memory."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        module = UNet2DConditionModel(**unet_config(size, latent))
    for part in module.modules():
        for name, value in list(part._parameters.items()):
            if value is not None:
                filled = torch.full((1,) * value.dim(), FILL).expand(value.shape)
                part._parameters[name] = torch.nn.Parameter(filled, requires_grad=False)

    def call(unet: Any, sample: Any, timestep: Any, text: Any, *added: Any) -> Any:
        more = dict(zip(("text_embeds", "time_ids"), added)) or None
        return unet(sample, timestep, text, added_cond_kwargs=more, return_dict=False)[0]

    inputs = [InputSpec(name=name, shape=shape) for name, shape in input_shapes(size, latent)]
    model = TorchNetwork(module, inputs, "out_sample", call).to_onnx(PlainTalk())
    # Shapes alone are looked at from here on.
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.size > 1024:
            value.const_value = ir.ExternalTensor(
                "none", 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=value.name or ""
            )
    return layer_graph(model)


def input_shapes(size: Size, latent: int) -> list[tuple[str, tuple[int, ...]]]:
    """Return the inputs' names and shapes without the batch."""
    shapes: list[tuple[str, tuple[int, ...]]] = [("sample", (4, latent, latent)), ("timestep", ())]
    shapes.append(("encoder_hidden_states", (77, size.text)))
    return [*shapes, ("text_embeds", (1280,)), ("time_ids", (6,))] if size.sdxl else shapes


def scheme_errors(schemes: list[Scheme]) -> dict[str, float]:
    """Return the expected relative squared error of a product under each scheme, for Gaussian weight and input."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((ROWS, COLUMNS), np.float32)
    values = random.standard_normal((SAMPLES, COLUMNS), np.float32)
    layer = Layer("l", "Gemm", "w", weight.shape, 0, 1, ())
    moments = InputMoments(np.ones((COLUMNS, 1, 1)), (1,) * COLUMNS)
    stats = gaussian_stats(values)
    found = {}
    for scheme in schemes:
        choices = choices_for(layer, (scheme,), lambda *_: "")
        rounded = round_candidates(layer, choices, weight, moments, Rounding(False, 0.05))
        error = relative(weight, rounded.weight_matrix(scheme.weight_form))
        if scheme.activation:
            error += relative(values, scheme.input_grid(stats).rounded(values, np))
        found[scheme.name] = error
    return found


def gaussian_stats(values: np.ndarray[Any, Any]) -> ActivationStats:
    """Return what calibration would know of ``values`` [N, C]."""
    amax = np.abs(values).max(axis=0).astype(np.float64)
    scale = activation_scale("mse", values.ravel()[:8192], float(amax.max()), values.size)
    squares, none = np.square(values, dtype=np.float64), np.empty(0)
    return ActivationStats(
        amax=amax,
        second_moment=squares.mean(axis=0),
        fourth_moment=np.square(squares).mean(axis=0),
        reservoir=values.ravel()[:8192],
        amax_by_timestep=amax[None].astype(np.float32),
        scale=scale,
        outliers=none.astype(np.int32),
        scales_without=none,
        factors=np.empty((0, values.shape[1]), np.float16),
        scales_rescaled=none,
        count=float(values.size),
        timesteps=none.astype(np.float32),
        exponents=none.astype(np.int32),
    )


def relative(exact: np.ndarray[Any, Any], rounded: np.ndarray[Any, Any]) -> float:
    return float(np.mean(np.square(exact - rounded)) / np.mean(np.square(exact)))


@dataclass(frozen=True)
class Plan:
    """A plan with its bytes, its error of random weights, and its nanoseconds."""

    title: str
    size: int
    loss: float
    nanoseconds: int

    def beats(self, other: Plan) -> bool:
        """Whether it is smaller and faster with no more error."""
        better = self.size < other.size and self.nanoseconds < other.nanoseconds
        return better and self.loss <= other.loss * EQUAL


class Case:
    """One model on one target: its rules, and the solver's plans."""

    def __init__(self, graph: LayerGraph, shapes: Mapping[int, Any], recipe: Recipe) -> None:
        self.target: Target = load_target(recipe.target)
        usual, largest = shapes[recipe.engine.batch_opt], shapes[recipe.engine.batch_max]
        self.graph = with_products(graph, self.target, usual, largest)
        self.layers = self.graph.layers
        self.costs = LatencyCosts(self.graph, usual, self.target, recipe.engine.batch_opt)
        self.section = recipe.allocate
        weights = {layer.weight for layer in self.layers}
        others = [
            v.const_value for v in graph.model.graph.initializers.values() if v.name not in weights
        ]
        self.fixed = sum(
            FP16_BYTES * t.size if t.dtype.is_floating_point() else t.nbytes
            for t in others
            if t is not None
        )
        self.rules = {
            "fp16": {layer.name: FP16 for layer in self.layers},
            **{n: p for n, p in control_plans(self.graph, self.target).items() if n != STATIC_INT8},
        }
        self._least: dict[int, Allocation] = {}

    @cached_property
    def allowed(self) -> dict[str, tuple[str, ...]]:
        """What the solver may choose from: the recipe's schemes where the target takes them."""
        ranks = tensor_ranks(self.graph)

        def refusal(layer: Layer, scheme: Scheme) -> str:
            return self.target.refusal(layer, scheme) or rank_refusal(layer, scheme, ranks)

        wanted = schemes_named(self.section.schemes)
        names = [
            (layer.name, tuple(s.name for s in choices_for(layer, wanted, refusal).schemes))
            for layer in self.layers
        ]
        return protected_schemes(names, [(pattern, ("fp16",)) for pattern in self.target.protected])

    @cached_property
    def losses(self) -> dict[str, dict[str, float]]:
        """Layer -> scheme -> loss: every layer counts alike."""
        used = {SCHEMES[name] for names in self.allowed.values() for name in names}
        used |= {scheme for plan in self.rules.values() for scheme in plan.values()}
        errors = scheme_errors(sorted(used - {FP16}, key=lambda scheme: scheme.name))
        each = {name: error / len(self.layers) for name, error in {"fp16": 0.0, **errors}.items()}
        return {layer.name: each for layer in self.layers}

    @cached_property
    def problem(self) -> Problem:
        """The solver's problem, without a budget."""
        choices = layer_choices(self.layers, self.allowed, self.losses, self.costs)
        return timed_problem(self.layers, self.costs, Problem(choices, self.fixed, 0))

    @property
    def fp16_size(self) -> int:
        """Bytes of all constants in FP16."""
        return self.fixed + FP16_BYTES * sum(layer.weights for layer in self.layers)

    def rule(self, name: str) -> Plan:
        """Return what a rule gives."""
        schemes = {layer: scheme.name for layer, scheme in self.rules[name].items()}
        names = {layer: (scheme,) for layer, scheme in schemes.items()}
        choices = layer_choices(self.layers, names, self.losses, self.costs)
        whole = Problem(choices, self.fixed, 0)
        title = (
            CONTROLS[name].title.removesuffix(SIMULATED_TWIN)
            if name in CONTROLS
            else "Everything FP16"
        )
        time = self.costs.plan_ns(self.layers, self.rules[name])
        return Plan(title, whole.plan_bytes(schemes), whole.plan_loss(schemes), time)

    def ours(self, budget: float, objective: str) -> Plan:
        """Return the solver's plan within ``budget`` of FP16's bytes."""
        section = self.section.replace(objective=objective)
        problem = replace(self.problem, budget_bytes=int(budget * self.fp16_size))
        problem = limited(problem, section, lambda one: self._least_error(one, section))
        found = (
            self._least_error(problem, section)
            if problem.max_latency_ns is None
            else allocate(problem, section)
        )
        return self._plan(f"ours, {budget:g}, {objective}", problem, found.schemes)

    def as_good(self, rule: Plan) -> Plan | None:
        """Return the fastest plan that is neither larger nor worse than ``rule``; None without one."""
        limits = {"budget_bytes": rule.size, "max_loss": rule.loss * EQUAL}
        problem = replace(self.problem, **limits)  # type: ignore[arg-type]
        try:
            return self._plan("", problem, fastest_plan(problem, self.section))
        except (UsageError, InfeasibleBudgetError):
            return None

    def _least_error(self, problem: Problem, section: AllocateSettings) -> Allocation:
        """Solve without a limit on time, once per budget."""
        if problem.budget_bytes not in self._least:
            self._least[problem.budget_bytes] = allocate(problem, section)
        return self._least[problem.budget_bytes]

    def _plan(self, title: str, problem: Problem, schemes: Mapping[str, str]) -> Plan:
        time = problem.plan_ns(schemes)
        return Plan(title, problem.plan_bytes(schemes), problem.plan_loss(schemes), time)


def compare(case: Case) -> tuple[str, list[tuple[bool, str]]]:
    """Return the table of one model on one target, and its checks."""
    fp16, *rules = (case.rule(name) for name in case.rules)
    ours = [case.ours(budget, objective) for budget in BUDGETS for objective in OBJECTIVES]
    beside = {rule.title: case.as_good(rule) for rule in rules}
    rows = []
    for plan in (fp16, *rules, *ours):
        as_good = beside.get(plan.title)
        rows.append(
            [
                plan.title,
                f"{plan.size / case.fp16_size:.4f}",
                f"{plan.loss:.2e}",
                f"{plan.nanoseconds / 1e6:.3f}",
                f"{plan.nanoseconds / fp16.nanoseconds:.2f}",
                f"{as_good.nanoseconds / 1e6:.3f}" if as_good else "",
            ]
        )
    header = (
        "",
        "of FP16",
        "error, random weights",
        "ms, estimated",
        "of FP16's",
        "ours as small and good, ms",
    )
    return markdown(header, rows), list(checks_of(case, fp16, rules, ours, beside))


def checks_of(
    case: Case, fp16: Plan, rules: list[Plan], ours: list[Plan], beside: Mapping[str, Plan | None]
) -> Iterator[tuple[bool, str]]:
    """Yield the verdicts on one model and target."""
    half = [plan for plan in ours if f" {BUDGETS[-1]:g}," in plan.title]
    passed = half[0].nanoseconds < fp16.nanoseconds
    said = f"{'yes' if passed else 'no'}, of its time: " + ", ".join(
        f"{plan.title.rsplit(', ')[-1]} {plan.nanoseconds / fp16.nanoseconds:.2f}" for plan in half
    )
    where = case.target.name
    yield passed, verdict(passed, f"{where}: ours at {BUDGETS[-1]:g} is faster than FP16", said)
    beaten = [
        f"{rule.title} beats {plan.title}" for rule in rules for plan in ours if rule.beats(plan)
    ]
    slower = [
        f"{rule.title} is faster than any plan of ours as small and good"
        for rule in rules
        if (one := beside[rule.title]) is None or one.nanoseconds > rule.nanoseconds * (1 + GAP)
    ]
    wrong = [*beaten, *slower]
    what = f"{where}: no rule is both smaller and faster at equal error"
    said = "; ".join(["no", *wrong]) if wrong else f"yes, none of {len(rules)}"
    yield not wrong, verdict(not wrong, what, said)


def main() -> None:
    parser = bench_parser(__doc__, recipe=False)
    parser.add_argument("models", nargs="*", default=[*MODELS], help="860M, 2570M")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="what HiGHS may take per program"
    )
    chosen = parser.parse_args()
    page = Page("Estimated times of Stable Diffusion 1.5 and SDXL")
    page.say(ABOUT)
    checks = []
    for name in chosen.models:
        title, latent = MODELS[name]
        graph = unet_graph(SIZES[name], latent)
        layers, weights = len(graph.layers), sum(layer.weights for layer in graph.layers)
        page.save(chosen.page)
        page.say(
            f"## {title}\n\n{layers} layers of {weights / 1e6:,.0f} M weights, latent {latent} x {latent}."
        )
        for target in chosen.targets.split(","):
            recipe = load_recipe(
                None,
                {
                    "target": target,
                    "allocate.gap": GAP,
                    "allocate.time_limit": chosen.seconds,
                },
            )
            batches = {recipe.engine.batch_opt, recipe.engine.batch_max}
            shapes = {
                batch: inferred_shapes(
                    ir.to_proto(graph.model),
                    {n: (batch, *shape) for n, shape in input_shapes(SIZES[name], latent)},
                )
                for batch in batches
            }
            case = Case(graph, shapes, recipe)
            table, found = compare(case)
            page.say(
                f"### {title}, `{target}`\n\nBatch {case.costs.batch}, {case.costs.basis()}.\n\n{table}"
            )
            page.say("\n".join(line for _, line in found))
            page.save(chosen.page)
            checks += found
    sys.exit(0 if all(passed for passed, _ in checks) else 1)


if __name__ == "__main__":
    main()
