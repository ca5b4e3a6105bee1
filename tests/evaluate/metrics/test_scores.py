"""LPIPS and the CLIP score: against torchmetrics' own, and what is said where weights or prompts are missing.

AlexNet's and CLIP's real weights are not at hand: both are small or random here. LPIPS' heads are torchmetrics' own.
"""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
lpips = pytest.importorskip("torchmetrics.functional.image.lpips")

from mpq_deploy.errors import UsageError  # noqa: E402
from mpq_deploy.evaluate.metrics import lpips as ours  # noqa: E402
from mpq_deploy.evaluate.metrics.networks import NetworkOptions  # noqa: E402
from mpq_deploy.evaluate.metrics.scores import open_scores, prompts_of  # noqa: E402
from mpq_deploy.models.spec import DenoiserSpec, InputSpec  # noqa: E402
from tests.tiny_models import tiny_clip_folder  # noqa: E402

TEXT = InputSpec(name="encoder_hidden_states", shape=(8, 12))
PROMPTS = ("abc", "def ghi", "(empty prompt)")


def spec(*conditions, labels=PROMPTS):
    sample = InputSpec(name="sample", shape=(3, 32, 32))
    return DenoiserSpec(
        name="any",
        source="any",
        sample=sample,
        timestep=InputSpec(name="timestep"),
        conditions=conditions,
        scheduler={},
        labels=labels,
    )


def pictures(count, side=32, channels=3, seed=0):
    return np.random.default_rng(seed).integers(
        0, 256, (count, side, side, channels), dtype=np.uint8
    )


def alexnet_features():
    """AlexNet's ``features`` as its paper and torchvision lay them out, with RANDOM weights."""
    nn = torch.nn
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(64, 192, kernel_size=5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(192, 384, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
    )


@pytest.fixture
def random_alexnet(tmp_path):
    """A file like torchvision's, of RANDOM weights."""
    path = tmp_path / "alexnet.pth"
    state = {f"features.{name}": value for name, value in alexnet_features().state_dict().items()}
    torch.save({**state, "classifier.1.weight": torch.zeros(1)}, path)
    return path


def opened(name, weights, *conditions, side=32):
    (score,) = open_scores(
        (name,), NetworkOptions(weights=tuple(weights.items())), spec(*conditions), (side, side, 3)
    )
    return score


def test_lpips_is_torchmetrics_own(random_alexnet, monkeypatch):
    score = opened("lpips", {"lpips": random_alexnet})
    images, other = pictures(35), pictures(35, seed=1)
    found = score.scores(images, other)
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda net, pretrained: alexnet_features())
    network = lpips._NoTrainLpips(net="alex", pnet_rand=True)
    pair = [torch.from_numpy(one).permute(0, 3, 1, 2) / 255 for one in (images, other)]
    with torch.inference_mode():
        expected = lpips._lpips_update(*pair, net=network, normalize=True)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)
    assert found.min() > 0


def test_lpips_grows_with_the_difference_and_is_zero_without(random_alexnet):
    score = opened("lpips", {"lpips": random_alexnet})
    images = pictures(4, channels=1)
    assert not score.scores(images, images).any()
    rng = np.random.default_rng(2)
    noise = rng.standard_normal(images.shape)
    near, far = (np.clip(images + size * noise, 0, 255).astype(np.uint8) for size in (4, 40))
    assert (score.scores(near, images) < score.scores(far, images)).all()


def test_other_weights_than_torchvision_s_are_named(random_alexnet, monkeypatch):
    assert opened("lpips", {"lpips": random_alexnet}).title == "LPIPS (AlexNet, other weights)"
    real = ours.file_digest

    def standard(path):
        return ours.STANDARD + "0" * 56 if path == random_alexnet else real(path)

    monkeypatch.setattr(ours, "file_digest", standard)
    assert opened("lpips", {"lpips": random_alexnet}).title == "LPIPS (AlexNet)"


