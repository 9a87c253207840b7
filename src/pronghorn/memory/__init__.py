"""Recompute of activations."""
