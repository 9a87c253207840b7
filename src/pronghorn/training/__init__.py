"""One typed config, TRL's trainer, sealed checkpoints, resume."""
