"""Where and how code runs: device and precision, processes, shards of random numbers, files, weights, errors.

Must not know images, models, DVC or MLflow.
"""
