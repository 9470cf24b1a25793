"""Where an image set comes from: published sets, a folder of one's own; how it is divided, and its manifest.

Knows files, archives and downloads; must not know models.
"""
