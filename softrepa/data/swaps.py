"""Captions that are wrong by two swapped words: the hardest ones to tell from the right one.

The rules are for English. Captions in other languages get fewer swaps, and some that say the same.
"""

import itertools
import random
import re

WORD = re.compile(r"""[^\s.,;:!?()\[\]"“”…/|]+""")

JOINTS = frozenset(
    re.findall(
        r"\w+",
        """a an one the this that these those his her its their my our your some any and or with without of in on at to
        from by for into onto off up down over under above below behind beside besides between near next against across
        along around inside outside left right top bottom front back side is are was were be being been has have there
        it as picture photo photograph image drawing painting illustration sketch""",
    )
)
"""Words that part the phrases of a caption and are never swapped."""

EVEN_JOINTS = frozenset(
    {"a", "an", "one", "the", "and", "or", "with", "near", "beside", "besides", "between", "against"}
)
"""Where only these stand between phrases, they may change places and the caption still says the same."""

MOST = 4
"""Captions made of one."""
MOST_PHRASES, MOST_TRIED = 64, 1000
"""First phrases of a caption that are swapped, and swaps that are looked at: there are as many as squares of them."""


def swaps(caption: str) -> list[str]:
    """Up to MOST captions with the words of `caption`, two of which have changed places; the same ones every time.

    A swap is of the last words of two phrases ("a red circle left of a blue square": circle and square), or of the
    words the same distance before them (red and blue). Of those that say the same one is left, and none that says the
    same as `caption`.
    """
    parts = _Parts(caption)
    pairs = [
        pair
        for first, second in itertools.combinations(parts.phrases[:MOST_PHRASES], 2)
        for pair in zip(reversed(first), reversed(second), strict=False)
    ]
    random.Random(caption.encode(errors="surrogatepass")).shuffle(pairs)
    found = {parts.sense(parts.words): caption}
    for one, other in pairs[:MOST_TRIED]:
        turned = list(parts.words)
        turned[one], turned[other] = turned[other], turned[one]
        found.setdefault(parts.sense(turned), parts.text(turned))
        if len(found) > MOST:
            break
    return sorted(set(found.values()) - {caption})


def sense(caption: str) -> tuple:
    """What a caption says, as far as its words tell: its phrases in order, or in any where they are a plain list."""
    parts = _Parts(caption)
    return parts.sense(parts.words)


class _Parts:
    """A caption as words, what stands between them, and its phrases as places of words."""

    def __init__(self, caption: str):
        self.words = WORD.findall(caption)
        self.gaps = WORD.split(caption)
        self.phrases: list[list[int]] = []
        self.joints: list[list[str]] = [[]]
        """What stands before the first phrase, between two, after the last."""
        is_open = False
        for place, word in enumerate(self.words):
            is_joint = word.casefold() in JOINTS
            if is_joint:
                self.joints[-1].append(word.casefold())
            elif is_open and not self.gaps[place].strip():
                self.phrases[-1].append(place)
            else:
                self.phrases.append([place])
                self.joints.append([])
            is_open = not is_joint

    def text(self, words: list[str]) -> str:
        return self.gaps[0] + "".join(itertools.chain(*zip(words, self.gaps[1:], strict=True)))

    def sense(self, words: list[str]) -> tuple:
        runs: list[list[tuple[str, ...]]] = [[]]
        for phrase, joint in zip(self.phrases, self.joints, strict=False):
            if runs[-1] and not _is_even(joint):
                runs.append([])
            runs[-1].append(tuple(words[place].casefold() for place in phrase))
        ordered = [tuple(word for word in joint if word not in EVEN_JOINTS) for joint in self.joints]
        return tuple(tuple(sorted(run)) for run in runs), tuple(filter(None, ordered))


def _is_even(joint: list[str]) -> bool:
    words = set(joint) - ({"next", "to"} if "next" in joint else set())
    return words <= EVEN_JOINTS
