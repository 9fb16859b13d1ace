"""More than one device: whether the processes of a run agree, and what is said where some devices are idle."""

from pathlib import Path

import torch

from ...errors import SoftREPAError
from ...training.ranks import Ranks
from ...training.state import differences

PACK = Path(__file__).absolute().parents[3]


def check_alike(ranks: Ranks, identity: dict[str, object]) -> None:
    """That all processes do the same on the same. Raises SoftREPAError, naming what differs."""
    if changes := differences(ranks.told(identity), identity):
        raise SoftREPAError(
            f"Process {ranks.index + 1} of {ranks.count} is not like the first ({'; '.join(changes)}), "
            "expected the same model, images, captions and kind of device for each."
        )


def idle_devices(tokens: Path) -> str:
    """The command that goes on with the run that writes `tokens` on all GPUs, where there are several."""
    count = torch.cuda.device_count()
    if count < 2:
        return ""
    return (
        f"This run uses one of {count} GPUs. Stopped, it goes on with all of them by this in a terminal in {PACK}: "
        f'python -m torch.distributed.run --standalone --nproc-per-node={count} -m softrepa train "{tokens}" '
        "--checkpoint NAME --resume"
    )
