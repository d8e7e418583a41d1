"""Triton: how a primitive's source for a GPU is put together, kept, and launched."""
