"""Pure tensor functions: each fast form beside its plain PyTorch twin in ``reference.py``."""
