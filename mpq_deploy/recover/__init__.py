"""Recovery: distillation from the float denoiser that gives quality back at no cost at inference.

In: a plan's quantized weights and the exported graph. Out: the same forms with other codes, scales
and FP16 constants: same plan, same bytes, no branch added. Needs torch.
"""
