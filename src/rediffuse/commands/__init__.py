"""What the command `rediffuse` does with results that lie there: no stage imports these modules, so a change in them runs nothing again."""
