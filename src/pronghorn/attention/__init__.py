"""Attention behind transformers' AttentionInterface."""
