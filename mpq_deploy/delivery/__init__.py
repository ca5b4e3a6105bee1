"""A run on its way to a device and back: the package, ssh, and the device's results."""
