"""Compose Vision-Language-Action robot policies from plugins, in PyTorch and JAX."""
