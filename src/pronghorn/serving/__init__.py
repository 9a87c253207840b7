"""Use a finished checkpoint: chat."""
