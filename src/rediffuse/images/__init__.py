"""Image sets: from the published files to memory-mapped uint8 arrays with a manifest.

This room knows files, hashes and arrays; it must not know models, DVC or MLflow.
"""
