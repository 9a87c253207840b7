"""Attach LoRA through PEFT, read adapter folders, and THE merge."""
