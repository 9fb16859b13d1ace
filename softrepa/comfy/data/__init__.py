"""Datasets through ComfyUI's encoders."""
