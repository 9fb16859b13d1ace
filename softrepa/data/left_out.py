"""What a folder holds that is not used, and why: counted by reason, so that a table of a million bad rows is a line."""

from collections import Counter

from ..errors import shown

REASONS = 8
"""Reasons that are told; of the others only how many there are."""
EXAMPLES = 2
"""Names told of each reason."""
LONGEST, LONGEST_REASON = 80, 120
"""Characters told of a name, and of a reason."""


class LeftOut:
    """Names of files and of rows by the reason why they are not used; it keeps EXAMPLES names of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, name: str, reason: str) -> None:
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(name)

    def told(self) -> str:
        """ "left out 3 (no caption: a.png; no text in t.csv (2): line 1, line 2)", the most frequent reasons first."""
        if not self.counts:
            return ""
        reasons = [self._reason(*entry) for entry in self.counts.most_common(REASONS)]
        if len(self.counts) > REASONS:
            reasons.append(f"and {len(self.counts) - REASONS} more reasons")
        return f"left out {self.counts.total()} ({'; '.join(reasons)})"

    def _reason(self, reason: str, count: int) -> str:
        names = [shown(name, LONGEST) for name in self.examples[reason]]
        number, more = (f" ({count})", ", ...") if count > len(names) else ("", "")
        return f"{shown(reason, LONGEST_REASON)}{number}: {', '.join(names)}{more}"
