"""Smallworld: drawn scenes with exact captions, a checker, and a small text-to-image model trained on them."""
