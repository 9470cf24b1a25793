"""How good generated images are: instruments that turn images into features, distances, memorisation.

Takes its settings from params.yaml's groups; must not know the models that are judged, DVC or MLflow.
"""
