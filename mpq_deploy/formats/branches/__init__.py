"""Branches: parts of a layer that get more precision, computed beside its body. One file per kind."""
