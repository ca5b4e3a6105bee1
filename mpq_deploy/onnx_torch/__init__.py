"""The exported graph in torch, with autograd: sensitivity and recovery compute with it."""
