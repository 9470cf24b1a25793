"""One training loop for both models: the loop, the average of weights, checkpoints, curves.

Its settings are a group of params.yaml.  It does not know the models, DVC or MLflow.
"""
