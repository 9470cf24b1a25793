"""Drawing new images from a trained model: samplers, spacings, guidance; from the VAE, the DDPM, the latents.

One code path for the stages, `rediffuse generate` and a served MLflow model.  Image i depends on the seed, i and its label only.
Must not know DVC or MLflow.
"""
