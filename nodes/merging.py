"""A notice for graphs in which a merge would drop tokens: it takes nothing but weights of its second model."""

import logging
from collections import deque

from server import PromptServer

SOURCES = ("SoftREPALoadTokens", "SoftREPAApplyTokens")
SECOND = "model2"


def watch() -> None:
    """Looks at every prompt that is queued: where everything before the merge is cached, no node of ours would run."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.add_on_prompt_handler(tell)


def tell(request: dict) -> dict:
    """Writes the notice under the token nodes concerned; the request goes on as it came."""
    asked = request.get("prompt")
    graph = {name: node for name, node in asked.items() if is_node(node)} if isinstance(asked, dict) else {}
    for node, merge in dropped_by(graph).items():
        text = (
            f"{graph[merge]['class_type']} takes only the weights of {SECOND}: the tokens will not be in its result. "
            "Connect this node behind the merge."
        )
        logging.warning("SoftREPA: node %s: %s", node, text)
        PromptServer.instance.send_progress_text(text, node, request.get("client_id"))
    return request


def dropped_by(graph: dict) -> dict[str, str]:
    """Of a prompt in API form: each token node whose model reaches the second input of a merge, and that merge."""
    users: dict[str, list[tuple[str, str]]] = {}
    for name, node in graph.items():
        for key, value in node.get("inputs", {}).items():
            if isinstance(value, list) and len(value) == 2 and key.startswith("model"):
                users.setdefault(str(value[0]), []).append((name, key))
    found: dict[str, str] = {}
    for source in (name for name, node in graph.items() if node.get("class_type") in SOURCES):
        waiting, seen = deque([source]), {source}
        while waiting:
            for name, key in users.get(waiting.popleft(), []):
                if key == SECOND and "Merge" in graph[name]["class_type"]:
                    found.setdefault(source, name)
                elif name not in seen:
                    seen.add(name)
                    waiting.append(name)
    return found


def is_node(node: object) -> bool:
    return isinstance(node, dict) and isinstance(node.get("inputs"), dict) and isinstance(node.get("class_type"), str)
