"""What passes back through a graph hold of memory: the rules they are planned by, for those who estimate it, too."""

from __future__ import annotations

# Of all values that a pass computes, autograd keeps up to so many times.
PASS_COPIES = 2
# Only where one pass takes so many times the memory allowed is the graph cut: parts are evaluated twice.
WHOLE_SHARE = 4
# Of all values, what autograd was seen to hold (many are views of others); and those that are no views of others.
VALUE_SHARE, DISTINCT_SHARE = 0.6, 0.7
# What the parts began with, of the values of a call that live at once.
BOUNDARY_SHARE = 2
