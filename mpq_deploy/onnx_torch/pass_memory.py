"""Memory of a backward pass through a graph: rules shared by its planning and its estimate."""

from __future__ import annotations

from typing import Any

from mpq_deploy.system.gpu_memory import free_bytes

# Of all values that a pass computes, autograd keeps up to so many times.
PASS_COPIES = 2
# The graph is cut only where a pass takes this many times the allowed memory: parts run twice.
WHOLE_SHARE = 4
# Of all values, what autograd was seen to hold (many are views of others); and those that are no
# views of others.
VALUE_SHARE, DISTINCT_SHARE = 0.6, 0.7
# What the parts began with, of the values of a call that live at once.
BOUNDARY_SHARE = 2
# Of a GPU's free memory, what the values of a pass may take before the graph is cut (a whole pass
# may take WHOLE_SHARE times as much), and what kept stacks of errors may take.
GPU_SHARE = 6
# Pieces of a GPU's work: CPUs take small ones, which stay in their caches; here each costs a launch.
GPU_PIECE_BYTES = 256 << 20


def pass_bytes(device: Any, on_cpu: int) -> int:
    """Return what the values of a pass on torch's ``device`` may take: ``on_cpu``, or a share of a GPU."""
    free = free_bytes(device)
    return on_cpu if free is None else free // GPU_SHARE


def piece_bytes(device: Any, on_cpu: int) -> int:
    """Return how large a piece of work on torch's ``device`` is: ``on_cpu`` fits the caches there."""
    return on_cpu if device.type == "cpu" else GPU_PIECE_BYTES
