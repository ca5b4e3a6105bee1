"""How long a plan takes on a target: a table of measured layers, and estimates by a roofline for all others."""
