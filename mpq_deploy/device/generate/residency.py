"""Which parts of a pipeline stay in memory together: by their estimates and by what is free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpq_deploy.device.cuda import Cuda, why_no_gpu
from mpq_deploy.system.memory import Room, memory_room

# Of all parts only these are called for every image; the others run first and are freed.
LASTING = ("unet", "transformer", "vae_decoder")
# Context, library and compiled kernels of a process that runs engines (our choice, not measured).
RUNTIME_BYTES = 500_000_000


@dataclass(frozen=True)
class Residency:
    """Whether denoiser and decoder take turns, which parts do not even fit alone, and all that in words."""

    take_turns: bool
    too_large: tuple[str, ...]
    words: str


def residency(sizes: Mapping[str, int], room: Room) -> Residency:
    """Return how parts of ``sizes`` (estimated bytes by name, the runtime's left out) share ``room``."""
    lasting = [name for name in sizes if name in LASTING]
    together = RUNTIME_BYTES + sum(sizes[name] for name in lasting)
    turns = not room.holds(together)
    each = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items())
    how = "take turns" if turns else "stay together"
    words = (
        f"memory, estimated: {each} GB and {RUNTIME_BYTES / 1e9:g} for the runtime; {room}: "
        f"{' and '.join(lasting)} {how}, the others are freed after use"
    )
    large = tuple(name for name, size in sizes.items() if not room.holds(RUNTIME_BYTES + size))
    return Residency(turns, large, words)


def free_room(engines: bool) -> Room | None:
    """Return what parts may take here: the GPU's memory for ``engines``; None where nobody says."""
    if not engines:
        return memory_room()
    if why_no_gpu():
        return None
    cuda = Cuda()
    return Room(cuda.free_bytes(), cuda.name())
