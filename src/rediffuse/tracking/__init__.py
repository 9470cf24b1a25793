"""The MLflow row of an experiment: where it is kept, how it is found, what is written into it.

This room knows DVC's environment and MLflow.  It must not know models: it reads numbers, curves and pictures
that stages have written under metrics/, and it never changes them, the random numbers, or the exit status of
a stage.
"""
