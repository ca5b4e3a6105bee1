"""What is timed: one model file, and how it is run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

ORT = "onnxruntime"
LIBRARIES = ("tensorrt_rtx", "tensorrt")
BACKENDS = (ORT, *LIBRARIES)


@dataclass(frozen=True)
class Subject:
    """``backend``: one of ``BACKENDS``. ``device``: cpu or cuda. ``name``: for people ("ours").

    ``fake_quant_only``: Q/DQ pairs stay as written, as ``mpq_deploy.load`` runs them on a CPU.
    ``graphs``: launch by CUDA graphs. ``threads`` 0: one per core. ``shapes``: of inputs that the
    file leaves open.
    """

    name: str
    file: str
    backend: str
    device: str
    batch: int = 1
    threads: int = 0
    fake_quant_only: bool = False
    graphs: bool = True
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Subject:
        """Read what ``to_json`` gave."""
        values: dict[str, Any] = json.loads(text)
        shapes = {name: tuple(shape) for name, shape in values.pop("shapes").items()}
        return cls(**values, shapes=shapes)
