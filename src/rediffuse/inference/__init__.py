"""A trained model in the formats of others.  Each writes the files of one folder; the command adds the model card."""
