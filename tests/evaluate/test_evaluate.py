"""The whole evaluation on a tiny conditional denoiser, whose variants are the float model with known changes."""

import json
import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mpq_deploy.calls.loop import GuidedDenoiser, denoise, initial_noise
from mpq_deploy.calls.sampler import make_sampler
from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.evaluate import evaluate as module
from mpq_deploy.evaluate.evaluate import Variant, evaluate
from mpq_deploy.evaluate.evaluation_result import Evaluation
from mpq_deploy.evaluate.fresh import FreshCalls
from mpq_deploy.evaluate.images import psnr_db, to_unit
from mpq_deploy.evaluate.output_error import nmse
from mpq_deploy.evaluate.setup import spread_rows
from mpq_deploy.evaluate.variants import with_cpu_latency
from mpq_deploy.models.spec import DenoiserSpec, FloatModel, InputSpec
from mpq_deploy.recipe import EvaluateSettings
from mpq_deploy.runtime.correction import Correction, CorrectionStep
from mpq_deploy.runtime.ort import OrtDenoiser
from mpq_deploy.system.progress import Talk
from tests.runtime.test_corrected_scheduler import identity

SETTINGS = EvaluateSettings(samples=5, steps=6, timesteps=3, calls=5, batch_size=2)
CONDITIONS = {"class_labels": np.eye(4, 4, dtype=np.float32)}


class Heard(Talk):
    def __init__(self):
        self.warnings = []
        self.bars = []

    def warn(self, text):
        self.warnings.append(text)

    def bar(self, what, total):
        self.bars.append(what)
        return super().bar(what, total)


def specification(**changes):
    values = {
        "name": "tiny",
        "source": "test",
        "sample": InputSpec(name="sample", shape=(3, 8, 8)),
        "timestep": InputSpec(name="timestep"),
        "conditions": (InputSpec(name="class_labels", shape=(4,)),),
        "scheduler": {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": 100,
            "clip_sample": True,
        },
        "labels": ("cat", "dog", "fox", "<b>owl</b>"),
        "pixel_range": (-1.0, 1.0),
    }
    return DenoiserSpec(**{**values, **changes})


def denoiser_file(path, change=1.0, poison=None):
    """Convolution plus a term for the condition and one for the timestep; ``change`` scales the convolution."""
    rng = np.random.default_rng(0)
    weights = {
        "conv.weight": change * 0.2 * rng.standard_normal((3, 3, 3, 3)),
        "class_embedding.weight": rng.standard_normal((4, 3)),
        "time_embedding.weight": 0.01 * rng.standard_normal((1, 3)),
    }
    if poison is not None:
        weights["conv.weight"][0, 0, 0, 0] = poison
    nodes = [
        helper.make_node("Conv", ["sample", "conv.weight"], ["features"], pads=[1, 1, 1, 1]),
        helper.make_node("MatMul", ["class_labels", "class_embedding.weight"], ["class_term"]),
        helper.make_node("Unsqueeze", ["timestep", "one"], ["timestep_column"]),
        helper.make_node("MatMul", ["timestep_column", "time_embedding.weight"], ["time_term"]),
        helper.make_node("Add", ["class_term", "time_term"], ["embedding"]),
        helper.make_node("Unsqueeze", ["embedding", "spatial"], ["embedding_map"]),
        helper.make_node("Add", ["features", "embedding_map"], ["out_sample"]),
    ]
    initializers = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()]
    initializers += [
        numpy_helper.from_array(np.array([1], np.int64), "one"),
        numpy_helper.from_array(np.array([2, 3], np.int64), "spatial"),
    ]
    shape = ["n", 3, 8, 8]
    graph = helper.make_graph(
        nodes,
        "denoiser",
        [
            helper.make_tensor_value_info("sample", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("timestep", TensorProto.FLOAT, ["n"]),
            helper.make_tensor_value_info("class_labels", TensorProto.FLOAT, ["n", 4]),
        ],
        [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, shape)],
        initializers,
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path
    )
    return path


def decoder_file(path):
    """Doubles the size and halves the values."""
    nodes = [
        helper.make_node("Resize", ["latents", "", "scales"], ["larger"], mode="nearest"),
        helper.make_node("Mul", ["larger", "half"], ["image"]),
    ]
    initializers = [
        numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"),
        numpy_helper.from_array(np.array(0.5, np.float32), "half"),
    ]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("latents", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 16, 16])],
        initializers,
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path
    )
    return path


