"""The help page of every node and its English texts against its schema."""

import re

from softrepa_tests.conftest import ROOT

from tools.translations import LOCALES, node_definitions, read_json

PAGES = {path.stem: path.read_text(encoding="utf-8") for path in ROOT.glob("nodes/web/docs/*.md")}


def section(page: str, title: str) -> str:
    """What stands under the heading `title` or its plural."""
    found = re.search(rf"^## {title}s?\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def explained(page: str) -> set[str]:
    """Inputs that a line begins with: "- `steps`, `scheduler`: the whole schedule"."""
    heads = re.findall(r"^- (`[^:]*):", section(page, "Input"), re.MULTILINE)
    return {name for head in heads for name in re.findall(r"`(\w+)`", head)}


def test_every_node_has_a_page_and_every_page_a_node(pack):
    assert PAGES.keys() == pack.keys()


def test_titles_are_the_display_names(pack):
    schemas = [node.define_schema() for node in pack.values()]
    assert {name: page.splitlines()[0] for name, page in PAGES.items()} == {
        schema.node_id: f"# {schema.display_name}" for schema in schemas
    }


def test_every_input_is_explained(pack):
    inputs = {name: {one.id for one in node.define_schema().inputs} for name, node in pack.items()}
    assert {name: explained(page) for name, page in PAGES.items()} == inputs


def test_every_output_is_named(pack):
    for name, node in pack.items():
        outputs = [output.display_name or output.io_type for output in node.define_schema().outputs]
        text = section(PAGES[name], "Output")
        assert [output for output in outputs if f"`{output}`" not in text] == [], name


def test_english_of_the_frontend_is_the_schemas(pack):
    found = node_definitions({name: node.GET_NODE_INFO_V1() for name, node in pack.items()})
    assert read_json(LOCALES / "en" / "nodeDefs.json") == found, "`python3 -m tools.translations` writes it"
