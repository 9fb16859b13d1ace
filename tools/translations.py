"""Writes locales/*/nodeDefs.json and the help pages nodes/web/docs/*/*.md from the English and translations/*.json.

    python3 -m tools.translations [--without-comfyui] [LANGUAGE ...]

The English of the nodes is read from a running ComfyUI. translations/zh.json holds {English: translation} in the order
in which the texts are met; new ones are added with nothing beside them. What is missing, unused, or does not fit its
English is listed, and then the command ends with 1.
"""

import argparse
import difflib
import json
import re
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import environment

ROOT = Path(__file__).absolute().parents[1]
MEMORIES, LOCALES, PAGES = ROOT / "translations", ROOT / "locales", ROOT / "nodes" / "web" / "docs"
NOTE = "Translated from the English page. Corrections by native readers are welcome."
ALIKE = 0.6
"""From here on a missing text is shown with the unused one that it may have come from."""

CODE = re.compile(r"`[^`]+`")
LEAD = re.compile(r"\s*(?:#+ |- |\d+\. |> )?")
IMAGE = re.compile(r"(!\[)([^]]*)(\]\([^)]*\))")
HEAD = re.compile(r"^(?:`[^`]+`(?:, |、|，| and )*)+")
RULE = re.compile(r"[|:\- ]*")
LINK = re.compile(r"\]\([^)]*\)")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
STARS = re.compile(r"\*+")


@dataclass(frozen=True)
class Language:
    letters: str
    """Of a regular expression: what no sentence of the language is without."""
    brackets: str
    """Around the name that an input has on the node, behind the one it has in prompts."""


LANGUAGES = {
    "zh": Language("[一-鿿]", "（{}）"),
    "ja": Language("[ぁ-ヿ]", "（{}）"),
    "ko": Language("[가-힣]", "({})"),
}


@dataclass(frozen=True)
class Block:
    """A heading, paragraph, entry of a list or row of a table; without `text` it is the same in every language."""

    lead: str
    text: str
    tail: str = ""


def node_definitions(info: Mapping[str, dict]) -> dict:
    """The English nodeDefs of nodes as in ComfyUI's object_info."""
    definitions = {}
    for node_id, node in sorted(info.items()):
        inputs: dict[str, list] = {}
        for group in ("required", "optional"):
            inputs |= {name: node["input"][group][name] for name in node["input_order"].get(group, [])}
        outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
        definitions[node_id] = {
            "display_name": node["display_name"],
            "description": node["description"],
            "inputs": {name: {"name": name, "tooltip": entry[1]["tooltip"]} for name, entry in inputs.items()},
            "outputs": {str(slot): {"name": name, "tooltip": tooltip} for slot, (name, tooltip) in enumerate(outputs)},
        }
    return definitions


def blocks(page: str) -> list[Block]:
    """A page in order; lines that belong together are one."""
    found: list[Block] = []
    for line in page.splitlines():
        lead = LEAD.match(line)[0]  # type: ignore[index]
        if not line.strip() or RULE.fullmatch(line):
            found.append(Block(line, ""))
        elif image := IMAGE.fullmatch(line):
            found.append(Block(*image.groups()))
        elif lead.strip() or line.startswith("|") or not found or not found[-1].text or found[-1].lead.startswith("#"):
            found.append(Block(lead, line[len(lead) :]))
        else:
            found[-1] = Block(found[-1].lead, f"{found[-1].text} {line.strip()}")
    return found


def texts(definitions: dict, pages: Mapping[str, str]) -> list[str]:
    """All that has a translation, each once."""
    found = [NOTE]
    for node_id, node in definitions.items():
        found += [node["display_name"], node["description"]]
        for entry in (*node["inputs"].values(), *node["outputs"].values()):
            found += [entry["name"], entry["tooltip"]]
        found += [block.text for block in blocks(pages[node_id]) if block.text]
    return list(dict.fromkeys(found))


def as_message(text: str) -> str:
    """Names and descriptions are messages of vue-i18n, which have a syntax; tooltips are plain text."""
    return re.sub(r"[@{}|%]", lambda sign: "{'" + sign[0] + "'}", text)


