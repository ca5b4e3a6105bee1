"""Channel by channel, the probes' error is that of the scheme."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.system.progress import Talk
from tests.sensitivity.cases import Setting, setting
from tests.sensitivity.kinds import kinds

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

FORM = SCHEMES["w4a16-b32"].weight_form


@pytest.fixture(scope="module")
def mixed() -> Setting:
    return setting(kinds(), (4, 7, 6))


def errors(case: Setting, bodies: dict[str, np.ndarray], samples: int = 3) -> dict[str, np.ndarray]:
    from mpq_deploy.sensitivity.salience import channel_errors

    recorded = RecordedCalls(case.calibration, case.spec)
    return channel_errors(case.graph, bodies, recorded, samples, Talk())


def test_only_channels_that_are_rounded_cause_errors(mixed: Setting) -> None:
    bodies = {}
    for name, candidate in mixed.candidates.items():
        body = candidate.weight.copy()
        body[::2] = candidate.weight_matrix(FORM)[::2]
        bodies[name] = body
    for name, found in errors(mixed, bodies).items():
        assert found.shape == (mixed.candidates[name].layer.out_channels,)
        assert not found[1::2].any(), name
        assert found[::2].any(), name


def test_of_the_last_layer_they_are_the_output_s_own(mixed: Setting) -> None:
    """There G is the probe itself: in expectation <r, dY_c>^2 = ||dY_c||^2, which grows as the square of the error."""
    last = mixed.graph.layers[-1]
    candidate = mixed.candidates[last.name]
    error = candidate.weight_matrix(FORM) - candidate.weight
    single = errors(mixed, {last.name: candidate.weight + error})[last.name]
    double = errors(mixed, {last.name: candidate.weight + 2 * error})[last.name]
    np.testing.assert_allclose(double, 4 * single, rtol=1e-3)


def test_one_probe_ranks_channels(mixed: Setting) -> None:
    """Errors that grow by a third from channel to channel, at 256 positions of a product."""
    import torch

    from mpq_deploy.sensitivity.salience import _by_channel

    product = next(one for one in mixed.graph.layers if one.op != "Conv")
    layer = replace(product, weight_shape=(24, 8) if product.out_axis == 0 else (8, 24))
    rng = np.random.default_rng(0)
    x, gradient, difference = (
        torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
        for shape in ((1, 256, 8), (1, 256, 24), (1, 1, 8))
    )
    growing = difference * 1.33 ** torch.arange(24)[None, :, None]
    found = _by_channel(layer, {}, x, gradient, growing)
    assert bool((found.diff() > 0).all())


def test_layers_are_measured_apart_and_alike(mixed: Setting) -> None:
    bodies = {name: c.weight_matrix(FORM) for name, c in mixed.candidates.items()}
    together, again = errors(mixed, bodies), errors(mixed, bodies)
    for name in bodies:
        np.testing.assert_array_equal(together[name], again[name])
    one = next(iter(bodies))
    np.testing.assert_allclose(errors(mixed, {one: bodies[one]})[one], together[one], rtol=1e-5)
