"""Names, tooltips and help pages in other languages: complete, as generated, and true to the English."""

import re

import pytest
from softrepa_tests.conftest import ROOT

from tools.translations import (
    LANGUAGES,
    PAGES,
    as_message,
    blocks,
    english,
    generated,
    memory_of,
    problems,
    stray_stars,
    texts,
    titles_of,
    translated_page,
)

DEFINITIONS, ENGLISH = english()
WANTED, TITLES = texts(DEFINITIONS, ENGLISH), titles_of(DEFINITIONS, ENGLISH)
EVERY_LANGUAGE = pytest.mark.parametrize("name", LANGUAGES)
ASK = "`python3 -m tools.translations` writes them"
ZH = LANGUAGES["zh"]


@EVERY_LANGUAGE
def test_every_text_is_translated(name):
    found = problems(LANGUAGES[name], memory_of(name), WANTED, TITLES)
    assert found == [], f"to do in translations/{name}.json:\n" + "\n".join(found)


@EVERY_LANGUAGE
def test_files_are_as_generated(name):
    files = generated(name)
    assert [path for path, text in files.items() if not path.exists() or path.read_text("utf-8") != text] == [], ASK
    assert set(PAGES.glob(f"*/{name}.md")) <= files.keys(), ASK


def test_every_translation_has_its_language():
    assert {path.stem for path in PAGES.glob("*/*.md")} <= LANGUAGES.keys()
    assert {path.name for path in (ROOT / "locales").iterdir()} == {"en", *LANGUAGES}
    assert {path.stem for path in (ROOT / "translations").glob("*.json")} == LANGUAGES.keys()


def test_a_page_in_blocks_is_the_page():
    for page in ENGLISH.values():
        again = "\n".join(block.lead + block.text + block.tail for block in blocks(page))
        assert again.split() == page.split()


def test_a_page_is_translated_block_by_block():
    page = (
        "# Title\n\nA sentence of\ntwo lines.\n\n![Alt](a.jpg)\n\n## Inputs\n\n### Some\n\n"
        "- `steps`, `n_min`: how\n  many.\n\n| a | b |\n|---|---|\n| c | d |\n"
    )
    memory = {
        "Title": "标题",
        "A sentence of two lines.": "句子。",
        "Alt": "图",
        "Inputs": "输入",
        "Some": "一些",
        "`steps`, `n_min`: how many.": "`steps`、`n_min`：多少。",
        "steps": "步数",
        "n_min": "n_min",
        "| c | d |": "| 丙 | 丁 |",
    }
    node = {"inputs": {name: {"name": name, "tooltip": ""} for name in ("steps", "n_min")}, "outputs": {}}
    assert translated_page(page, node, memory, ZH) == (
        "# 标题\n\n> Translated from the English page. Corrections by native readers are welcome.\n\n句子。\n\n"
        "![图](a.jpg)\n\n## 输入\n\n### 一些\n\n- `steps`（步数）、`n_min`：多少。\n\n"
        "| a | b |\n|---|---|\n| 丙 | 丁 |\n"
    )


@pytest.mark.parametrize(
    ("text", "translation", "said"),
    [
        ("Up to 8 steps.", "最多八步。", "number 8 is missing"),
        ("Up to 8 steps.", "最多 8 到 9 步。", "number 9 is new"),
        ("Take `auto` there.", "选择自动。", "code `auto` is missing"),
        ("At 5% noise.", "在 5 噪声下。", "sign % is missing"),
        ("See [the page](a.md).", "见[页面](b.md)。", "link ](a.md) is missing"),
        ("Goes to *Compare Tokens* then.", "然后进入*比较*。", '"Compare Tokens" is called "比较令牌"'),
        ("It says so as it should.", "Es sagt es.", "not in the language"),
        ("Up to 8 steps.", "最多 8 步。\n", "more than one line"),
        ("Up to 8 steps.", "最多 ８ 步。", "full-width"),
        ("A long sentence about the noise of a picture. " * 3, "图像的噪声。", "too short"),
        ("For *Save (all)* of it.", "用于*保存（全部）*节点。", "* shows as it is"),
    ],
)
def test_what_does_not_fit_is_said(text, translation, said):
    memory = {"Compare Tokens": "比较令牌"}
    (found,) = problems(ZH, memory | {text: translation}, [text, *memory], memory)
    assert said in found


def test_a_changed_text_is_shown_with_what_it_was():
    memory = {"How many steps run.": "运行多少步。", "Gone": "旧"}
    assert problems(ZH, memory, ["How many of the steps run."], []) == [
        "missing: How many of the steps run.",
        "    was: How many steps run.\n         运行多少步。",
        "unused: How many steps run.",
        "unused: Gone",
    ]


@pytest.mark.parametrize("text", ["**粗体**文字", "见*保存*。", "（*保存*）", "*保存（全部）* 节点", "a *b* **c** d"])
def test_emphasis_that_shows_as_such(text):
    assert list(stray_stars(text)) == []


@pytest.mark.parametrize("text", ["用*保存（全部）*节点", "**注意：**保存", "用**“保存”**节点", "a * b", "一*二"])
def test_emphasis_that_shows_its_stars(text):
    assert list(stray_stars(text))


def test_names_are_plain_for_the_frontends_messages():
    assert as_message("a | b {c} 5%") == "a {'|'} b {'{'}c{'}'} 5{'%'}"


@EVERY_LANGUAGE
def test_inputs_of_a_page_show_their_names(name):
    """Spot check of what people compare with the node before them."""
    page = generated(name)[PAGES / "SoftREPATrainTokens" / f"{name}.md"]
    shown = memory_of(name)["steps"]
    assert re.search(rf"^- .*`steps`[（(]{shown}[）)]", page, re.MULTILINE)
