"""An ONNX graph seen as layers, the passes that rewrite it, and how it is read and written."""
