"""Independent shards of work in this process, in several, or on Ray: the same bits.

Read ``work.py`` first: what a shard is, and how results are put in order.
"""
