"""Resolve a name or path to local files at a fixed revision, and say what is in them."""
