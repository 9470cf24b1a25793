"""One training loop for both models: the loop, the average of weights, checkpoints, curves.

Takes a group of params.yaml for its settings; must not know the models, DVC or MLflow.
"""
