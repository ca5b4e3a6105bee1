"""The kurtosis of a layer's weights as its importance.

MPQ-DM (arXiv 2412.11549) ranks the output channels *within* a layer by the Pearson kurtosis of
their weights after pre-scaling, and gives the channels of highest kurtosis one bit more. Comparing
*layers* by kurtosis is our reading: the importance of a layer is the mean kurtosis of its rows
times its number of weights, so that a byte is worth most where the kurtosis is highest, whatever
the layer's size. Like orm, the metric weighs bits, predicts no error and uses ``measure.orm``.
"""

from __future__ import annotations

import numpy as np

from mpq_deploy.calibrate.stats import CalibrationStats
from mpq_deploy.formats.simulated import row_kurtosis
from mpq_deploy.formats.sizes import input_channels
from mpq_deploy.graph.layers import Layer
from mpq_deploy.models.spec import Array
from mpq_deploy.sensitivity.bit_losses import table_from_importance
from mpq_deploy.sensitivity.layer_weights import float_matrix
from mpq_deploy.sensitivity.subject import Subject
from mpq_deploy.sensitivity.table import SensitivityTable


def measure_kurtosis(subject: Subject) -> SensitivityTable:
    """Return the table whose importances are mean row kurtosis times the number of weights."""
    theta = [
        layer_kurtosis(layer, float_matrix(subject.graph, layer), subject.stats) * layer.weights
        for layer in subject.layers
    ]
    note = "kurtosis between layers is our reading: MPQ-DM ranks the channels of one layer by it"
    steps = len(subject.calibration.timesteps)
    return table_from_importance("kurtosis", subject, np.tile(theta, (steps, 1)), (note,))


def layer_kurtosis(layer: Layer, weight: Array, stats: CalibrationStats) -> float:
    """Return the mean of ``channel_kurtosis`` over rows; normally distributed weights have 3."""
    return float(np.mean(channel_kurtosis(layer, weight, stats)))


def channel_kurtosis(layer: Layer, weight: Array, stats: CalibrationStats) -> Array:
    """Return the Pearson kurtosis of the rows of ``weight`` [O, K] after pre-scaling, float64 [O].

    Pre-scaling uses the absolute maximum of each input channel over all of the layer's inputs. In a
    grouped convolution each group has its own input channels.
    """
    channels = input_channels(layer)
    amax = np.max([stats.activations[tensor].amax for tensor in layer.inputs], axis=0)
    by_group = np.broadcast_to(amax, (layer.group * channels,)).reshape(layer.group, channels)
    parts = [
        row_kurtosis(rows, np.repeat(maxima, layer.reduction // channels))
        for rows, maxima in zip(np.split(weight, layer.group), by_group)
    ]
    return np.concatenate(parts)
