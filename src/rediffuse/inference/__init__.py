"""What one does with a trained model: draw, reconstruct, interpolate, inpaint, likelihood, export, serve.  No stage depends on it.

Must not know DVC; MLflow only where a model is served.
"""
