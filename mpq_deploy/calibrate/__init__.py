"""Observers inside the graph, activation scales, and the fit of PTQD's correction."""
