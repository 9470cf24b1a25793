"""What the command `rediffuse` does.  No stage imports this, so a change here runs no stage again."""
