"""Number formats, schemes, the candidates of a layer and their deployed bytes, and NumPy quantizers."""
