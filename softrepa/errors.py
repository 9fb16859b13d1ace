"""The one exception of the package, and how an input is repeated in a text of ours."""

import unicodedata

MOST_ECHOED = 200
"""Characters of an input that a message repeats."""
MOST_SAID = 4000
"""Characters of a whole message."""

UNPRINTED = ("Cc", "Cs", "Zl", "Zp")
"""Unicode's control characters, lone surrogates, and the two that end a line beside the control characters."""
TURNS_TEXT = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
"""Bidirectional classes of what makes a terminal show the rest of a line in another order."""


class SoftREPAError(ValueError):
    """A refusal: one sentence with the input's name, what was found and what was expected.

    Its text can always be encoded: ComfyUI logs it as UTF-8, and a lone surrogate in a log line ends its worker.
    """

    def __init__(self, message: str):
        super().__init__(cut(printable(message), MOST_SAID))


def printable(text: str) -> str:
    """`text` with everything that cannot be encoded, or that a terminal would act on, written as an escape.

    What ends a line or sets a column in a text of ours stays.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char in "\n\t" or is_plain(char) else ascii(char)[1:-1] for char in text)


def is_plain(char: str) -> bool:
    """Whether a character is one of a text in some language, and no command to whatever shows it."""
    return unicodedata.category(char) not in UNPRINTED and unicodedata.bidirectional(char) not in TURNS_TEXT


def shown(value: object, most: int = MOST_ECHOED) -> str:
    """An input as a message repeats it: on one line, cut where it is longer than `most` characters."""
    start = str(value)[: most + 1]  # escaping makes it longer, never shorter
    return cut(printable(start).replace("\n", "\\n").replace("\t", "\\t"), most)


def cut(text: str, most: int) -> str:
    """`text`, with dots for its end where it is longer than `most` characters."""
    return text if len(text) <= most else text[: most - 3] + "..."


def unwritable(path: object, error: OSError) -> SoftREPAError:
    """The refusal of a file of ours that the system would not write."""
    return SoftREPAError(f"{shown(path)} could not be written ({said(error)}), expected a folder with room.")


def said(error: OSError) -> str:
    """What the system says of a file, without the file's name, which stands beside it already."""
    return error.strerror or shown(error)
