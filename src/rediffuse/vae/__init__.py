"""The variational autoencoder: model, objective, prior.  Knows nothing of DVC, MLflow or files."""
