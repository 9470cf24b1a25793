"""What you do with a trained model: draw, reconstruct, interpolate, inpaint, likelihood, export, serve.

No stage depends on this package.  It must not know DVC, and MLflow only to serve a model.
"""
