"""Numerical building blocks in plain PyTorch: attention backends, rotary embedding, RMS norm, counter-based noise.

Nothing in here knows a model or a configuration.
"""
