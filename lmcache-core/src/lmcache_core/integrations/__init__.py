"""Adapters for inference engines."""