@pytest.fixture
def files(tmp_path):
    return {
        "float": denoiser_file(tmp_path / "float.onnx"),
        "ours": denoiser_file(tmp_path / "ours.onnx", 1.001),
        "int4": denoiser_file(tmp_path / "int4.onnx", 1.1),
    }


def run(files, spec=None, settings=SETTINGS, **more):
    variants = {
        name: Variant(path, 123 if name == "ours" else None)
        for name, path in files.items()
        if name != "float"
    }
    return evaluate(variants, float_model(files, spec), settings, **more)


def float_model(files, spec=None):
    return FloatModel(files["float"], spec or specification(), CONDITIONS)


@pytest.mark.parametrize(
    ("count", "turns"),
    [(5, [range(5)] * 3), (2, [[0, 2], [1, 3], [2, 4]]), (1, [[0, 2], [1, 3], [2, 4]])],
)
def test_agrees_with_a_plain_loop(files, count, turns):
    """At three timesteps one call of five at each would leave two out: two are taken."""
    found = run(files, settings=SETTINGS.replace(calls=count))
    spec = specification()
    rows = np.array([0, 1, 2, 3, 0])
    sampler = make_sampler(spec.scheduler, 6)
    calls = []
    noise = initial_noise(spec, 5, SETTINGS.seed)
    images = {}
    for name in ("float", "ours"):
        hook = (lambda *call: calls.append(call[:4])) if name == "float" else None
        images[name] = denoise(
            GuidedDenoiser(OrtDenoiser(files[name], spec), spec, CONDITIONS, hook),
            sampler,
            noise,
            rows,
            5,
        )
    errors = []
    for index, turn in zip((1, 3, 5), turns, strict=True):
        _, timestep, inputs, _ = calls[index]
        taken = {"class_labels": CONDITIONS["class_labels"][rows[turn]]}
        outputs = [
            OrtDenoiser(files[n], spec)(inputs[turn], timestep, taken) for n in ("float", "ours")
        ]
        errors.append(nmse(*outputs))
    ours = found.variants["ours"]
    assert found.timesteps == tuple(calls[i][1] for i in (1, 3, 5))
    assert ours.nmse_by_timestep == pytest.approx(errors, rel=1e-4)
    assert ours.measured_nmse == pytest.approx(np.mean(errors), rel=1e-4)
    expected = psnr_db(*(to_unit(images[n], (-1, 1)) for n in ("float", "ours")))
    assert ours.psnr_db == pytest.approx(expected, abs=1e-3)
    assert (len(ours.psnr_db_each), np.mean(ours.psnr_db_each)) == (
        len(images["ours"]),
        pytest.approx(ours.psnr_db),
    )
    assert (len(ours.ssim_each), np.mean(ours.ssim_each)) == (
        len(images["ours"]),
        pytest.approx(ours.ssim),
    )
    assert ours.size_bytes == 123 and found.variants["int4"].size_bytes is None
    assert list(found.images) == ["float", "ours", "int4"]
    assert found.images["ours"].shape == (5, 8, 8, 3) and found.images["ours"].dtype == np.uint8
    assert found.labels == ("cat", "dog", "fox", "<b>owl</b>", "cat")


def correction(slope):
    step = CorrectionStep(
        timestep=0,
        slope=slope,
        bias=(0.0,),
        residual_variance=0,
        applied=True,
        heldout_nmse_before=2e-4,
        heldout_nmse_fitted=1e-4,
    )
    return Correction(
        models={"m": "0"}, prediction_type="epsilon", channels=3, bias_per="scalar", steps=(step,)
    )


def test_a_correction_changes_the_error_and_the_samples_of_its_variant_only(files, tmp_path):
    """The float model, "corrected" by a slope that it does not have: its output becomes 1 / (1 + k) of what it was."""
    model = float_model(files)

    def evaluated(corrected):
        variants = {
            "ours": Variant(model.path),
            "ours+ptqd": Variant(model.path, correction=corrected),
        }
        return evaluate(variants, model, SETTINGS, cache=tmp_path / "cache")

    for slope in (0.1, 0.25):
        found = evaluated(correction(slope))
        assert found.variants["ours"].measured_nmse == 0
        expected = (1 / (1 + slope) - 1) ** 2
        assert found.variants["ours+ptqd"].nmse_by_timestep == pytest.approx(
            [expected] * 3, rel=1e-4
        )
        assert found.variants["ours+ptqd"].psnr_db < math.inf
    note = next(note for note in found.notes if note.startswith("ours+ptqd"))
    assert "2.00e-04 -> 1.00e-04" in note and "adds no noise" in note
    assert evaluated(identity(3)).variants["ours+ptqd"].psnr_db == math.inf


