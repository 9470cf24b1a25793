"""Every picture: arrays, records and models in, PNG out.  The bytes are the same each time.

Only the stage `report` depends on this package.  It must not know DVC or MLflow.
"""
