"""rediffuse: a VAE and a DDPM as a reproducible pipeline."""

__version__ = "0.1.0"
