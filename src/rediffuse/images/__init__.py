"""Images in memory and on disk: image sets as memory-mapped arrays, pixels, sample sets, PNG.

Must not know where images come from, or models.  Its errors name the stage that makes a missing file.
"""
