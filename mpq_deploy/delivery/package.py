"""Package a finished run for a device: one archive, the same bytes each time.

In: a run, a target. Out: a ``.mpq.tar`` (``device.archive``) with graph and weights,
``manifest.json``, reference inputs and outputs, the denoiser's description, the sampler's
correction if any, ``install.pyz`` (the installer for devices without mpq-deploy) and ``build.sh``.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import zipfile
from dataclasses import replace
from importlib import resources
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from mpq_deploy.check.check import check_model
from mpq_deploy.check.rule import ERRORS
from mpq_deploy.device.archive import MANIFEST, PLAN, Source, part_digest, write_archive
from mpq_deploy.device.lora_inputs import UP
from mpq_deploy.device.manifest import LARGEST_TOLERANCE, Manifest, Reference
from mpq_deploy.device.output_check import relative_squared_error
from mpq_deploy.engine.plan_engine import batch_profile, check_target_memory, expected_layers
from mpq_deploy.engine.target import Target, known_targets, load_target
from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.formats.sizes import FP16_BYTES
from mpq_deploy.graph.load import read_proto
from mpq_deploy.graph.writers.deployed_graphs import DEPLOYED, SIMULATED, WEIGHTS
from mpq_deploy.runtime.correction import FILE as CORRECTION
from mpq_deploy.system.names import plain_name
from mpq_deploy.system.release import __version__

if TYPE_CHECKING:
    from mpq_deploy.models.spec import Array, DenoiserSpec
    from mpq_deploy.run.view import Run

REFERENCE, DENOISER = "reference.npz", "denoiser.json"
INSTALLER, SCRIPT = "install.pyz", "build.sh"
# What a device may differ from the reference by: so many times what FP16 arithmetic alone does on a
# CPU, since values that lie between two INT8 codes round to either; and never less than -40 dB
# (both our choice).
TOLERANCE_FACTOR, TOLERANCE_FLOOR = 10.0, 1e-4
# What runs on a device, and nothing that needs more than NumPy: tests run it with everything else
# blocked.
DEVICE_ROOMS = ("bench", "device", "device/generate", "formats", "formats/branches")
DEVICE_MODULES = (
    *("__init__.py", "api.py", "errors.py", "install.py"),
    *(
        f"system/{name}.py"
        for name in (
            *(
                "__init__",
                "array_file",
                "children",
                "control_groups",
                "files",
                "import_path",
                "inputs",
                "memory",
                "names",
            ),
            *("given", "progress", "release", "typed"),
        )
    ),
    *(
        f"rounding/{name}.py"
        for name in ("__init__", "arrays", "float_levels", "quantizers", "row_grids")
    ),
    "engine/__init__.py",
    *(f"models/{name}.py" for name in ("__init__", "lora_names", "lora_option", "weight_kinds")),
    *(
        f"engine/{name}.py"
        for name in ("bisect", "build_log", "build_target", "build_worker", "builder", "expected")
    ),
    *(
        f"engine/{name}.py"
        for name in (
            *("failure", "layer_information", "product_kernels", "record", "trtexec", "verify"),
        )
    ),
)


def check_builder(target: Target) -> None:
    """Raise UsageError when ``target`` has no engine that a device could build."""
    if target.builder == "none":
        raise UsageError(
            f"The target '{target.name}' has no engine to build on a device: ONNX Runtime runs quantize/{SIMULATED}.",
            "Package for a target with a builder (mpq-deploy targets).",
        )


def make_package(run: Run, target: Target, out: Path) -> dict[str, Any]:
    """Write the package of ``run`` for ``target`` to ``out``; return what was written.

    The deployed graphs, and the correction where the recipe wants one, must be current. Raises
    UsageError when the target builds no engine or does not take a scheme of the plan, ModelError
    when its TensorRT would refuse the graph.
    """
    check_builder(target)
    check_plan(run, target)
    parts, manifest = package_parts(run, target)
    parts |= {INSTALLER: installer(), SCRIPT: build_script(manifest).encode()}
    manifest = replace(manifest, parts={name: part_digest(part) for name, part in parts.items()})
    parts[MANIFEST] = manifest.to_json().encode()
    digest = write_archive(out, parts)
    return {"file": str(out), "sha256": digest, "bytes": out.stat().st_size, "parts": sorted(parts)}


def package_parts(run: Run, target: Target) -> tuple[dict[str, Source], Manifest]:
    """Return the parts of a package but for its programs, and their manifest.

    ``target`` builds engines and takes the plan. Raises UsageError where it has too little memory.
    """
    needed = check_target_memory(run, target)
    reference, arrays = make_reference(run)
    parts = {**_files(run), REFERENCE: arrays}
    manifest = replace(_manifest(run, target, reference), needed_bytes=needed.total_bytes)
    manifest = replace(manifest, parts={name: part_digest(part) for name, part in parts.items()})
    try:
        manifest.check()
    except ValueError as error:
        raise ModelError(f"The run cannot be packaged: {error}.") from error
    return parts, manifest


def check_plan(run: Run, target: Target) -> None:
    """Refuse to package a plan that was made for another target and does not suit this one."""
    again = f"Build for it: mpq-deploy build --target {target.name} --recipe {run.path}/recipe.yaml -o RUN."
    refused = []
    for layer in run.exported.graph.layers:
        scheme = run.plan.schemes[layer.name]
        reason = target.refusal(layer, SCHEMES[scheme])
        if reason:
            refused.append(f"{layer.name}: {scheme} ({reason})")
    if refused:
        more = f" (and {len(refused) - 1} more layers)" if len(refused) > 1 else ""
        raise UsageError(f"The plan is not for '{target.name}': {refused[0]}{more}.", again)
    for one in check_model(run.built, target).findings:
        if one.effect in ERRORS or one.rule == "opset":
            where = one.node or "opset"
            raise ModelError(
                f"{target.title} does not take the graph: {where}: {one.message}.", again
            )


def _portable(spec: DenoiserSpec) -> DenoiserSpec:
    """Return the description without what is of this machine: paths, and the pipeline's calls."""
    pipeline = spec.pipeline and spec.pipeline.model_copy(update={"calls": ()})
    return spec.model_copy(update={"source": Path(spec.source).name, "pipeline": pipeline})


