"""A run on its way to a device and back: the package, ssh, and the results that come home."""