def test_a_larger_change_is_worse(files):
    found = run(files).variants
    assert found["int4"].measured_nmse > 100 * found["ours"].measured_nmse
    assert found["int4"].psnr_db < found["ours"].psnr_db
    assert found["int4"].ssim < found["ours"].ssim <= 1


def test_an_identical_variant_has_no_error_and_survives_json(files, tmp_path):
    found = run({"float": files["float"], "ours": files["float"]})
    assert found.variants["ours"].measured_nmse == 0
    assert found.variants["ours"].psnr_db == math.inf
    found.save(tmp_path / "evaluate")
    text = json.loads((tmp_path / "evaluate" / "evaluation.json").read_text(encoding="utf-8"))
    assert text["variants"]["ours"]["psnr_db"] is None
    assert "identical" in text["variants"]["ours"]["psnr_note"]
    assert Evaluation.load(tmp_path / "evaluate").variants == found.variants
    assert Evaluation.load(tmp_path / "evaluate").float_digest == found.float_digest != ""


def test_saved_and_loaded_are_equal_and_repeat_byte_for_byte(files, tmp_path):
    for folder in ("a", "b"):
        run(files).save(tmp_path / folder)
    for name in ("evaluation.json", "images.npz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    first, loaded = run(files), Evaluation.load(tmp_path / "a")
    assert loaded.as_json() == first.as_json()
    assert list(loaded.variants) == list(first.variants)
    assert all(np.array_equal(loaded.images[name], first.images[name]) for name in first.images)


def test_only_what_changed_is_sampled_again(files, tmp_path, monkeypatch):
    opened = []
    real = module.OrtDenoiser.in_lanes
    monkeypatch.setattr(
        module.OrtDenoiser,
        "in_lanes",
        lambda path, *a, **k: opened.append(path.name) or real(path, *a, **k),
    )
    cold = run(files, cache=tmp_path / "cache")
    assert opened == ["float.onnx", "ours.onnx", "int4.onnx"]
    opened.clear()
    assert run(files, cache=tmp_path / "cache").as_json() == cold.as_json()
    assert opened == []
    denoiser_file(files["ours"], 1.01)
    changed = run(files, cache=tmp_path / "cache")
    assert opened == ["ours.onnx"]
    assert changed.variants["int4"] == cold.variants["int4"]
    assert changed.variants["ours"].measured_nmse > cold.variants["ours"].measured_nmse
    opened.clear()
    run(files, cache=tmp_path / "cache", settings=SETTINGS.replace(samples=4))
    assert opened == ["ours.onnx", "int4.onnx"]
    run(files, cache=tmp_path / "cache", settings=SETTINGS.replace(steps=5))
    assert opened[2:] == ["float.onnx", "ours.onnx", "int4.onnx"]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_more_samples_run_the_float_model_on_those_that_are_missing(
    files, tmp_path, monkeypatch, sampler, guidance
):
    """Conditions are cycled from four samples on: more samples begin as fewer, in batches of two."""
    scheduler = {"_class_name": sampler, "num_train_timesteps": 100}
    more = {"guidance_scale": guidance, "uncond_row": 3} if guidance > 1 else {}
    spec, rows = specification(scheduler=scheduler, **more), []
    real = module._sample

    def sampled(setup, denoiser, watched, part):
        rows.append(
            (part.name, len(setup.rows[slice(part.images.start, part.images.stop)]))
            if part.images
            else (part.name, len(setup.rows))
        )
        return real(setup, denoiser, watched, part)

    monkeypatch.setattr(module, "_sample", sampled)
    fewer, cache = SETTINGS, tmp_path / "cache"
    run(files, spec, fewer, cache=cache)
    rows.clear()
    # What only chooses among the calls runs nothing of the float model.
    run(files, spec, fewer.replace(calls=2), cache=cache)
    assert not [name for name, _ in rows if name == module.FLOAT]
    rows.clear()
    found = run(files, spec, fewer.replace(samples=9), cache=cache)
    assert dict(rows)[module.FLOAT] == (5 if sampler == "DDIMScheduler" else 9)
    fresh = run(files, spec, fewer.replace(samples=9))
    assert found.as_json() == fresh.as_json()
    assert all(np.array_equal(found.images[name], fresh.images[name]) for name in fresh.images)


def test_fresh_calls_are_kept_by_what_they_depend_on(files, tmp_path, monkeypatch):
    model, opened = float_model(files), []
    real = module.OrtDenoiser.in_lanes
    monkeypatch.setattr(
        module.OrtDenoiser,
        "in_lanes",
        lambda path, *a, **k: opened.append(path.name) or real(path, *a, **k),
    )
    errors = [
        FreshCalls(model, settings, Talk(), tmp_path / "cache").errors(files["ours"])
        for settings in (SETTINGS, SETTINGS, SETTINGS.replace(seed=7))
    ]
    assert opened == [*("float.onnx", "ours.onnx"), "ours.onnx", *("float.onnx", "ours.onnx")]
    assert np.array_equal(errors[0], errors[1]) and not np.array_equal(errors[0], errors[2])


@pytest.mark.parametrize("damage", [b"", b"no archive", None])
def test_a_damaged_cache_entry_is_made_again(files, tmp_path, damage):
    cold = run(files, cache=tmp_path / "cache")
    entries = sorted((tmp_path / "cache").iterdir())
    # Two variants, and the float model's batches of two of five images.
    assert len(entries) == 5
    for entry in entries:
        content = bytearray(entry.read_bytes())
        # In the values of the first array: what the zip says of its members may change without harm.
        content[content.index(b"\x93NUMPY") + 130] ^= 0xFF
        entry.write_bytes(bytes(content) if damage is None else damage)
    heard = Heard()
    assert run(files, cache=tmp_path / "cache", talk=heard).as_json() == cold.as_json()
    assert len(heard.warnings) >= 3 and "made again" in heard.warnings[0]
    assert sorted((tmp_path / "cache").iterdir()) == entries


def test_output_that_is_not_finite_names_variant_and_timestep(files, tmp_path):
    files["int4"] = denoiser_file(tmp_path / "bad.onnx", poison=np.nan)
    with pytest.raises(ModelError, match=r"'int4' is not finite at timestep 64"):
        run(files)


def test_latents_are_compared_as_such_and_that_is_said(files):
    found = run(files, specification(pixel_range=None))
    assert found.image_kind == "latents"
    assert "latents" in found.notes[0]
    assert math.isfinite(found.variants["ours"].psnr_db)


def test_latents_are_decoded_where_there_is_a_decoder(files, tmp_path):
    decoder_file(tmp_path / "decoder.onnx")
    found = run(files, specification(pixel_range=None, decoder="decoder.onnx"))
    assert found.image_kind == "decoded"
    assert found.images["ours"].shape == (5, 16, 16, 3)
    (tmp_path / "decoder.onnx").unlink()
    with pytest.raises(ModelError, match=r"decoder\.onnx"):
        run(files, specification(pixel_range=None, decoder="decoder.onnx"))


def test_guidance_counts_both_calls(files):
    found = run(files, specification(guidance_scale=2.0, uncond_row=3))
    assert set(found.rows) == {0, 1, 2}
    assert "guidance" in found.notes[0]


def test_latency_is_labelled_as_the_cpus(files, tmp_path):
    settings = SETTINGS.replace(samples=2, steps=3, timesteps=2)
    found = with_cpu_latency(
        run(files, settings=settings), float_model(files), "ours", files["ours"]
    )
    assert found.latency.float_ms > 0 and list(found.latency.variant_ms) == ["ours"]
    assert "not the target device" in found.latency.source
    found.save(tmp_path)
    assert Evaluation.load(tmp_path).latency == found.latency
    assert "latency_ms" not in (tmp_path / "evaluation.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("available", "samples", "uncond", "expected"),
    [
        (4, 4, None, [0, 1, 2, 3]),
        (4, 6, None, [0, 1, 2, 3, 0, 1]),
        (8, 2, None, [2, 6]),
        (3, 4, 2, [0, 1, 0, 1]),
        (0, 2, None, [0, 0]),
        (1, 2, 0, [0, 0]),
    ],
)
def test_rows_are_spread(available, samples, uncond, expected):
    assert spread_rows(available, samples, uncond).tolist() == expected


def test_bad_input_is_refused(files, tmp_path):
    with pytest.raises(UsageError, match="float"):
        evaluate({"float": Variant(files["float"])}, float_model(files), SETTINGS)
    with pytest.raises(ModelError, match=r"missing\.onnx"):
        run({**files, "ours": tmp_path / "missing.onnx"})
    with pytest.raises(ModelError, match="rows"):
        other = FloatModel(
            files["float"], specification(), {"a": np.zeros((2, 1)), "b": np.zeros((3, 1))}
        )
        evaluate({"ours": Variant(files["ours"])}, other, SETTINGS)


def controlled(files, images, **more):
    """Evaluate ours, a control far behind it, one as good, and one that is the float model."""
    settings = SETTINGS.replace(samples=19, steps=4, calls=7, controls_images=images)
    variants = {
        "ours": Variant(files["ours"]),
        "far": Variant(files["int4"], 5, layers={"w4a16": 1}, is_control=True),
        "same": Variant(files["ours"], 6, is_control=True),
    }
    return evaluate(variants, float_model(files), settings, **more)


def test_controls_are_compared_until_they_are_told_apart(files):
    every, needed = controlled(files, "all"), controlled(files, "needed")
    # Neither ours nor the float model knows how many images its controls have.
    assert needed.variants["ours"] == every.variants["ours"]
    for name in ("float", "ours"):
        np.testing.assert_array_equal(needed.images[name], every.images[name])
    far, whole = needed.variants["far"], every.variants["far"]
    assert (len(far.psnr_db_each), far.calls, whole.calls) == (8, 3, 7)
    np.testing.assert_allclose(far.psnr_db_each, whole.psnr_db_each[:8], rtol=1e-4)
    np.testing.assert_allclose(far.nmse_by_timestep, whole.nmse_by_timestep, rtol=0.2)
    assert far.settled and far.behind_db.mean > far.behind_db.low > 0.5
    assert needed.images["far"].shape == (8, 8, 8, 3)
    same = needed.variants["same"]
    assert (len(same.psnr_db_each), same.calls) == (19, 7)
    np.testing.assert_allclose(same.nmse_by_timestep, every.variants["same"].nmse_by_timestep, 1e-4)
    assert abs(same.behind_db.mean) < 0.01 and not same.settled
    assert list(needed.variants) == list(needed.images)[1:] == ["ours", "far", "same"]


def test_all_images_of_a_control_give_what_any_variant_gives(files):
    every = controlled(files, "all")
    plain = run(
        {"float": files["float"], "ours": files["ours"], "far": files["int4"]},
        settings=every.settings,
    )
    found = replace(every.variants["far"], size_bytes=None, layers={}, behind_db=None)
    assert found == plain.variants["far"]
    difference = np.subtract(
        every.variants["ours"].psnr_db_each, every.variants["far"].psnr_db_each
    )
    assert every.variants["far"].behind_db.mean == pytest.approx(difference.mean())


def test_a_sampler_that_draws_noise_samples_whole_controls(files):
    scheduler = {"_class_name": "DDPMScheduler", "num_train_timesteps": 100}
    noisy = FloatModel(files["float"], specification(scheduler=scheduler), CONDITIONS)
    settings = SETTINGS.replace(samples=9, steps=4, sampler="folder")
    variants = {
        "ours": Variant(files["ours"]),
        "far": Variant(files["int4"], is_control=True),
    }
    found = evaluate(variants, noisy, settings)
    assert len(found.variants["far"].psnr_db_each) == 9
    assert found.variants["far"].behind_db.low < found.variants["far"].behind_db.high


def test_kept_and_fresh_samples_of_controls_are_the_same_bytes(files, tmp_path):
    cold = controlled(files, "needed", cache=tmp_path / "cache")
    heard = Heard()
    warm = controlled(files, "needed", cache=tmp_path / "cache", talk=heard)
    cold.save(tmp_path / "cold")
    warm.save(tmp_path / "warm")
    controlled(files, "needed").save(tmp_path / "fresh")
    for name in ("evaluation.json", "images.npz"):
        texts = [(tmp_path / run / name).read_bytes() for run in ("cold", "warm", "fresh")]
        assert texts[0] == texts[1] == texts[2]
    assert Evaluation.load(tmp_path / "cold").as_json() == cold.as_json()
    assert Evaluation.load(tmp_path / "cold").variants["far"] == cold.variants["far"]
