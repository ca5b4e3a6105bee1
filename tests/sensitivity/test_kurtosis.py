"""Kurtosis between layers: scipy's on the scaled rows, groups apart, and losses that weigh bits by it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import kurtosis

from mpq_deploy.calibrate.stats import CalibrationStats
from mpq_deploy.recipe import MeasureSettings, OrmSettings
from mpq_deploy.sensitivity.kurtosis import channel_kurtosis, layer_kurtosis
from mpq_deploy.sensitivity.measure import measure
from mpq_deploy.sensitivity.subject import Subject
from mpq_deploy.system.progress import Talk
from tests.sensitivity.cases import Setting, setting
from tests.sensitivity.kinds import kinds

OPTIONS = MeasureSettings(calls=3, orm=OrmSettings(activation_bits="fp16"))


@pytest.fixture(scope="module")
def mixed() -> Setting:
    made = setting(kinds(), (4, 7, 6), calls=3)
    random = np.random.default_rng(4)
    for layer in made.graph.layers:
        channels = layer.weight_shape[1 - layer.out_axis] * layer.group
        for name in layer.inputs:
            stats = made.stats.activations[name]
            if len(stats.amax) == 1:
                made.stats.activations[name] = replace(stats, amax=random.random(channels) + 0.1)
    return made


@pytest.mark.parametrize("name", ["conv_in", "grouped", "time.b", "to_q"])
def test_it_is_scipys_of_the_scaled_rows(mixed: Setting, name: str) -> None:
    layer = next(n for n in mixed.graph.layers if n.name == name)
    weight = mixed.candidates[name].weight
    amax = mixed.stats.activations[layer.inputs[0]].amax
    rows_per_group = len(weight) // layer.group
    taps = layer.reduction // (len(amax) // layer.group)
    for row in range(len(weight)):
        group = row // rows_per_group
        block = weight[group * rows_per_group : (group + 1) * rows_per_group].astype(np.float64)
        maxima = np.repeat(amax.reshape(layer.group, -1)[group], taps)
        scaled = weight[row] / np.sqrt(np.abs(block).max(axis=0) / maxima)
        found = channel_kurtosis(layer, weight, mixed.stats)[row]
        assert found == pytest.approx(kurtosis(scaled, fisher=False), rel=1e-6)


def test_heavy_tails_come_first(mixed: Setting) -> None:
    layer = next(n for n in mixed.graph.layers if n.name == "conv_in")
    random = np.random.default_rng(5)
    # Without pre-scaling, so that only the tails differ.
    flat = CalibrationStats(
        {name: replace(s, amax=np.zeros(1)) for name, s in mixed.stats.activations.items()}
    )
    shape = mixed.candidates["conv_in"].weight.shape
    normal, heavy = random.standard_normal(shape), random.standard_t(3, shape)
    assert layer_kurtosis(layer, heavy, flat) > layer_kurtosis(layer, normal, flat) > 1


def test_losses_are_bits_not_given_times_weights_times_kurtosis(mixed: Setting) -> None:
    table = measure("kurtosis", Subject(*mixed, OPTIONS, Talk()))
    assert table.metric == "kurtosis" and not table.predicts_nmse
    assert any("our reading" in note for note in table.notes)
    for layer in mixed.graph.layers:
        expected = layer.weights * layer_kurtosis(
            layer, mixed.candidates[layer.name].weight, mixed.stats
        )
        row = table.losses[layer.name]
        assert row["fp16"] == 0
        assert row["w8a16"] == pytest.approx(8 * expected)
        assert row["w4a16-b32"] == pytest.approx(12 * expected)