def messages(definitions: dict, memory: Mapping[str, str]) -> dict:
    """nodeDefs.json of a language; what has no translation is left out, and the frontend shows its English."""

    def of(entry: dict) -> dict:
        known = {key: memory.get(text) for key, text in entry.items() if isinstance(text, str)}
        return {key: text if key == "tooltip" else as_message(text) for key, text in known.items() if text}

    return {
        node_id: of(node)
        | {group: {name: of(entry) for name, entry in node[group].items()} for group in ("inputs", "outputs")}
        for node_id, node in definitions.items()
    }


def translated_page(page: str, node: dict, memory: Mapping[str, str], language: Language) -> str:
    """The page with the note below its title, and the names that inputs and outputs have on the node in that language.

    Pictures are found from the folder of the English pages: the frontend puts it before their names in every language.
    """
    lines: list[str] = []
    names: dict[str, str] = {}
    for block in blocks(page):
        text = memory.get(block.text) or block.text
        if block.lead == "## ":
            group = node.get(block.text.removesuffix("s").lower() + "s", {})
            names = {entry["name"]: memory.get(entry["name"]) or entry["name"] for entry in group.values()}
        elif block.lead == "- ":
            text = with_names(text, names, language)
        lines.append(block.lead + text + block.tail)
        if block.lead == "# ":
            lines += ["", f"> {memory.get(NOTE) or NOTE}"]
    return "\n".join(lines) + "\n"


def with_names(entry: str, names: Mapping[str, str], language: Language) -> str:
    """An entry of a list with the translated name behind each of those that it begins with."""

    def named(code: re.Match) -> str:
        name = code[0].strip("`")
        shown = names.get(name, name)
        return code[0] if shown == name else code[0] + language.brackets.format(shown)

    return HEAD.sub(lambda head: CODE.sub(named, head[0]), entry)


def problems(language: Language, memory: Mapping[str, str], wanted: Iterable[str], titles: Iterable[str]) -> list[str]:
    """A line for each text that is missing, unused, or does not fit; `titles` are names that it may hold."""
    wanted, titles = list(wanted), list(titles)
    unused = [english for english in memory if english not in set(wanted)]
    found = []
    for english in wanted:
        if not memory.get(english):
            found.append(f"missing: {english}")
            found += [f"    was: {old}\n         {memory[old]}" for old in close(english, unused)]
        else:
            wrong = ", ".join(differences(language, english, memory[english], memory, titles))
            found += [f"{wrong}: {english}\n    {memory[english]}"] if wrong else []
    return found + [f"unused: {english}" for english in unused]


def close(english: str, unused: list[str]) -> list[str]:
    return difflib.get_close_matches(english, unused, n=1, cutoff=ALIKE)


def differences(
    language: Language, english: str, translation: str, memory: Mapping[str, str], titles: Iterable[str]
) -> Iterator[str]:
    """What a translation lacks, or has that the English has not."""
    plain, other = CODE.sub("", english), CODE.sub("", translation)
    for kind, pattern, (one, two) in (
        ("code", CODE, (english, translation)),
        ("link", LINK, (plain, other)),
        ("number", NUMBER, (LINK.sub("", plain), LINK.sub("", other))),
        ("sign", re.compile(r"[|%]"), (plain, other)),
    ):
        lost, new = Counter(pattern.findall(one)), Counter(pattern.findall(two))
        yield from (f"{kind} {part} is missing" for part in (lost - new).elements())
        yield from (f"{kind} {part} is new" for part in (new - lost).elements())
    for title in titles:
        if re.search(rf"\*{re.escape(title)}\*", english) and (memory.get(title) or title) not in translation:
            yield f'"{title}" is called "{memory.get(title) or title}"'
    if re.search(r"[０-９Ａ-Ｚａ-ｚ]", translation):
        yield "full-width letters or digits"
    if translation != translation.strip() or "\n" in translation:
        yield "more than one line, or blanks around it"
    words = re.findall(r"[a-z]{2,}", re.sub(r"\*[^*]+\*", "", plain))
    if len(words) > 3 and not re.search(language.letters, translation):
        yield "not in the language"
    if len(english) > 100 and len(translation) < len(english) / 6:
        yield "too short"
    yield from (f"* shows as it is behind {where!r}" for where in stray_stars(other))


