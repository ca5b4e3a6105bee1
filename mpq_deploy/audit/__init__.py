"""Which sensitivity to trust: every metric against the exhaustive truth, and the plans that each of them makes."""
