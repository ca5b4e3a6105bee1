"""Number formats, branches and schemes: their bytes, codes, nodes, and what they refuse."""