def stray_stars(text: str) -> Iterator[str]:
    """What stands before stars that CommonMark takes for no emphasis: between a bracket or comma and a letter.

    That is common where no blanks are written between words: *（a）*b.
    """
    is_open = False
    for stars in STARS.finditer(text):
        before, after = text[: stars.start()][-1:] or " ", text[stars.end() :][:1] or " "
        inside, outside = (before, after) if is_open else (after, before)
        if inside.isspace() or (is_sign(inside) and not outside.isspace() and not is_sign(outside)):
            yield text[: stars.end()][-8:]
        is_open = not is_open
    if is_open:
        yield text[-8:]


def is_sign(letter: str) -> bool:
    return unicodedata.category(letter)[0] in "PS"


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def as_json(content: dict) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def english() -> tuple[dict, dict[str, str]]:
    """Definitions and pages as they lie in the repository."""
    definitions = read_json(LOCALES / "en" / "nodeDefs.json")
    return definitions, {name: (PAGES / f"{name}.md").read_text(encoding="utf-8") for name in definitions}


def memory_of(name: str) -> dict[str, str]:
    path = MEMORIES / f"{name}.json"
    return read_json(path) if path.exists() else {}


def titles_of(definitions: dict, pages: Mapping[str, str]) -> list[str]:
    """What texts may speak of by its name: nodes and headings."""
    headings = [block.text for page in pages.values() for block in blocks(page) if block.lead.startswith("#")]
    return list(dict.fromkeys([node["display_name"] for node in definitions.values()] + headings))


def generated(name: str) -> dict[Path, str]:
    """What the files of a language hold."""
    definitions, pages = english()
    memory = memory_of(name)
    files = {LOCALES / name / "nodeDefs.json": as_json(messages(definitions, memory))}
    for node_id, node in definitions.items():
        page = translated_page(pages[node_id], node, memory, LANGUAGES[name])
        files[PAGES / node_id / f"{name}.md"] = page
    return files


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def write_english() -> None:
    from .server import ComfyServer

    with tempfile.TemporaryDirectory() as work, ComfyServer(work) as server:
        info = {name: node for name, node in server.object_info().items() if node["category"] == "SoftREPA"}
    write(LOCALES / "en" / "nodeDefs.json", as_json(node_definitions(info)))


def write_language(name: str) -> list[str]:
    """Puts the memory in order, writes the language's files, removes those of nodes that are gone; its problems."""
    definitions, pages = english()
    memory, wanted = memory_of(name), texts(definitions, pages)
    known = {text: translation for text, translation in memory.items() if translation}
    write(MEMORIES / f"{name}.json", as_json({text: memory.get(text, "") for text in wanted} | known))
    files = generated(name)
    for path, text in files.items():
        write(path, text)
    for path in set(PAGES.glob(f"*/{name}.md")) - files.keys():
        path.unlink()
    return problems(LANGUAGES[name], memory, wanted, titles_of(definitions, pages))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m tools.translations", description=__doc__.splitlines()[0])
    environment.add_arguments(parser)
    parser.add_argument(
        "--without-comfyui", action="store_true", help="take the English of the nodes from locales/en as it is"
    )
    parser.add_argument("languages", metavar="LANGUAGE", nargs="*", help=f"of {', '.join(LANGUAGES)}; all by default")
    arguments = parser.parse_args()
    for name in arguments.languages:
        if name not in LANGUAGES:
            parser.error(f'LANGUAGE is "{name}", expected one of {", ".join(LANGUAGES)}.')
    if not arguments.without_comfyui:
        environment.enter("tools.translations", arguments.comfyui, arguments.python)
        write_english()
    found = {name: write_language(name) for name in arguments.languages or LANGUAGES}
    for name, lines in found.items():
        print(f"{name}: {len(lines)} to do in translations/{name}.json" if lines else f"{name}: complete")
        print(*lines, sep="\n", end="\n" if lines else "")
    sys.exit(any(found.values()))


if __name__ == "__main__":
    main()
