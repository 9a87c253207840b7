"""Safetensors files, streamed: read, write, copy. Never a whole model in memory."""
