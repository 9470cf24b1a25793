"""Denoising diffusion: the schedule, the network, the denoiser, the objective, the training step.

It does not know params.yaml, DVC or MLflow, so that a notebook can use it.
x_0: clean images (B, C, H, W) in [-1, 1].  x_t: the same after t of T steps of noise.
t: int64 (B,), from 1 (nearly clean) to T (nearly N(0, I)); 0 is clean.
"""
