"""ImageReward, by imscore in a Python environment of its own."""

import json
import os
import subprocess
from pathlib import Path

from ..errors import SoftREPAError, shown
from .pictures import Judge, Picture

WORKER = Path(__file__).with_name("image_reward_worker.py")
TOLD = 300
"""Characters of what a worker that failed says."""


class ImageReward(Judge):
    """ImageReward of prompts and pictures: arXiv 2304.05977. `python` has imscore; `weights` is what it loads.

    What imscore requires does not go together with every ComfyUI. Every batch loads the model anew.
    """

    batch = 1000

    def __init__(self, weights: Path, python: str, download: bool = False):
        self.command = [python, str(WORKER), str(weights)]
        offline = "0" if download else "1"  # its tokenizer has to be fetched once, too
        self.variables = {**os.environ, "HF_HUB_OFFLINE": offline, "TRANSFORMERS_OFFLINE": offline}
        self.variables.pop("PYTHONPATH", None)

    def __call__(self, pictures: list[Picture]) -> list[float]:
        given = json.dumps([[str(picture.path.absolute()), picture.prompt] for picture in pictures])
        try:
            done = subprocess.run(self.command, input=given, capture_output=True, encoding="utf-8", env=self.variables)
        except OSError as error:
            raise SoftREPAError(
                f'imagereward_python is "{shown(self.command[0])}" ({error.strerror}), expected a Python with imscore.'
            ) from None
        try:
            scores = json.loads(done.stdout.strip().rpartition("\n")[2])
        except ValueError:
            scores = None
        if done.returncode or not isinstance(scores, list) or len(scores) != len(pictures):
            last = done.stderr.strip().rpartition("\n")[2]
            raise SoftREPAError(
                f'imagereward_python "{shown(self.command[0])}" gave no scores ({shown(last, TOLD)}), expected a '
                "Python with imscore and its weights."
            )
        return scores
