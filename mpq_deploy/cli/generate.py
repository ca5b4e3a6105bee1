"""Images from a prompt, on a device or here."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Optional, get_type_hints

import typer

from mpq_deploy.cli.app import DEVICE, app, make_talk, print_result
from mpq_deploy.cli.options import LARGEST_SEED, output_picture
from mpq_deploy.errors import UsageError


@dataclass(frozen=True)
class Options:
    """The options of ``generate``."""

    folder: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="A run of a whole pipeline, an installed package, or a generation folder.",
            show_default=False,
        ),
    ]
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What the image shows.")]
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="PNG",
            help="With --count: NAME-SEED.png.",
            callback=output_picture,
        ),
    ] = Path("image.png")
    negative: Annotated[
        Optional[str], typer.Option("--negative", help="What it does not show.")
    ] = None
    steps: Annotated[Optional[int], typer.Option("--steps", min=1, help="Denoising steps.")] = None
    guidance: Annotated[
        Optional[float],
        typer.Option("--guidance", min=0, help="How closely it follows the prompt."),
    ] = None
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Of the first image's noise.")
    ] = 0
    size: Annotated[
        Optional[str], typer.Option("--size", metavar="WxH", help="Such as 512x512.")
    ] = None
    image: Annotated[Optional[Path], typer.Option("--image", help="An image to start from.")] = None
    mask: Annotated[
        Optional[Path], typer.Option("--mask", help="White is painted anew; needs --image.")
    ] = None
    strength: Annotated[
        Optional[float],
        typer.Option("--strength", min=0, max=1, help="How far from --image it goes."),
    ] = None
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Number of images.")] = 1
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images made at once.")] = 1
    lora: Annotated[
        Optional[list[str]],
        typer.Option(
            "--lora",
            metavar="FILE[:SCALE]",
            help="LoRA for the slots that the model was built with; repeatable.",
        ),
    ] = None
    one_at_a_time: Annotated[
        Optional[bool],
        typer.Option(
            "--one-at-a-time/--together",
            help="Hold one part in memory, or denoiser and decoder.",
            show_default="as memory allows",
        ),
    ] = None


def _generate(**given: Any) -> None:
    """Make images from a prompt, without PyTorch."""
    from mpq_deploy.device.generate.generator import Generator, Wish

    options = Options(**given)
    names = ("prompt", "negative", "steps", "guidance", "seed", "image", "mask", "strength")
    wish = Wish(
        **{name: given[name] for name in (*names, "count", "batch")}, size=_size(options.size)
    )
    talk = make_talk()
    folder = options.folder
    if (folder / "pipeline.json").is_file():
        # On a build machine alone: this needs the pipeline's folder, torch and diffusers.
        from mpq_deploy.delivery.generation import generation_of

        folder = generation_of(folder, talk)
    alone, loras = options.one_at_a_time, options.lora or ()
    generator = Generator(folder, one_at_a_time=alone, loras=loras, talk=talk)
    written = []
    for made in generator.generate(wish):
        name = f"{options.out.stem}-{made.seed}{options.out.suffix}"
        path = options.out if wish.count == 1 else options.out.with_name(name)
        made.image.save(path)
        written.append({"file": str(path), "seed": made.seed})
    print_result({"images": written}, "\n".join(str(one["file"]) for one in written))


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise UsageError(f"Invalid size '{text}'.", "Give WIDTHxHEIGHT, such as 512x512.")
    return int(match[1]), int(match[2])


# typer reads a command's options from its signature.
_HINTS = get_type_hints(Options, include_extras=True)
_generate.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter(
            one.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=_HINTS[one.name],
            default=inspect.Parameter.empty if one.default is MISSING else one.default,
        )
        for one in fields(Options)
    ]
)
_generate.__annotations__ = _HINTS
app.command(
    name="generate",
    rich_help_panel=DEVICE,
    epilog='Example: mpq-deploy generate sd15.generation --prompt "a red bicycle" -o bicycle.png',
)(_generate)
