"""Which activations are kept, recomputed or moved to host memory, and how many bytes that takes."""
