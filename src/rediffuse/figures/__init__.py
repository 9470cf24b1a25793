"""Every picture: arrays, records and models in, PNG out, the same bytes each time.  Only the stage `report` depends on it.

Must not know DVC or MLflow.
"""
