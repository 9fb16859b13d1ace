"""A headless ComfyUI with this node pack in a folder of its own, driven over HTTP as a browser would."""

import asyncio
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import torch

from .environment import FRONTEND_VARIABLE, steady_threads

ROOT = Path(__file__).absolute().parents[1]
PACK = "comfyui-softrepa"
ANSI_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
NOT_IN_A_COPY = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "demo_output", "*.pyc")

OnProgress = Callable[[str, float, float], None]  # node id, steps done, steps in all (0 of 0 when a node starts)


class ServerError(RuntimeError):
    """The server did not start or has died; the message ends with the tail of its log."""


class PromptError(RuntimeError):
    """A node refused its inputs or failed."""

    def __init__(self, node_id: str | None, message: str):
        super().__init__(f"Node {node_id}: {message}" if node_id else message)
        self.node_id = node_id
        self.message = message


class PromptInterrupted(RuntimeError):
    """The prompt was cancelled."""


TEXT_UNDER_NODE = 3
"""The kind of such a binary message (ComfyUI's `BinaryEventTypes.TEXT`)."""


@dataclass(frozen=True)
class Result:
    outputs: dict[str, dict]  # by node id, as in ComfyUI's history
    images: dict[str, list[Path]]  # by node id, the pictures that were saved
    texts: dict[str, list[str]]  # by node id, what was written under it


