"""The variational autoencoder: model, objective, prior, training step, and its latents as a space for a DDPM.

It does not know params.yaml, DVC or MLflow.
"""
