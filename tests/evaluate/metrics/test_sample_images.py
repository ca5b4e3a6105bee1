"""Shards: the same images however they are spread, killed, damaged or extended."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mpq_deploy.calls.loop import GuidedDenoiser, denoise, initial_noise
from mpq_deploy.calls.sampler import make_sampler
from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.evaluate.metrics import sample_images as module
from mpq_deploy.evaluate.metrics.sample_images import Source, image_shape, sample_many, shard_noise
from mpq_deploy.models.spec import DenoiserSpec, FloatModel, InputSpec
from mpq_deploy.recipe import EvaluateSettings
from mpq_deploy.system.parallel.processes import Processes
from mpq_deploy.system.parallel.work import Alone
from mpq_deploy.system.progress import Talk

CONDITIONS = {"class_labels": np.eye(4, dtype=np.float32)}
SIZE = 5


class Heard(Talk):
    def __init__(self):
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


def specification(**changes):
    values = {
        "name": "tiny",
        "source": "test",
        "sample": InputSpec(name="sample", shape=(1, SIZE, SIZE)),
        "timestep": InputSpec(name="timestep"),
        "conditions": (InputSpec(name="class_labels", shape=(4,)),),
        "scheduler": {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": 100,
            "clip_sample": True,
        },
        "pixel_range": (-1.0, 1.0),
    }
    return DenoiserSpec(**{**values, **changes})


def save_model(path, scale=0.1):
    """A convolution and a term for the condition; the timestep adds next to nothing."""
    weights = {
        "weight": scale * np.random.default_rng(0).standard_normal((1, 1, 3, 3)),
        "classes": np.linspace(-0.5, 0.5, 4).reshape(4, 1),
        "small": np.full((1, 1), 1e-4),
    }
    nodes = [
        helper.make_node("Conv", ["sample", "weight"], ["features"], pads=[1, 1, 1, 1]),
        helper.make_node("MatMul", ["class_labels", "classes"], ["class_term"]),
        helper.make_node("Unsqueeze", ["timestep", "one"], ["column"]),
        helper.make_node("MatMul", ["column", "small"], ["time_term"]),
        helper.make_node("Add", ["class_term", "time_term"], ["embedding"]),
        helper.make_node("Unsqueeze", ["embedding", "spatial"], ["map"]),
        helper.make_node("Add", ["features", "map"], ["out_sample"]),
    ]
    constants = [
        numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()
    ]
    constants += [
        numpy_helper.from_array(np.array(v, np.int64), k)
        for k, v in (("one", [1]), ("spatial", [2, 3]))
    ]
    values = {"sample": ["n", 1, SIZE, SIZE], "timestep": ["n"], "class_labels": ["n", 4]}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in values.items()
    ]
    output = helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, values["sample"])
    graph = helper.make_graph(nodes, "tiny", inputs, [output], constants)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path
    )
    return path


@pytest.fixture
def sources(tmp_path):
    model, changed = save_model(tmp_path / "float.onnx"), save_model(tmp_path / "ours.onnx", 0.11)
    return {"float": Source(model, 3, True), "ours": Source(changed, 3)}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD", 4)


def sampled(sources, images=10, cache=None, talk=None, spec=None, workers=None, **changes):
    settings = EvaluateSettings(samples=images, steps=3, seed=3, batch_size=2, **changes)
    model = FloatModel(sources["float"].model, spec or specification(), CONDITIONS)
    crew = None if workers is None else Alone() if workers == 1 else Processes(workers)
    return sample_many(sources, model, settings, cache, talk or Talk(), crew)


def test_shards_are_the_images_of_one_long_batch(sources):
    found = sampled(sources, workers=1)
    spec = specification()
    from mpq_deploy.runtime.ort import OrtDenoiser

    sampler = make_sampler(spec.scheduler, 3)
    rows = np.arange(10) % 4
    noise = initial_noise(spec, 10, 3)
    whole = denoise(
        GuidedDenoiser(OrtDenoiser(sources["float"].model, spec), spec, CONDITIONS),
        sampler,
        noise,
        rows,
        10,
    )
    pixels = np.rint((np.clip(whole, -1, 1) + 1) * 127.5).transpose(0, 2, 3, 1)
    assert np.abs(found.images["float"].astype(int) - pixels).max() <= 1
    np.testing.assert_array_equal(found.rows, rows)
    assert found.images["ours"].dtype == np.uint8
    assert not np.array_equal(found.images["ours"], found.images["float"])
    np.testing.assert_array_equal(shard_noise(spec, 4, 3, 3), noise[4:7])


def test_processes_change_nothing(sources, tmp_path):
    alone = sampled(sources, workers=1)
    spread = sampled(sources, workers=2, cache=tmp_path / "cache")
    for name in sources:
        np.testing.assert_array_equal(alone.images[name], spread.images[name])


def test_a_stopped_call_goes_on_and_a_damaged_shard_is_made_again(sources, tmp_path, monkeypatch):
    cache, made = tmp_path / "cache", []
    real = module.sample_shard

    def stopping(shard):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(shard.start)
        return real(shard)

    monkeypatch.setattr(module, "sample_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        sampled(sources, workers=1, cache=cache)
    monkeypatch.setattr(module, "sample_shard", real)
    first = sampled(sources, workers=1, cache=cache)
    assert (first.shards, first.made) == (6, 2)
    assert sampled(sources, workers=1, cache=cache).made == 0
    damaged = sorted(cache.glob("*.npz"))[2]
    damaged.write_bytes(damaged.read_bytes()[:40])
    heard = Heard()
    again = sampled(sources, workers=1, cache=cache, talk=heard)
    assert again.made == 1
    assert any("made again" in text for text in heard.warnings)
    # NumPy's own message advises to unpickle the file.
    assert not any("pickle" in text for text in heard.warnings)
    for name in sources:
        np.testing.assert_array_equal(again.images[name], first.images[name])


def test_more_images_keep_those_that_there_are(sources, tmp_path):
    cache = tmp_path / "cache"
    few = sampled(sources, images=8, workers=1, cache=cache)
    more = sampled(sources, images=12, workers=1, cache=cache)
    assert more.made == 2
    np.testing.assert_array_equal(more.images["ours"][:8], few.images["ours"])


def test_another_model_or_seed_is_sampled_anew(sources, tmp_path):
    cache = tmp_path / "cache"
    sampled(sources, images=4, workers=1, cache=cache)
    assert (
        sampled(
            {**sources, "ours": Source(sources["ours"].model, 4)}, images=4, workers=1, cache=cache
        ).made
        == 1
    )
    save_model(sources["ours"].model, 0.2)
    assert sampled(sources, images=4, workers=1, cache=cache).made == 1


def test_samplers_that_add_noise_differ_from_shard_to_shard(sources):
    pytest.importorskip("diffusers")
    spec = specification(
        scheduler={"_class_name": "DDPMScheduler", "num_train_timesteps": 100, "clip_sample": True},
        conditions=specification().conditions,
    )
    same = {"float": Source(sources["float"].model, 3, True)}
    seeds = []
    real = module.make_sampler

    def noted(scheduler, steps, seed, kind):
        seeds.append(seed)
        return real(scheduler, steps, seed, kind)

    module.make_sampler, keep = noted, module.make_sampler
    try:
        sampled(same, workers=1, spec=spec, sampler="folder")
    finally:
        module.make_sampler = keep
    assert len(set(seeds[:3])) == 3


def test_latents_without_a_decoder_are_refused(sources):
    spec = specification(pixel_range=None)
    with pytest.raises(UsageError, match="latents"):
        sampled(sources, spec=spec)
    with pytest.raises(UsageError, match="latents"):
        image_shape(FloatModel(sources["float"].model, spec, CONDITIONS))
    known = FloatModel(sources["float"].model, specification(), CONDITIONS)
    assert image_shape(known) == (SIZE, SIZE, 1)


def test_what_is_not_finite_is_said(sources):
    save_model(sources["ours"].model, float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        sampled(sources, images=4, workers=1)


def test_impossible_numbers_are_refused(sources):
    with pytest.raises(UsageError, match="workers"):
        sampled(sources, workers=0)
    with pytest.raises(ValueError, match="samples"):
        sampled(sources, images=0)
