"""The one exception of the package."""


class SoftREPAError(ValueError):
    """A refusal: one sentence with the input's name, what was found and what was expected."""
