"""Captions that are wrong by two swapped words: the hardest ones to tell from the right one."""

import itertools
import random
import re

JOINTS = frozenset(
    re.findall(
        r"\w+",
        """a an the this that these those his her its their my our your some any and or with without of in on at to from
        by for into onto off up down over under above below behind beside besides between near next against across
        along around inside outside left right top bottom front back side is are was were be being been has have there
        it as""",
    )
)
"""Words that part the phrases of a caption and are never swapped."""

EVEN_JOINTS = frozenset({"a", "an", "the", "and", "or", "with"})
"""Around these, phrases may change places and the caption still says the same."""

WORDS = re.compile(r"[\w'’-]+|[^\w'’-]+")

MOST = 4
"""Captions made of one."""


def swaps(caption: str) -> list[str]:
    """Up to MOST captions with the words of `caption`, two of which have changed places; the same ones every time.

    A swap is of the last words of two phrases ("a red circle left of a blue square": circle and square), or of the
    words the same distance before them (red and blue). Of those that say the same one is left, and none that says the
    same as `caption`.
    """
    words = WORDS.findall(caption)
    found: dict[tuple, str] = {}
    for first, second in itertools.combinations(_phrases(words), 2):
        for one, other in zip(reversed(first), reversed(second), strict=False):
            turned = list(words)
            turned[one], turned[other] = words[other], words[one]
            text = "".join(turned)
            found.setdefault(sense(text), text)
    found.pop(sense(caption), None)
    made = sorted(found.values())
    return sorted(random.Random(caption).sample(made, MOST)) if len(made) > MOST else made


def sense(caption: str) -> tuple:
    """What a caption says, as far as its words tell: its phrases in order, or in any where it is a plain list."""
    words = WORDS.findall(caption)
    phrases = _phrases(words)
    said = [tuple(words[place].casefold() for place in phrase) for phrase in phrases]
    within = {place for phrase in phrases for place in phrase}
    between = [word.casefold() for place, word in enumerate(words) if word[0].isalnum() and place not in within]
    if EVEN_JOINTS.issuperset(between):
        return tuple(sorted(said))
    return tuple(said), tuple(joint for joint in between if joint not in EVEN_JOINTS)


def _phrases(words: list[str]) -> list[list[int]]:
    """Places of the words between joints, phrase by phrase."""
    phrases: list[list[int]] = [[]]
    for place, word in enumerate(words):
        if word[0].isalnum() and word.casefold() not in JOINTS:
            phrases[-1].append(place)
        elif phrases[-1] and word.strip():
            phrases.append([])
    return [phrase for phrase in phrases if phrase]
