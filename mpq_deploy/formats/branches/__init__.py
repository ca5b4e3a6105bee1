"""Branches: parts of a layer with more precision than the layer's body. One file per kind."""
