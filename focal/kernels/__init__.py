"""Faster implementations for the adapters; each equals a formula of the core."""