def make_reference(run: Run) -> tuple[Reference, bytes]:
    """Run the FP32-arithmetic twin on recorded inputs; return the description, and arrays as npz.

    Two cases: the smallest batch at the first timestep, the usual batch at the last. Inputs are
    rounded to the deployed graph's types first, so that both graphs see the same numbers.
    """
    from mpq_deploy.calls.recorded import RecordedCalls
    from mpq_deploy.runtime.ort import OrtDenoiser
    from mpq_deploy.system.compute import CPU_PROVIDER

    exported, quantized = run.exported, run.deployed
    spec, section = exported.spec, run.recipe.engine
    calls = RecordedCalls(run.calibration.inputs, spec)
    types = _input_types(quantized / DEPLOYED)
    twin = OrtDenoiser(quantized / SIMULATED, spec, 1, [CPU_PROVIDER])
    half = _half_session(quantized / DEPLOYED)
    arrays: dict[str, Array] = {}
    errors = []
    cases = {
        "smallest": (section.batch_min, 0),
        "usual": (section.batch_opt, len(calls.recorded.timesteps) - 1),
    }
    for case, (batch, step) in cases.items():
        # Calls of the first size, where there are several.
        some = calls.recorded.of_one_size(step, np.arange(calls.recorded.count))[0]
        chosen = some[np.arange(batch) % len(some)]
        feeds = calls.feed(step, chosen)
        feeds = {name: values.astype(types[name]) for name, values in feeds.items()}
        wide = {item.name: feeds[item.name].astype(item.dtype) for item in spec.inputs}
        output = np.asarray(twin.session.run([spec.output], wide)[0], np.float32)
        tensors = {**feeds, spec.output: output}
        arrays.update({f"{case}/{name}": values for name, values in tensors.items()})
        if half is not None:
            found = np.asarray(half.run([spec.output], feeds)[0], np.float32)
            errors.append(relative_squared_error(found, output))
    fp16 = max(errors) if errors and np.all(np.isfinite(errors)) else None
    reference = Reference(
        REFERENCE,
        tuple(cases),
        tuple(types),
        spec.output,
        f"ONNX Runtime {version('onnxruntime')}, CPU, FP32 arithmetic on the same integers and scales",
        fp16,
        min(LARGEST_TOLERANCE, max(TOLERANCE_FLOOR, TOLERANCE_FACTOR * (fp16 or 0.0))),
        _slots(run.built),
    )
    return reference, npz_bytes(arrays)


def installer() -> bytes:
    """The device's part of this package as one file for python3, with nothing to install."""
    return device_program("installer")


def device_program(module: str) -> bytes:
    """``main`` of a module of the room ``device``, with all it needs, as one file for python3."""
    root = resources.files("mpq_deploy")
    files = [f"{room}/{one.name}" for room in DEVICE_ROOMS for one in (root / room).iterdir()]
    names = sorted(name for name in (*DEVICE_MODULES, *files) if name.endswith(".py"))
    content = io.BytesIO()
    # Stored, not deflated: the bytes must not depend on the version of zlib.
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        main = f"import sys\n\nfrom mpq_deploy.device.{module} import main\n\nsys.exit(main())\n"
        _add(archive, "__main__.py", main.encode())
        for name in names:
            _add(archive, f"mpq_deploy/{name}", (root / name).read_bytes())
    return b"#!/usr/bin/env python3\n" + content.getvalue()


