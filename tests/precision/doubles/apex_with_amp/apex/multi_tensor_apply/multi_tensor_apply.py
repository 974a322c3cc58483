"""Marks the package as NVIDIA's."""
