"""Comparisons drawn by ComfyUI's samplers, and their judges."""
