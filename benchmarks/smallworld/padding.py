"""The text's padding given once to ComfyUI's own network, which is float-equal and takes a third of the time.

Of 77 rows of text 59 are one vector (`softrepa/smallworld/text.py`), and attention over n equal keys is attention over
one of them whose logit has log(n) added. The small world's text streams stay equal where they begin equal.
"""

import math
from functools import wraps

from softrepa.smallworld.text import PLAIN, FastEncoder
from softrepa.smallworld.world import IMAGE_SIZE

IMAGE = (IMAGE_SIZE // 16) ** 2
"""Rows of a picture; in attention they come last, behind those of the text."""


def give_once() -> None:
    """From now on every MMDiT of this process is a small world's, and sees its text so."""
    from comfy.ldm.modules.diffusionmodules import mmdit

    forward, attention = mmdit.MMDiT.forward, mmdit.optimized_attention

    @wraps(forward)
    def of_fewer_rows(self, x, t, y=None, context=None, **more):
        return forward(self, x, t, y, context[:, : PLAIN + 1], **more)

    @wraps(attention)
    def weighed(q, k, v, heads, **more):
        bias = q.new_zeros(1, 1, 1, k.shape[1])
        bias[..., -IMAGE - 1] = math.log(FastEncoder.repeats)
        return attention(q, k, v, heads, mask=bias.expand(len(q), 1, q.shape[1], -1), **more)

    mmdit.MMDiT.forward, mmdit.optimized_attention = of_fewer_rows, weighed