def test_the_cache_is_looked_into_and_nothing_is_downloaded(random_alexnet, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(
        torch.hub, "load_state_dict_from_url", lambda *args, **kwargs: pytest.fail("a download")
    )
    with pytest.raises(UsageError) as caught:
        opened("lpips", {})
    said = str(caught.value)
    assert str(tmp_path) in said and ours.FILE in said and "--weights lpips=FILE" in said
    assert "Offline works" in said and "\n" not in said
    (tmp_path / "checkpoints").mkdir()
    random_alexnet.rename(tmp_path / "checkpoints" / ours.FILE)
    assert opened("lpips", {}).scores(pictures(1), pictures(1, seed=1)) > 0


class Trap:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("trap", "plain tensors"),
        ("text", "cannot be read"),
        ({}, "no features.0.weight"),
        ([1], "a list"),
        ("small", "a convolution of"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, content, said):
    path, marker = tmp_path / "w.pth", tmp_path / "ran"
    if content == "text":
        path.write_text("weights", encoding="utf-8")
    elif content == "trap":
        torch.save({"features.0.weight": Trap(marker)}, path)
    elif content == "small":
        names = [f"features.{place}" for place in (0, 3, 6, 8, 10)]
        torch.save(
            {f"{n}.{kind}": torch.zeros(1) for n in names for kind in ("weight", "bias")}, path
        )
    else:
        torch.save(content, path)
    with pytest.raises(UsageError, match=said):
        opened("lpips", {"lpips": path})
    assert not marker.exists()


def test_images_too_small_for_alexnet_are_refused(random_alexnet):
    score = opened("lpips", {"lpips": random_alexnet}, side=ours.MIN_SIDE)
    small = pictures(2, side=ours.MIN_SIDE)
    assert np.isfinite(score.scores(small, pictures(2, side=ours.MIN_SIDE, seed=1))).all()
    with pytest.raises(UsageError, match="at least 31 on each side"):
        opened("lpips", {"lpips": random_alexnet}, side=ours.MIN_SIDE - 1)
    with pytest.raises(RuntimeError):
        score.scores(pictures(1, side=ours.MIN_SIDE - 1), pictures(1, side=ours.MIN_SIDE - 1))


@pytest.fixture
def random_clip(tmp_path):
    """A whole CLIP of RANDOM weights, as transformers saves it."""
    pytest.importorskip("transformers")
    # Of this seed the cosines of the test's images and prompts are positive, so that no score is cut off at 0.
    return tiny_clip_folder(tmp_path, seed=5)


def test_the_clip_score_is_torchmetrics_own(random_clip):
    import transformers
    from torchmetrics.functional.multimodal import clip_score

    score = opened("clip-score", {"clip": random_clip}, TEXT)
    # As large as the crop, so that nothing is resized.
    images, prompts = pictures(3, side=28), ["abc", "defghijkl mnop", "q"]
    found = score.scores(images, images, prompts)
    model = transformers.CLIPModel.from_pretrained(random_clip).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(random_clip)

    class Towers:
        """The model as torchmetrics calls it: its methods return tensors in older releases of transformers only."""

        config = model.config

        def to(self, device):
            return self

        def get_image_features(self, pixels):
            return model.visual_projection(model.vision_model(pixels).pooler_output)

        def get_text_features(self, tokens, mask):
            return model.text_projection(
                model.text_model(input_ids=tokens, attention_mask=mask).pooler_output
            )

    def processor(text=None, images=None, **_):
        if images is not None:
            return {"pixel_values": torch.stack([image.float() / 127.5 - 1 for image in images])}
        return tokenizer(text, padding=True, truncation=True, max_length=8, return_tensors="pt")

    with torch.inference_mode():
        for image, prompt, value in zip(images, prompts, found, strict=True):
            own = clip_score(
                torch.from_numpy(image).permute(2, 0, 1), prompt, lambda: (Towers(), processor)
            )
            assert value == pytest.approx(float(own), rel=1e-3, abs=1e-3)
    # Of random towers some are below 0, which counts as 0.
    assert found.max() > 0


def test_each_image_is_scored_with_its_own_prompt(random_clip):
    score = opened("clip-score", {"clip": random_clip}, TEXT)
    images, prompts = pictures(40, side=28), [f"{a}{b}" for a in "abcdefgh" for b in "klmno"]
    together = score.scores(images, images, prompts)
    alone = [score.scores(images[i : i + 1], images, prompts[i : i + 1])[0] for i in (0, 33, 39)]
    np.testing.assert_allclose(together[[0, 33, 39]], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("missing", ["model.safetensors", "preprocessor_config.json", "tokenizer"])
def test_a_folder_that_is_no_whole_clip_is_refused(random_clip, missing):
    for file in random_clip.iterdir():
        if file.name == missing or (
            missing == "tokenizer" and file.name in ("tokenizer.json", "vocab.json")
        ):
            file.unlink()
    with pytest.raises(UsageError, match=f"holds no {missing}") as caught:
        opened("clip-score", {"clip": random_clip}, TEXT)
    assert "Offline works" in str(caught.value)


def test_one_tower_alone_is_no_clip(random_clip):
    from safetensors.numpy import load_file, save_file

    weights = load_file(random_clip / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("text_model")}
    save_file(kept, random_clip / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lacks .* such as text_model"):
        opened("clip-score", {"clip": random_clip}, TEXT)


def test_weights_and_prompts_are_asked_for_in_one_line():
    with pytest.raises(UsageError) as caught:
        opened("clip-score", {}, TEXT)
    said = str(caught.value)
    assert "--weights clip=FOLDER" in said and "Offline works" in said and "\n" not in said
    with pytest.raises(UsageError, match="no prompts"):
        opened("clip-score", {}, InputSpec(name="class_labels", dtype="int64"))
    with pytest.raises(UsageError, match="no prompts"):
        open_scores(("clip-score",), NetworkOptions(), spec(TEXT, labels=()), (32, 32, 3))
    with pytest.raises(UsageError, match="no score 'ssim'"):
        opened("ssim", {}, TEXT)


def test_every_row_needs_a_prompt():
    assert prompts_of(spec(TEXT), np.array([1, 0])) == ("def ghi", "abc")
    assert prompts_of(spec(InputSpec(name="class_labels", dtype="int64")), np.array([1])) == ()
    with pytest.raises(UsageError, match="3 labels, but conditions up to row 3"):
        prompts_of(spec(TEXT), np.array([3]))
