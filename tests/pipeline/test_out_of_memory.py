"""Too little memory: refused beforehand, or said in one line when it runs out; nothing finished is lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpq_deploy.errors import UsageError
from mpq_deploy.run.pipeline import STAGES
from mpq_deploy.system import memory
from mpq_deploy.system.memory import ran_out
from tests.pipeline.conftest import Outcome
from tests.pipeline.runs import Built, build, recipe_for, stage_bytes, write_recipe
from tests.pipeline.test_bad_input import refused

Cli = Callable[..., Outcome]
Fail = Callable[[], None]
# More than any machine has, and within the range of addresses.
HUGE = 1 << 45


@pytest.mark.parametrize("stage", ["export", "measure", "allocate"])
def test_a_build_stops_before_the_stage(
    run: Path, model: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    shutil.rmtree(run / stage)
    before = stage_bytes(run)
    monkeypatch.setenv("MPQ_DEPLOY_MEMORY", "1MB")
    monkeypatch.setattr(memory, "held_memory", lambda: 0)
    with pytest.raises(
        UsageError, match=f"The stage '{stage}' would need about .* has 0.0 GB free"
    ) as caught:
        build(recipe_for(model), run)
    assert "MPQ_DEPLOY_MEMORY" in caught.value.hint
    assert stage_bytes(run) == before
    monkeypatch.delenv("MPQ_DEPLOY_MEMORY")
    assert stage in build(recipe_for(model), run).made


def numpy_runs_out() -> None:
    np.ones(HUGE)


def torch_runs_out() -> None:
    pytest.importorskip("torch").empty(HUGE).fill_(1)


def onnxruntime_runs_out() -> None:
    from onnx import TensorProto
    from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

    from mpq_deploy.runtime.ort import make_session

    inputs = [make_tensor_value_info("n", TensorProto.INT64, [1])]
    outputs = [make_tensor_value_info("y", TensorProto.FLOAT, [None])]
    graph = make_graph([make_node("ConstantOfShape", ["n"], ["y"])], "g", inputs, outputs)
    model = make_model(graph, opset_imports=[make_opsetid("", 20)], ir_version=9)
    make_session(model.SerializeToString()).run(None, {"n": np.array([HUGE])})


@pytest.mark.parametrize(
    "fail", [numpy_runs_out, torch_runs_out, onnxruntime_runs_out], ids=lambda fail: fail.__name__
)
def test_memory_that_runs_out_is_said_in_one_line(
    cli: Cli,
    model: Path,
    finished: Built,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[[], None],
) -> None:
    """A real failure of each allocator, in the middle of a stage."""
    shutil.rmtree(run / "quantize")
    file = write_recipe(tmp_path / "recipe.yaml")

    def make(run: object, folder: Path) -> str:
        (folder / "half").write_bytes(b"done")
        fail()
        return ""

    monkeypatch.setitem(STAGES, "quantize", replace(STAGES["quantize"], make=make))
    refused(
        cli("build", model, "-r", file, "-o", run),
        1,
        "Memory ran out in the stage 'quantize'",
        "to continue from there",
    )
    assert not [path.name for path in run.iterdir() if path.name.endswith((".partial", ".old"))]
    monkeypatch.undo()
    assert "quantize" in build(recipe_for(model), run).made
    assert stage_bytes(run) == stage_bytes(finished.run)


def test_other_errors_are_no_lack_of_memory() -> None:
    assert ran_out(MemoryError()) and ran_out(RuntimeError("std::bad_alloc"))
    assert not ran_out(RuntimeError("shapes do not match")) and not ran_out(
        UsageError("The memory of the board is odd.")
    )
