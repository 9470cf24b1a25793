"""Where an image set comes from: published sets, a folder of one's own; how it is divided, and its manifest.

Knows files, archives, downloads and the names of parameters, which its errors name; must not know models.
"""
