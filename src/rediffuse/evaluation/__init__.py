"""How good generated images are: versioned instruments that turn images into features, distances between them, memorisation.

Takes its settings from params.yaml's groups; must not know the models that are judged, DVC or MLflow.
"""
