"""Soft tokens on a MODEL."""
