"""One file per verb; every verb is a few calls into the rooms."""
