"""The variational autoencoder: model, objective, prior, training step, and its latents as a space for a DDPM.

Must not know params.yaml, DVC or MLflow.
"""
