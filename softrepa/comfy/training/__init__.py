"""Training and scoring on a MODEL."""
