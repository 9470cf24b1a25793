"""Denoising diffusion: the schedule, the network, the denoiser, the objective, the training step.

The room knows tensors and the papers' letters; it must not know params.yaml, DVC or MLflow: a reader can lift it into a notebook.
x_0: clean images (B, C, H, W) in [-1, 1]; x_t: the same after t of T steps of noise; t: int64 (B,), 1 (nearly clean) to T (nearly
N(0, I)); 0 is clean.
"""
