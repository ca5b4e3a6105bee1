"""Memory of a backward pass through a graph: rules shared by its planning and its estimate."""

from __future__ import annotations

# Of all values that a pass computes, autograd keeps up to so many times.
PASS_COPIES = 2
# The graph is cut only where a pass takes this many times the allowed memory: parts run twice.
WHOLE_SHARE = 4
# Of all values, what autograd was seen to hold (many are views of others); and those that are no
# views of others.
VALUE_SHARE, DISTINCT_SHARE = 0.6, 0.7
# What the parts began with, of the values of a call that live at once.
BOUNDARY_SHARE = 2
