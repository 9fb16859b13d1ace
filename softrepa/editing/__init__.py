"""Editing real images."""
