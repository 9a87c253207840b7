"""Load a Source into a transformers model (and its adapter)."""
