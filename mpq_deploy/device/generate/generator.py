"""Images from a prompt: ``Generator`` over a GENERATION folder.

Text encoders run first and are freed; the denoiser and the decoder stay for all images, or take
turns (``one_at_a_time``). Noise is NumPy's by seed, so one seed gives another image than in torch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.device.generate.euler_schedulers import FlowMatchEulerDiscreteScheduler
from mpq_deploy.device.generate.generation_folder import (
    FLUX,
    SD,
    SD3,
    SDXL,
    Generation,
    Part,
    open_generation,
)
from mpq_deploy.device.generate.graph_runner import (
    ENGINE_SUFFIX,
    OpenPart,
    PartMemoryError,
    open_part,
    run_in_rows,
)
from mpq_deploy.device.generate.image_arrays import (
    check_same_size,
    image_array,
    image_from_array,
    mask_array,
    read_picture,
)
from mpq_deploy.device.generate.lora_factors import SlottedModel, slot_arrays
from mpq_deploy.device.generate.noise_schedule import Array
from mpq_deploy.device.generate.residency import free_room, residency
from mpq_deploy.device.generate.schedulers import scheduler_from_config
from mpq_deploy.device.generate.text_states import Texts, encode_texts
from mpq_deploy.errors import ModelError, UsageError, nearest
from mpq_deploy.models.lora_option import parse_lora
from mpq_deploy.system.given import check_whole, given_path
from mpq_deploy.system.progress import Talk

LARGEST_COUNT = 100_000
# Flux packs latents in squares of two.
PACKED = 2


@dataclass(frozen=True)
class Wish:
    """What is to be made; None: the folder's own default.

    ``image`` and ``mask`` (white is painted anew): files or Pillow images. Image ``i`` of ``count``
    has the seed ``seed + i``; ``batch`` of them are made at once.
    """

    prompt: str
    negative: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    size: tuple[int, int] | None = None
    image: Any = None
    mask: Any = None
    strength: float | None = None
    count: int = 1
    batch: int = 1


@dataclass(frozen=True)
class Made:
    """An image that was made: [H, W, 3] float32 in [0, 1]."""

    seed: int
    array: Array

    @property
    def image(self) -> Any:
        """The image for Pillow."""
        return image_from_array(self.array)


@dataclass(frozen=True)
class _Given:
    """What stays the same for all images: text rows, latents of the image, mask, their settings."""

    wish: Wish
    guided: bool
    texts: Texts
    moments: Array | None = None
    masked: Array | None = None
    mask: Array | None = None


class Generator:
    """Makes images from a folder that ``mpq_deploy.delivery.generation`` wrote.

    ``one_at_a_time``: never hold two parts (little memory; each batch loads both anew); None: where
    both are estimated not to fit. ``loras``: as for ``use_loras``. ``opener`` runs the parts in
    place of their files, which the folder then need not hold. Threads may share one: they make their
    batches in turn. Raises InputError for a folder that is incomplete or whose parts do not belong
    together, UsageError for arguments of another kind.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        one_at_a_time: bool | None = None,
        loras: str | Sequence[str] = (),
        threads: int = 0,
        talk: Talk | None = None,
        opener: Callable[[Part], OpenPart] | None = None,
    ) -> None:
        check_whole(threads, "threads", 0)
        place = Path(given_path(folder, "folder"))
        self.generation: Generation = open_generation(place, opener is None)
        self.scheduler = scheduler_from_config(self.generation.scheduler)
        self.noise_for: Callable[[int], Any] = np.random.default_rng
        self._threads, self._talk, self._opener = threads, talk or Talk(), opener
        turns = opener is None and one_at_a_time is None and self._take_turns()
        self._alone = bool(one_at_a_time) or turns
        self._open: dict[str, OpenPart] = {}
        # Held where parts or the scheduler, which knows its step, are used.
        self._turn = threading.RLock()
        self.use_loras(*([loras] if isinstance(loras, str) else loras))

    def use_loras(self, *loras: str) -> None:
        """Take these LoRAs, ``FILE[:SCALE]``, for the images from now on; none: as it was built.

        Raises as ``parse_lora`` and ``slot_arrays``.
        """
        options = [parse_lora(text) for text in loras]
        model = SlottedModel.of(self.generation)
        slots = slot_arrays(options, model, self._talk.warn)
        with self._turn:
            self.close()
            self._slots = slots

    def __call__(self, prompt: str, **wishes: Any) -> list[Made]:
        """Return the images of ``generate`` as a list."""
        return list(self.generate(_wish(prompt, wishes)))

    def generate(self, wish: Wish) -> Iterator[Made]:
        """Yield each image as it is done.

        Raises UsageError for what cannot be made; PartMemoryError where it breaks off, after the images
        that are done.
        """
        wish = self._completed(wish)
        try:
            with self._turn:
                given = self._prepared(wish)
            with self._talk.bar("images", wish.count) as advance:
                for start in range(0, wish.count, wish.batch):
                    count = min(wish.batch, wish.count - start)
                    seeds = [wish.seed + start + i for i in range(count)]
                    with self._turn:
                        made = list(self._batch(given, seeds, start))
                    yield from made
                    advance(count)
        finally:
            self.close()

    def latents(self, prompt: str, **wishes: Any) -> Array:
        """Return what the decoder takes [N, C, h, w] for these images, made as one batch."""
        wish = self._completed(_wish(prompt, wishes))
        with self._turn:
            try:
                seeds = [wish.seed + i for i in range(wish.count)]
                return self._to_decode(self._denoised(self._prepared(wish), seeds))
            finally:
                self.close()

    def close(self) -> None:
        """Free all parts."""
        with self._turn:
            for name in list(self._open):
                self._free(name)

    def _opened(self, name: str) -> OpenPart:
        if name not in self._open:
            started, part = time.monotonic(), self.generation.part(name)
            opener, slots = self._opener, self._slots.get(name)
            self._open[name] = opener(part) if opener else open_part(part, self._threads, slots)
            self._talk.line(f"  {name} loaded in {time.monotonic() - started:.1f} s")
        return self._open[name]

    def _take_turns(self) -> bool:
        """Whether denoiser and decoder do not fit together, by their estimates and what is free."""
        parts = self.generation.parts.values()
        sizes = {part.name: part.memory_bytes for part in parts if part.memory_bytes is not None}
        room = free_room(any(part.file.suffix == ENGINE_SUFFIX for part in parts))
        if room is None or len(sizes) < len(parts):
            return False
        shared = residency(sizes, room)
        if shared.take_turns:
            self._talk.line(shared.words)
        return shared.take_turns

    def _free(self, name: str) -> None:
        self._open.pop(name).close()

    def _completed(self, wish: Wish) -> Wish:
        """Return the wish with defaults filled in. Raises UsageError for what cannot be made."""
        _check_types(wish)
        generation, defaults = self.generation, self.generation.defaults
        image = None if wish.image is None else read_picture(wish.image, "image")
        mask = None
        if wish.mask is not None:
            mask = read_picture(wish.mask, "mask", ("L", "RGB", "1"))
        given = None if wish.size is None else (int(wish.size[0]), int(wish.size[1]))
        size = given or (image.size if image is not None else generation.sizes[0])
        generation.check_size(size)
        steps = wish.steps if wish.steps is not None else defaults["steps"]
        guidance = wish.guidance if wish.guidance is not None else defaults["guidance"]
        strength = wish.strength if wish.strength is not None else defaults["strength"]
        if mask is not None and image is None:
            raise UsageError("A mask needs an image.", "Give --image, too.")
        if image is not None and generation.kind not in (SD, SDXL):
            what = f"{generation.kind} pipelines make images from text alone here"
            raise UsageError(f"{what}, not from an image.", "Leave out --image.")
        if wish.strength is not None and image is None:
            raise UsageError("--strength needs an image.", "Give --image, or leave it out.")
        if generation.kind == FLUX and wish.negative:
            raise UsageError("Flux takes no negative prompt here.", "Leave out --negative.")
        if self.generation.paints and mask is None:
            raise UsageError("This denoiser paints into masks.", "Give --image and --mask.")
        for name, value, low, high in (
            ("steps", steps, 1, generation.scheduler.get("num_train_timesteps", 1000)),
            ("strength", strength, 0, 1),
            ("count", wish.count, 1, LARGEST_COUNT),
            ("batch", wish.batch, 1, LARGEST_COUNT),
            ("guidance", guidance, 0, 1000),
            ("seed", wish.seed, 0, 2**63 - 1),
        ):
            if not low <= value <= high:
                raise UsageError(f"--{name} is {value}.", f"It lies between {low} and {high}.")
        if image is not None and int(steps * strength) < 1:
            raise UsageError(f"{steps} steps of strength {strength:g} are none.", "Give more.")
        for picture, what in ((image, "image"), (mask, "mask")):
            if picture is not None:
                check_same_size(picture, size, what)
        filled: dict[str, Any] = {"steps": steps, "guidance": guidance, "strength": strength}
        return replace(wish, image=image, mask=mask, size=size, **filled)

    def _prepared(self, wish: Wish) -> _Given:
        """Encode texts and the given image, freeing each part after use."""
        generation, settings = self.generation, self.generation.settings
        distilled = generation.kind == FLUX or "timestep_cond" in generation.denoiser.inputs
        guided = float(wish.guidance or 0) > 1 and not distilled
        zeros = wish.negative is None and bool(settings.get("zeros_for_no_negative"))
        encoded = [wish.prompt] if zeros or not guided else [wish.negative or "", wish.prompt]
        warn = self._talk.warn
        texts = encode_texts(generation, encoded, self._opened, self._free, warn)
        if guided and zeros:
            texts = {name: np.concatenate([0 * one, one]) for name, one in texts.items()}
        given = _Given(wish, guided, texts)
        if wish.image is None:
            return given
        picture = image_array(wish.image)
        moments, mask, masked = self._encoded(picture), None, None
        if wish.mask is not None:
            mask = mask_array(wish.mask)
            if self.generation.paints:
                masked = self._encoded(picture * (mask < 0.5))
            factor = generation.vae["scale_factor"]
            mask = mask[:, :, ::factor, ::factor]
        self._free("vae_encoder")
        return replace(given, moments=moments, mask=mask, masked=masked)

    def _encoded(self, picture: Array) -> Array:
        part = self.generation.part("vae_encoder")
        feeds = {next(iter(part.inputs)): picture}
        outputs = run_in_rows(part, self._opened("vae_encoder"), feeds)
        return next(iter(outputs.values()))

    def _batch(self, given: _Given, seeds: list[int], done: int) -> Iterator[Made]:
        denoiser = self.generation.denoiser.name
        try:
            latents = self._denoised(given, seeds)
            if self._alone:
                self._free(denoiser)
            images = self._decoded(latents)
            if self._alone:
                self._free("vae_decoder")
        except (MemoryError, PartMemoryError) as error:
            what = f"Memory ran out at image {done + 1} of {given.wish.count}"
            raise PartMemoryError(
                f"{what}; the {done} before it are kept. {error}".strip(),
                "Give a smaller --batch, or --one-at-a-time.",
            ) from error
        for what, values in (("denoiser", latents), ("decoder", images)):
            if not np.isfinite(values).all():
                raise ModelError(
                    f"The {what}'s output is not finite at seed {seeds[0]}: there is no image.",
                    "FP16 may not hold its values; or give other --steps or --guidance.",
                )
        for seed, image in zip(seeds, images):
            yield Made(seed, image)

    def _denoised(self, given: _Given, seeds: list[int]) -> Array:
        """Return the latents of one batch [N, C, h, w]."""
        wish, vae, scheduler = given.wish, self.generation.vae, self.scheduler
        width, height = wish.size or (0, 0)
        factor = vae["scale_factor"]
        shape = (vae["latent_channels"], height // factor, width // factor)
        sources = [self.noise_for(seed) for seed in seeds]

        def draw(own: tuple[int, ...] = shape) -> Array:
            return np.stack([one.standard_normal(own, np.float32) for one in sources])

        first = self._timesteps(wish, shape)
        original, painted = None, given.mask is not None
        if given.moments is not None:
            original = self._sampled(given.moments, draw(), painted)
        noise = draw()
        scheduler.begin(first)
        if original is None or (given.mask is not None and wish.strength == 1):
            latents = noise * np.float32(scheduler.init_noise_sigma)
        else:
            latents = scheduler.add_noise(original, noise)
        extra: Array | None = None
        if self.generation.paints and given.masked is not None and given.mask is not None:
            hidden = self._sampled(given.masked, draw(), painted)
            extra = np.concatenate([np.repeat(given.mask, len(seeds), 0), hidden], axis=1)
        step_shape = shape
        if self.generation.kind == FLUX:
            latents = _packed(latents)
            step_shape = latents.shape[1:]
        conditions = self._conditions(given, len(seeds))
        for place in range(first, len(scheduler.timesteps)):
            output = self._predicted(given, latents, extra, conditions, place)
            latents = scheduler.step(output, latents, lambda: draw(step_shape))
            if given.mask is not None and extra is None and original is not None:
                last = place + 1 == len(scheduler.timesteps)
                kept = original if last else scheduler.add_noise(original, noise)
                latents = (1 - given.mask) * kept + given.mask * latents
        latents = latents.astype(np.float32)
        return _unpacked(latents, shape) if self.generation.kind == FLUX else latents

    def _timesteps(self, wish: Wish, shape: tuple[int, ...]) -> int:
        """Set the scheduler; return the index of the first step."""
        steps, mu, sigmas = int(wish.steps or 1), None, None
        kind, scheduler = self.generation.kind, self.scheduler
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            patch = PACKED if kind == FLUX else int(self.generation.settings.get("patch_size", 1))
            length = (shape[1] // patch) * (shape[2] // patch)
            mu = scheduler.shift_for(length)
            if kind == FLUX:
                sigmas = np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(steps, sigmas, mu)
        if wish.image is None:
            return 0
        return max(steps - min(int(steps * float(wish.strength or 1)), steps), 0)

    def _sampled(self, moments: Array, noise: Array, painted: bool) -> Array:
        """Return scaled latents from the encoder's mean and log variance [1, 2C, h, w].

        Some encoders (``AutoencoderTiny``) give the latents themselves [1, C, h, w]. diffusers does not
        shift those that are ``painted`` into.
        """
        vae = self.generation.vae
        if moments.shape[1] == vae["latent_channels"]:
            latents = np.repeat(moments, len(noise), 0)
        else:
            mean, log_variance = np.split(moments, 2, axis=1)
            latents = mean + np.exp(0.5 * np.clip(log_variance, -30, 20)) * noise
        shift, spread = (0, 1) if painted else self._shift()
        scaled: Array = (latents - shift) * np.float32(vae["scaling_factor"]) / spread
        return scaled

    def _shift(self) -> tuple[Any, Any]:
        """Return shift and spread of latents, of which diffusers' pipelines look at their own alone."""
        vae, kind = self.generation.vae, self.generation.kind
        if kind != SDXL or vae.get("latents_mean") is None or vae.get("latents_std") is None:
            shifted = kind in (SD3, FLUX)
            return np.float32((vae.get("shift_factor") or 0) * shifted), np.float32(1)
        mean, spread = (
            np.asarray(vae[key], np.float32).reshape(1, -1, 1, 1)
            for key in ("latents_mean", "latents_std")
        )
        return mean, spread

    def _conditions(self, given: _Given, count: int) -> Texts:
        """Return the denoiser's inputs beside sample and timestep: rows for no text, then for text."""
        conditions = {name: np.repeat(one, count, axis=0) for name, one in given.texts.items()}
        rows = count * (1 + given.guided)
        wish, inputs = given.wish, self.generation.denoiser.inputs
        width, height = wish.size or (0, 0)
        if "time_ids" in inputs:
            ids = np.array([height, width, 0, 0, height, width], np.float32)
            conditions["time_ids"] = np.tile(ids, (rows, 1))
        if "img_ids" in inputs:
            factor = PACKED * self.generation.vae["scale_factor"]
            places = np.indices((height // factor, width // factor)).reshape(2, -1).T
            ids = np.pad(places, [(0, 0), (1, 0)]).astype(np.float32)
            conditions["img_ids"] = np.repeat(ids[None], rows, axis=0)
        if "guidance" in inputs:
            conditions["guidance"] = np.full(rows, wish.guidance, np.float32)
        if "timestep_cond" in inputs:
            size = int(inputs["timestep_cond"].shape[1] or 0)
            row = _guidance_embedding(float(wish.guidance or 0) - 1, size)
            conditions["timestep_cond"] = np.tile(row, (rows, 1))
        return conditions

    def _predicted(
        self, given: _Given, latents: Array, extra: Array | None, conditions: Texts, place: int
    ) -> Array:
        """Return the denoiser's output for one step, guided where it is."""
        part, kind = self.generation.denoiser, self.generation.kind
        sample = self.scheduler.scaled_input(latents)
        if extra is not None:
            sample = np.concatenate([sample, extra], axis=1)
        rows = len(sample) * (1 + given.guided)
        sample = np.concatenate([sample] * (1 + given.guided))
        timestep = np.float32(self.scheduler.timesteps[place])
        timestep = timestep / np.float32(1000) if kind == FLUX else timestep
        name = "sample" if kind in (SD, SDXL) else "hidden_states"
        wide = bool(part.inputs["timestep"].shape)
        times = np.full(rows if wide else (), timestep)
        feeds = {name: sample, "timestep": times, **conditions}
        feeds = {name: values for name, values in feeds.items() if name in part.inputs}
        outputs = run_in_rows(part, self._opened(part.name), feeds)
        output = next(iter(outputs.values()))
        if not given.guided:
            return output
        plain, told = np.split(output, 2)
        guided: Array = plain + np.float32(given.wish.guidance) * (told - plain)
        return guided

    def _to_decode(self, latents: Array) -> Array:
        shift, spread = self._shift()
        scaled: Array = latents * spread / np.float32(self.generation.vae["scaling_factor"]) + shift
        return scaled

    def _decoded(self, latents: Array) -> Array:
        """Return images [N, H, W, 3] in [0, 1]."""
        part = self.generation.part("vae_decoder")
        feeds = {next(iter(part.inputs)): self._to_decode(latents)}
        outputs = run_in_rows(part, self._opened("vae_decoder"), feeds)
        image = np.clip(next(iter(outputs.values())) / 2 + 0.5, 0, 1)
        return image.transpose(0, 2, 3, 1)


def _wish(prompt: str, wishes: dict[str, Any]) -> Wish:
    """Return what is to be made. Raises UsageError for a wish of an unknown name."""
    known = [field.name for field in fields(Wish)]
    unknown = next((name for name in wishes if name not in known), None)
    if unknown is not None:
        hint = f"{nearest(unknown, known)}It takes {', '.join(known)}."
        raise UsageError(f"A generator takes no '{unknown}'.", hint)
    return Wish(prompt, **wishes)


def _check_types(wish: Wish) -> None:
    """Raise UsageError for a prompt that is no text, and for numbers of another type."""
    for name, text in (("prompt", wish.prompt), ("negative", wish.negative or "")):
        if not isinstance(text, str):
            raise UsageError(f"The {name} is a {type(text).__name__}.", "Give one text per call.")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UsageError(f"The {name} is not valid Unicode.", "Give it in UTF-8.")
    for name in ("steps", "seed", "count", "batch"):
        value = getattr(wish, name)
        if value is not None and not isinstance(value, (int, np.integer)):
            raise UsageError(f"--{name} is {value!r}.", "Give a whole number.")
    for name in ("guidance", "strength"):
        value = getattr(wish, name)
        if value is not None and not isinstance(value, (int, float, np.number)):
            raise UsageError(f"--{name} is {value!r}.", "Give a number.")
    size = wish.size
    whole = isinstance(size, (tuple, list)) and all(
        isinstance(side, (int, np.integer)) for side in size
    )
    if size is not None and (not whole or len(size) != 2):
        raise UsageError(f"--size is {size!r}.", "Give a width and a height, such as (512, 512).")


def _packed(latents: Array) -> Array:
    """[N, C, h, w] as [N, h/2 * w/2, 4 C], as Flux takes it."""
    n, c, h, w = latents.shape
    parts = latents.reshape(n, c, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3, 5)
    return parts.reshape(n, (h // 2) * (w // 2), 4 * c)


def _unpacked(packed: Array, shape: tuple[int, ...]) -> Array:
    c, h, w = shape
    parts = packed.reshape(len(packed), h // 2, w // 2, c, 2, 2).transpose(0, 3, 1, 4, 2, 5)
    return parts.reshape(len(packed), c, h, w)


def _guidance_embedding(scale: float, size: int) -> Array:
    """Return the guidance scale in sines and cosines, as LCM's UNet takes it."""
    half = size // 2
    places = np.exp(np.arange(half, dtype=np.float32) * -(np.log(10000.0) / (half - 1)))
    angles = np.float32(scale * 1000) * places
    return np.concatenate([np.sin(angles), np.cos(angles)]).astype(np.float32)[None]
