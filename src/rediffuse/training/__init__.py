"""One training loop for both models: hardware choice, checkpoints, the loop.  Knows nothing of DVC or MLflow."""
