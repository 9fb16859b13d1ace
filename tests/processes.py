"""Several processes of one training run, as torchrun starts them: copies of this one."""

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable

import torch
from comfyui_softrepa.softrepa.training.ranks import joined

SECONDS = 120
"""Until a process counts as hanging."""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def together(count: int, work: Callable, *args) -> list:
    """`work(ranks, *args)` in `count` processes: what each returned, what ended it, or None of one that was killed."""
    context, port, running = multiprocessing.get_context("fork"), free_port(), []
    torch.set_num_threads(1)  # a forked process must not wait for threads that it does not have
    for index in range(count):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_process, args=(index, count, port, theirs, work, args))
        process.start()
        theirs.close()
        running.append((process, ours))
    return [_result(*one) for one in running]


def _process(index: int, count: int, port: int, out, work: Callable, args: tuple) -> None:
    given = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in given.items()} | {"MASTER_ADDR": "127.0.0.1"}
    try:
        with joined() as ranks:
            found = work(ranks, *args)
    except BaseException as error:
        traceback.print_exc(file=sys.stderr)
        found = error
    out.send_bytes(pickle.dumps(found))  # which holds tensors: torch's own way would need this process later


def _result(process, pipe):
    try:
        assert pipe.poll(SECONDS), "a process hangs"
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()
