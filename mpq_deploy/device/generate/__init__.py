"""Images from a prompt on a device: NumPy, Pillow, tokenizers and an engine, no PyTorch."""
