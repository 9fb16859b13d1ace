"""SoftREPA (arXiv 2503.08250): learned soft text tokens for frozen text-to-image models."""

__version__ = "0.1.0"