class ComfyServer:
    """`with ComfyServer(work_folder) as server: server.run(graph)`.

    `work` holds models, input, output and the log; `extra_models` names more model folders by ComfyUI's folder type;
    `arguments` go to ComfyUI's main.py as they are. ComfyUI is the folder in COMFYUI_PATH unless it is given.
    """

    def __init__(
        self,
        work: Path | str,
        comfyui: Path | str | None = None,
        extra_models: Mapping[str, Sequence[Path]] | None = None,
        arguments: Sequence[str] = (),
        start_timeout: float = 300,
    ):
        self.work = Path(work).absolute()
        self.comfyui = Path(comfyui or os.environ["COMFYUI_PATH"]).absolute()
        self.extra_models = extra_models or {}
        self.arguments = arguments
        self.start_timeout = start_timeout
        self.log = self.work / "comfyui.log"

    def __enter__(self) -> "ComfyServer":
        for name in ("models", "input", "output", "user", "custom_nodes"):
            (self.work / name).mkdir(parents=True, exist_ok=True)
        link_folder(ROOT, self.work / "custom_nodes" / PACK)
        self.port = free_port()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command(), cwd=self.work, env=steady_threads(), stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def command(self) -> list[str | Path]:
        command: list[str | Path] = [
            sys.executable,
            self.comfyui / "main.py",
            "--base-directory",
            self.work,
            "--port",
            str(self.port),
        ]
        # No calls to the outside, no browser; the default database lies in the ComfyUI folder, which is not ours.
        command += ["--disable-api-nodes", "--disable-auto-launch", "--database-url", "sqlite:///:memory:"]
        if not has_accelerator():
            command += ["--cpu", "--use-pytorch-cross-attention"]  # the default attention takes twice as long there
        if self.extra_models:
            folders = {kind: "\n".join(str(path) for path in paths) for kind, paths in self.extra_models.items()}
            config = self.work / "extra_model_paths.yaml"
            config.write_text(json.dumps({"extra": folders}), encoding="utf-8")  # JSON is YAML
            command += ["--extra-model-paths-config", config]
        if (frontend := os.environ.get(FRONTEND_VARIABLE)) and "--front-end-root" not in self.arguments:
            command += ["--front-end-root", frontend]
        return [*command, *self.arguments]

    def wait_until_ready(self) -> None:
        end = time.monotonic() + self.start_timeout
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise ServerError(f"ComfyUI ended while it was starting:\n{self.log_tail()}")
            try:
                self.get("/system_stats")
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise ServerError(f"ComfyUI was not ready after {self.start_timeout:.0f} seconds:\n{self.log_tail()}")
        if "(IMPORT FAILED)" in self.log.read_text(encoding="utf-8", errors="replace"):
            raise ServerError(f"ComfyUI could not import the node pack:\n{self.log_tail(60)}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def log_tail(self, lines: int = 30) -> str:
        text = ANSI_COLOURS.sub("", self.log.read_text(encoding="utf-8", errors="replace"))
        return "\n".join(text.splitlines()[-lines:])

    def get(self, path: str) -> dict:
        return self.request("GET", path)[1]

    def request(self, method: str, path: str, body: dict | None = None) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)  # ignores proxies
        try:
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read() or b"{}")
        finally:
            connection.close()

    def object_info(self, node_class: str | None = None) -> dict:
        """Every node's inputs and outputs as the frontend sees them, or those of one node."""
        return self.get("/object_info") if node_class is None else self.get(f"/object_info/{node_class}")[node_class]

    def interrupt(self) -> None:
        """Cancel the prompt that runs; allowed from `on_progress` and from other threads."""
        self.request("POST", "/interrupt", {})

    def run(self, graph: dict, on_progress: OnProgress | None = None, timeout: float | None = None) -> Result:
        """Run an API-format graph to its end."""
        try:
            return asyncio.run(asyncio.wait_for(self.run_async(graph, on_progress), timeout))
        except TimeoutError:
            self.interrupt()
            raise

    async def run_async(self, graph: dict, on_progress: OnProgress | None = None) -> Result:
        client = uuid.uuid4().hex
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"ws://127.0.0.1:{self.port}/ws?clientId={client}", max_msg_size=0) as events,
        ):
            status, answer = self.request("POST", "/prompt", {"prompt": graph, "client_id": client})
            if status != 200:
                raise refusal(answer)
            texts = await self.follow(events, answer["prompt_id"], on_progress)
        return self.result(answer["prompt_id"], texts)

    async def follow(
        self, events: aiohttp.ClientWebSocketResponse, prompt_id: str, on_progress: OnProgress | None
    ) -> dict[str, list[str]]:
        """Pass progress on until the server says that the prompt has ended; the texts it wrote under nodes."""
        texts: dict[str, list[str]] = {}
        async for message in events:
            if message.type is not aiohttp.WSMsgType.TEXT:  # binary messages are previews and texts under nodes
                if found := text_under_node(message.data):
                    texts.setdefault(found[0], []).append(found[1])
                continue
            event = json.loads(message.data)
            data = event["data"]
            if data.get("prompt_id") != prompt_id:
                continue
            if event["type"] == "execution_error":
                raise PromptError(data["node_id"], data["exception_message"].strip())
            if event["type"] == "execution_interrupted":
                raise PromptInterrupted("The prompt was interrupted.")
            if event["type"] == "executing" and data["node"] is None:
                return texts
            if on_progress and event["type"] == "executing":
                on_progress(data["node"], 0, 0)
            if on_progress and event["type"] == "progress":
                on_progress(data["node"], data["value"], data["max"])
        raise ServerError(f"ComfyUI ended while a prompt was running:\n{self.log_tail()}")

    def result(self, prompt_id: str, texts: dict[str, list[str]]) -> Result:
        outputs = self.get(f"/history/{prompt_id}")[prompt_id]["outputs"]
        folders = {"output": self.work / "output", "temp": self.work / "temp", "input": self.work / "input"}
        images = {
            node: [folders[image["type"]] / image["subfolder"] / image["filename"] for image in output["images"]]
            for node, output in outputs.items()
            if "images" in output
        }
        return Result(outputs, images, texts)


def text_under_node(data) -> tuple[str, str] | None:
    """(node id, text) of a binary message, where it is one: kind, length of the id, id, text."""
    if not isinstance(data, bytes) or len(data) < 8 or int.from_bytes(data[:4], "big") != TEXT_UNDER_NODE:
        return None
    end = 8 + int.from_bytes(data[4:8], "big")
    return data[8:end].decode(), data[end:].decode()


def refusal(answer: dict) -> PromptError:
    """ComfyUI's answer to a graph that it will not run, as an error about the first node it names."""
    for node_id, node in answer.get("node_errors", {}).items():
        for error in node["errors"]:
            return PromptError(node_id, sentence(error))
    error = answer["error"]
    return PromptError(error.get("extra_info", {}).get("node_id"), sentence(error))


def sentence(error: dict) -> str:
    return ": ".join(part for part in (error["message"], error.get("details")) if part)


def has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def link_folder(source: Path, target: Path) -> None:
    """Make `source` appear at `target`: a link, on Windows a junction, or a copy where neither is permitted."""
    if target.exists():
        return
    try:
        if sys.platform == "win32":
            import _winapi

            _winapi.CreateJunction(str(source), str(target))
        else:
            target.symlink_to(source, target_is_directory=True)
    except OSError:
        shutil.copytree(source, target, ignore=NOT_IN_A_COPY)
