"""Drawing new images from a trained model: samplers, spacings, guidance; from the VAE, the DDPM, the latents.

Stages, `rediffuse generate` and a served MLflow model use the same code.  Image i depends only on the seed, i
and its label.  It does not know DVC or MLflow.
"""
