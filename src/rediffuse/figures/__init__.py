"""Pictures of images, latents and training: arrays in, uint8 arrays and files out, the same bytes each time.

This room must not know models, parameters, DVC or MLflow.
"""
