"""The model ``denoise`` of a Triton repository: from a prompt to the latents that the decoder takes.

``delivery.triton_repository`` packs it, and Triton's Python backend runs it. The graphs stay models
of their own backends, called through the server. Written after the backend's documentation: no
server was at hand, tests have a stand-in for its module.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mpq_deploy.device.generate.generation_folder import Part
from mpq_deploy.device.generate.generator import Generator
from mpq_deploy.device.generate.image_arrays import pillow
from mpq_deploy.device.generate.noise_schedule import Array
from mpq_deploy.errors import EngineError, MpqError
from mpq_deploy.system.progress import Talk

LATENTS, IMAGE = "LATENTS", "INIT_IMAGE"
# Inputs, as wishes of the generator; with those of an image where there is an encoder.
WISHES = {
    "PROMPT": "prompt",
    "NEGATIVE_PROMPT": "negative",
    "STEPS": "steps",
    "GUIDANCE": "guidance",
    "SEED": "seed",
    "SIZE": "size",
}
IMAGE_WISHES = {IMAGE: "image", "STRENGTH": "strength"}


def takes_batches(part: Part) -> bool:
    """Whether all tensors have a batch axis of any size: then the server adds it to their ``dims``."""
    tensors = (*part.inputs.values(), *part.outputs.values())
    return all(one.shape and one.shape[0] is None for one in tensors)


class ServedPart:
    """A part that the server runs as the model of its name."""

    def __init__(self, server: Any, part: Part) -> None:
        self._server, self._part = server, part
        self._batched = takes_batches(part)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return every output for one batch."""
        server, part = self._server, self._part
        request = server.InferenceRequest(
            model_name=part.name,
            requested_output_names=list(part.outputs),
            inputs=[server.Tensor(name, self._shown(name, feeds[name])) for name in part.inputs],
            preferred_memory=server.PreferredMemory(server.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise EngineError(f"The {part.name} failed: {response.error().message()}")
        outputs = {
            name: server.get_output_tensor_by_name(response, name).as_numpy()
            for name in part.outputs
        }
        return {name: np.asarray(one, np.float32) for name, one in outputs.items()}

    def _shown(self, name: str, values: Array) -> Array:
        """Return an input as the server's clients see it: no tensor there is without dimensions."""
        tensor = self._part.inputs[name]
        given = np.ascontiguousarray(values, np.dtype(tensor.dtype))
        bare = len(tensor.shape) == int(self._batched)
        return given.reshape(*np.shape(values), 1) if bare else given

    def close(self) -> None:
        """Do nothing: the server keeps its models."""


class _ServerTalk(Talk):
    """Warnings in the server's log."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def warn(self, text: str) -> None:
        self._server.Logger.log_warn(text)


class DenoiseModel:
    """What the Python backend calls. ``folder``: a GENERATION folder without its graphs."""

    folder: ClassVar[Path]

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the folder. The module is the server's own, and found nowhere else."""
        self._server = server = importlib.import_module("triton_python_backend_utils")
        opener = partial(ServedPart, server)
        self._generator = Generator(self.folder, opener=opener, talk=_ServerTalk(server))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer each request: one image's latents, or an error in one line."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        server = self._server
        try:
            wishes = {
                wish: value
                for name, wish in {**WISHES, **IMAGE_WISHES}.items()
                if (value := self._value(request, name)) is not None
            }
            latents = self._generator.latents(**wishes)
        except (MpqError, UnicodeDecodeError) as error:
            return server.InferenceResponse(error=server.TritonError(str(error)))
        decoder = self._generator.generation.part("vae_decoder")
        dtype = next(iter(decoder.inputs.values())).dtype
        tensor = server.Tensor(LATENTS, np.ascontiguousarray(latents, np.dtype(dtype)))
        return server.InferenceResponse(output_tensors=[tensor])

    def _value(self, request: Any, name: str) -> Any:
        """Return an input as a wish, None where it was not given; texts arrive as UTF-8."""
        tensor = self._server.get_input_tensor_by_name(request, name)
        if tensor is None:
            return None
        values = tensor.as_numpy()
        if name == IMAGE:
            return pillow().fromarray(values)
        if name == "SIZE":
            return tuple(values.tolist())
        value = values.reshape(-1)[0]
        return value.decode() if isinstance(value, bytes) else value.item()
