"""Recovery: distillation from the float denoiser, which lowers the error at no cost at inference.

In: a plan's quantized weights and the exported graph. Out: new codes, scales and FP16 constants for
the same schemes: same plan, same bytes, no branch added. Needs torch.
"""