def build_script(manifest: Manifest) -> str:
    """Return build.sh, filled in from the manifest; every value is quoted for the shell."""
    text = (resources.files("mpq_deploy") / "device" / "build.sh.in").read_text(encoding="utf-8")
    versions_here = " ".join(version.rstrip(".") for version in manifest.target.versions)
    others = ", ".join(
        f"{', '.join(versions)}: --target {name}"
        for name, versions in sorted(manifest.alternatives.items())
    )
    choice = others or "see mpq-deploy targets"
    remedy = f"Package the run again on the build machine for the version here ({choice})."
    values = {
        "TARGET": plain_name(manifest.target.name, "The target's name"),
        "DIALECT": plain_name(manifest.target.dialect, "The dialect"),
        "VERSIONS": shlex.quote(versions_here),
        "REMEDY": shlex.quote(remedy),
        "MODEL": shlex.quote(manifest.model),
        "SHAPES": " ".join(shlex.quote(flag) for flag in _shape_flags(manifest)),
    }
    # In one pass: a value that looks like another's place is not filled in again.
    return re.sub(r"@([A-Z]+)@", lambda place: values[place[1]], text)


def _shape_flags(manifest: Manifest) -> list[str]:
    flags = []
    for flag, batch in zip(("minShapes", "optShapes", "maxShapes"), manifest.batches):
        own = {"minShapes": manifest.least, "optShapes": manifest.usual}.get(flag, {})
        sizes = {
            name: "x".join(map(str, (batch, *own.get(name, shape))))
            for name, shape in manifest.shapes.items()
        }
        shapes = ",".join(f"{tensor}:{size}" for tensor, size in sizes.items())
        flags.append(f"--{flag}={shapes}")
    return flags


def _files(run: Run) -> dict[str, Source]:
    quantized = run.deployed
    spec = run.exported.spec
    parts: dict[str, Source] = {
        DEPLOYED: run.built,
        WEIGHTS: quantized / WEIGHTS,
        PLAN: run.stage("allocate") / "plan.json",
        DENOISER: _json(_portable(spec).model_dump(mode="json")),
        "scheduler_config.json": _json(spec.scheduler),
    }
    if run.recipe.evaluate.correction != "none":
        parts[CORRECTION] = run.stage("correction") / CORRECTION
    return parts


def _manifest(run: Run, target: Target, reference: Reference) -> Manifest:
    profile = batch_profile(run)
    return Manifest(
        name=run.exported.spec.name,
        made_by=__version__,
        target=target.build_target,
        model=DEPLOYED,
        parts={},
        expected=expected_layers(run),
        fp16_bytes=run.plan.fp16_size_bytes,
        batches=(profile.minimum, profile.optimum, profile.maximum),
        shapes=dict(profile.shapes),
        least=dict(profile.least),
        usual=dict(profile.usual),
        reference=reference,
        # What is deployed goes by one name, whichever stage made it.
        digests={"allocate": run.digest("allocate"), "quantize": run.digest(run.deployed_stage)},
        alternatives=alternatives(target),
        versions={name: version(name) for name in ("numpy", "onnx", "onnxruntime")},
        notes=tuple(run.plan.notes),
    )


def alternatives(target: Target) -> dict[str, tuple[str, ...]]:
    """Return the shipped targets of the same GPU with other versions of TensorRT."""
    gpu = (target.compute_capabilities, target.memory_bytes)
    others = (load_target(name) for name in known_targets() if name != target.name)
    return {
        other.name: other.versions
        for other in others
        if (other.compute_capabilities, other.memory_bytes) == gpu
        and other.versions != target.versions
    }


def _input_types(model: Path) -> dict[str, Any]:
    """NumPy types of the graph's inputs, in its order."""
    graph = onnx.load(model, load_external_data=False).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    return {name: onnx.helper.tensor_dtype_to_np_dtype(kind) for name, kind in kinds.items()}


def _slots(model: Path) -> dict[str, int]:
    """Bytes of the second factors of slots for LoRAs: where these are zero the LoRA is."""
    inputs = (one for one in read_proto(model).graph.input if one.name.endswith(UP))
    shapes = {one.name: one.type.tensor_type.shape.dim for one in inputs}
    return {n: FP16_BYTES * prod(dim.dim_value for dim in dims) for n, dims in shapes.items()}


def _half_session(model: Path) -> Any:
    """The FP16 graph in ONNX Runtime; None where that lacks a kernel for it."""
    from mpq_deploy.runtime.ort import make_session
    from mpq_deploy.system.compute import CPU_PROVIDER

    try:
        return make_session(model, 1, [CPU_PROVIDER])
    except ModelError:
        return None


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def npz_bytes(arrays: dict[str, Array]) -> bytes:
    """Return ``arrays`` as the content of an .npz, the same bytes each time."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            part = io.BytesIO()
            np.lib.format.write_array(part, np.asarray(arrays[name], order="C"), allow_pickle=False)
            _add(archive, f"{name}.npy", part.getvalue())
    return content.getvalue()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Add a file whose time and rights are always the same."""
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o644 << 16
    info.create_system = 3
    archive.writestr(info, content)
