"""Drawing new images from a trained model: one code path for the stage `sample`, `rediffuse generate` and a served MLflow model.

Image i depends on the seed, i and its label only.  This room must not know DVC or MLflow; vae.py and ddpm.py must not know each
other, so that a change to one model draws nothing of the other again.
"""
