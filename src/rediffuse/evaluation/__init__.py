"""How good generated images are: versioned instruments that turn images into features, and distances between feature sets.

Knows nothing of the models that are judged, of DVC or of MLflow.
"""
