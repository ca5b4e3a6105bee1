"""Turn a builder's refusal or crash into an error that names the nodes and the log."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_deploy.errors import EngineError

if TYPE_CHECKING:
    from mpq_deploy.engine.bisect import Suspects

LAST_LINES = 4
NAMED_NODES = 4
PRODUCTS = ("MatMul", "Gemm")
# What a shell adds to the number of the signal that ended its program; signals of faults in the
# program; signals that others send.
SHELL_SIGNALS = 128
# Windows lacks some of them.
FAULTS = tuple(
    n for name in ("SEGV", "ABRT", "BUS", "FPE", "ILL") if (n := getattr(signal, f"SIG{name}", 0))
)
KILLS = tuple(n for name in ("KILL", "TERM") if (n := getattr(signal, f"SIG{name}", 0)))


def refused(result: dict[str, Any], builder: str, log: Path) -> EngineError:
    """Say what the parser or builder refused, node by node, from the worker's result."""
    parts = []
    for error in result["errors"][:NAMED_NODES]:
        where = f"{error['node']} ({error['operator']}): " if error["node"] else ""
        parts.append(where + _short(error["message"]))
    shown = "; ".join(dict.fromkeys(parts)) or "no reason given"
    verbs = {"parse": "cannot read the graph", "profile": "has no input shapes"}
    verb = verbs.get(result["stage"], "refuses the graph")
    return EngineError(f"{builder} {result['version']} {verb}: {shown}.", f"Full log: {log}")


def fatal_signal(returncode: int) -> int:
    """Return the signal that ended a process (-n, or 128 + n from a shell script); 0 for none."""
    if returncode < 0:
        return -returncode
    return returncode - SHELL_SIGNALS if returncode - SHELL_SIGNALS in (*FAULTS, *KILLS) else 0


class BuilderCrashedError(EngineError):
    """Whether the builder's process crashed: a signal of a fault, not of memory that ran out."""


class BuilderKilledError(EngineError):
    """Whether the builder's process was killed: by the kernel for lack of memory, or by a person."""


def crashed(model: Path, log: Path, returncode: int, stderr: str) -> EngineError:
    """Describe how the builder's process died, with suspect nodes and its last output."""
    text = log.read_text(errors="replace", encoding="utf-8") if log.is_file() else ""
    last = [line for line in text.splitlines() if line.strip()][-LAST_LINES:]
    words = f"Its last words: {' / '.join(last)}" if last else "It had printed nothing yet."
    ended_by = fatal_signal(returncode)
    if not ended_by:
        message = " ".join(stderr.split())[-400:]
        text = f"The builder's process exited with code {returncode}: {message}"
        return EngineError(text, f"Full log: {log}")
    name = signal.Signals(ended_by).name
    if ended_by not in FAULTS:
        why = ", most likely because memory ran out" if name == "SIGKILL" else ""
        return BuilderKilledError(
            f"The builder was killed ({name}){why}. {words}",
            "Repeat the command: it continues with this engine. If it is killed again, build on a machine "
            f"with more memory. Log: {log}",
        )
    if importlib.util.find_spec("onnx") is None:
        # On a device: 'mpq-deploy check' names them on the build machine.
        blame = " Its graph cannot be analysed here: onnx is not installed."
    else:
        nodes = known_suspects(model)
        blame = " No node has a form that is known to crash it."
        if nodes:
            blame = f" Suspect nodes: {', '.join(nodes)}."
    return BuilderCrashedError(
        f"The builder crashed ({name}).{blame} {words}",
        f"Leave the suspect layers in FP16 (recipe: protect). Full log: {log}",
    )


def located(crash: BuilderCrashedError, suspects: Suspects | None) -> EngineError:
    """Add to ``crash`` the nodes that building smaller graphs blames."""
    if suspects is None:
        return EngineError(
            f"{crash.message} A second build of the same graph did not crash.", crash.hint
        )
    named, more = ", ".join(suspects.nodes[:NAMED_NODES]), len(suspects.nodes) - NAMED_NODES
    if more > 0:
        named += f" and {more} more"
    if not suspects.quantized:
        text = f"It crashes even without quantization, once the graph reaches {named}"
    elif len(suspects.nodes) == 1:
        text = f"It crashes when only {named} is quantized, but not when nothing is"
    else:
        text = f"It crashes when these are quantized together: {named}; but not when nothing is"
    sure = "" if suspects.certain else "; the search ended early, so fewer may be enough"
    searched = f"Suspects by {suspects.trials} smaller builds: {text}{sure}."
    return EngineError(f"{crash.message} {searched}", crash.hint)


def known_suspects(model: Path) -> list[str]:
    """Name the nodes whose forms are known to crash TensorRT-RTX, each with the reason.

    1. A product whose left operand is an INT4 weight in blocks.
    2. Products that share one INT4 weight in blocks (their own copies of it are fine).
    """
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    blocked: dict[str, str] = {}
    for node in graph.node:
        is_int4 = (
            node.op_type == "DequantizeLinear" and types.get(node.input[0]) == onnx.TensorProto.INT4
        )
        if is_int4 and any(
            attribute.name == "block_size" and attribute.i for attribute in node.attribute
        ):
            blocked[node.output[0]] = node.input[0]
    suspects = []
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        if node.op_type not in PRODUCTS:
            continue
        if node.input[0] in blocked:
            suspects.append(f"{node.name} (its left operand is an INT4 weight in blocks)")
        if node.input[1] in blocked:
            readers.setdefault(blocked[node.input[1]], []).append(node.name)
    for weight, nodes in readers.items():
        if len(nodes) > 1:
            suspects.append(f"{' and '.join(nodes)} (they share the INT4 weight {weight})")
    return suspects


def _short(message: str) -> str:
    """The first sentence of a builder's message, without the noise about a missing driver."""
    lines = [line for line in message.splitlines() if "cudaerror" not in line.lower()]
    return " ".join(" ".join(lines).split())[:300].rstrip(".")
