"""Independent parts of a stage's work, computed in this process, in several, or on a Ray cluster:
always the same bits.

Read ``work.py`` first: what a shard is, and how results are put in order.
"""
