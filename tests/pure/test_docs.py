"""What the documents say can be followed: links, examples, files and commands."""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from comfyui_softrepa.softrepa.__main__ import parser
from softrepa_tests.conftest import ROOT
from softrepa_tests.repository import files, shipped

KNOWN = set(files())
FOLDERS = {folder for path in KNOWN for folder in path.parents}
TRANSLATED = ":!nodes/web/docs/*/*.md"
"""Pages are generated from those below docs/, to which their pictures' names belong."""
PAGES = {path: (ROOT / path).read_text(encoding="utf-8") for path in files("*.md", TRANSLATED)}
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=str)

LINK = re.compile(r"\]\(\s*([^)\s]+)\s*\)")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
COMMAND = re.compile(r"python3? -m (?:torch\.distributed\.run .*?-m )?([\w.]+)(.*)")
"""Also what torchrun starts several times, whose own options are PyTorch's."""
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
OUR_PATH = re.compile(r"(?:benchmarks|docs|nodes|softrepa|tests|tools|workflows)/[\w./-]*")
HANDS_ITS_OPTIONS_ON = {"tests.run"}  # to pytest


def inline_code(text: str) -> list[str]:
    """What stands between backticks, also where it goes on in the next line."""
    return [" ".join(code.split()) for code in INLINE.findall(FENCE.sub("", text))]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Module and arguments of every `python -m`, in blocks and between backticks."""
    blocks = [line for line in text.splitlines() if "`" not in line]
    found = [match for line in blocks + inline_code(text) for match in COMMAND.findall(line)]
    return [(module, shlex.split(arguments)) for module, arguments in found]


def anchors(text: str) -> set[str]:
    """The headings as GitHub names them in links."""
    titles = re.findall(r"^#+ (.*?)\s*$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@cache
def help_of(module: str, *command: str) -> str:
    """What `--help` prints."""
    if module != "softrepa":
        run = [sys.executable, "-m", module, *command, "--help"]
        return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        parser().parse_args([*command, "--help"])
    return text.getvalue()


def subcommand(module: str, arguments: list[str]) -> tuple[str, ...]:
    """The first of the arguments that the module offers as a command."""
    return tuple([word for word in arguments if word in subcommands(module)][:1])


def subcommands(module: str) -> list[str]:
    offered = re.search(r"\{([\w,]+)\}\s+\.\.\.", help_of(module))
    return offered[1].split(",") if offered else []


def options(module: str, arguments: list[str]) -> set[str]:
    """Those that the module takes, with the subcommand that the arguments name."""
    return set(OPTION.findall(help_of(module) + help_of(module, *subcommand(module, arguments))))


@EVERY_PAGE
def test_links_lead_somewhere(page):
    for target in LINK.findall(FENCE.sub("", PAGES[page])):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        name, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert path.relative_to(ROOT) in KNOWN | FOLDERS, f"{target} is not in the repository"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", sorted(map(str, {Path("README.md"), *files("docs")} - {Path("docs/study.md")})))
def test_what_a_person_reads_leads_to_what_is_installed(page):
    """The archive holds no tests, tools and benchmarks; what the study shows lies there, as it says."""
    installed = set(shipped())
    installed |= {folder for path in installed for folder in path.parents}
    for target in LINK.findall(FENCE.sub("", PAGES[Path(page)])):
        name = target.partition("#")[0]
        if name and not target.startswith("https://"):
            assert ((ROOT / page).parent / name).resolve().relative_to(ROOT) in installed, target


def test_the_readme_is_one_page_and_leads_to_every_other():
    readme = PAGES[Path("README.md")]
    assert len(readme.split()) < 1400
    linked = {Path(target.partition("#")[0]) for target in LINK.findall(readme)}
    assert {*files("docs"), Path("ARCHITECTURE.md"), Path("CONTRIBUTING.md"), Path("CHANGELOG.md")} <= linked


@EVERY_PAGE
def test_no_command_waits_for_its_reader_to_fill_in(page):
    """Capital letters are the sign of what a reader chooses."""
    code = FENCE.findall(PAGES[page]) + [("", line) for line in PAGES[page].splitlines() if line.startswith("    ")]
    assert not [body for _, body in code if re.search(r"<[a-z ]+>", body)]


@EVERY_PAGE
def test_json_is_json(page):
    blocks = [body for language, body in FENCE.findall(PAGES[page]) if language == "json"]
    for text in blocks + [code for code in inline_code(PAGES[page]) if code.startswith(("{", "["))]:
        json.loads(text)


@EVERY_PAGE
def test_files_exist(page):
    modules = {path.name for path in KNOWN if path.suffix == ".py"}
    for code in inline_code(PAGES[page]):
        if OUR_PATH.fullmatch(code):
            assert Path(code) in KNOWN | FOLDERS, code
        if re.fullmatch(r"\w+\.py", code):
            assert code in modules, code


@EVERY_PAGE
def test_commands_exist(page):
    for module, arguments in commands(PAGES[page]):
        path = Path(*module.split("."))
        assert {path.with_suffix(".py"), path / "__main__.py"} & KNOWN, f"python -m {module}"
        if module == "softrepa" and arguments:
            parser().parse_args(arguments)  # exits where they do not fit
        elif module not in HANDS_ITS_OPTIONS_ON:
            assert {word for word in arguments if word.startswith("--")} <= options(module, arguments)
            assert subcommand(module, arguments) or not (arguments and subcommands(module)), arguments


@EVERY_PAGE
def test_options_exist(page):
    """Those that the text speaks of apart from a command belong together to one of the page's commands."""
    named = [one for one in commands(PAGES[page]) if one[0] not in HANDS_ITS_OPTIONS_ON]
    for code in inline_code(PAGES[page]):
        if code.startswith("--"):
            wanted = set(OPTION.findall(code))
            assert any(wanted <= options(module, arguments) for module, arguments in named), code


def test_there_is_something_to_check():
    assert {Path("README.md"), Path("CHANGELOG.md")} <= PAGES.keys()
    assert [module for module, _ in commands(PAGES[Path("README.md")])].count("softrepa") >= 4


BESIDE = {
    "LoRA": "test_lora",
    "ControlNet": "test_controlnet",
    "areas and masks": "test_area_and_mask",
    "conditioning hooks": "test_conditioning_hooks_with_a_schedule",
    "PAG": "test_perturbed_attention_guidance",
    "SAG": "test_roles_under_other_guiders",
    "Skip Layer Guidance": "test_skip_layer_guidance",
    "Perp-Neg": "test_roles_under_other_guiders",
    "Dual CFG": "test_roles_under_other_guiders",
    "NAGuidance": "test_cores_normalized_attention_guidance",
    "TorchCompileModel": "test_torch_compile",
    "fp8 and other weight types": "test_weights_in_other_dtypes",
    "offloaded weights": "test_partial_loading_that_offloads",
    "sage or flash attention": "test_an_override_that_takes_no_masks",
    "KJNodes' Patch Sage Attention": "test_an_override_that_takes_no_masks",
    "NegPip": "test_keys_and_values_in_turn",
    "Attention Couple of comfyui-ppm": "test_every_region_gets_tokens_by_its_role",
    "other packs' attention couple": "test_whose_regions_they_are_must_be_known_where_it_matters",
    "IPAdapter and its like, which replace cross-attention": "test_attn2_replacement_cannot_be_weighed",
    "the NAG pack's own guider and samplers": "test_attention_out_of_reach_cannot_be_weighed",
    "samplers that cut one image into tiles within a batch": "test_uneven_batches_are_refused_where_roles_matter",
    "ModelMergeSimple and other merges": (
        "test_a_merge_that_drops_tokens_says_so_under_the_node_also_when_it_is_cached"
    ),
}
"""What the README says that tokens work with, and the test of it."""


def test_what_tokens_work_with_is_what_is_tested():
    rows = re.findall(r"^  \| (?!beside|---)(.*?) \| .*? \|$", PAGES[Path("README.md")], re.MULTILINE)
    assert len(rows) > 8
    said = re.sub(r"[*`]", "", "; ".join(rows))
    for name in sorted(BESIDE, key=len, reverse=True):
        assert name in said, name
        said = said.replace(name, "")
    assert not re.sub(r"[,;\s]|and", "", said)
    tests = "\n".join((ROOT / path).read_text(encoding="utf-8") for path in files("tests/comfy/*.py"))
    for test in BESIDE.values():
        assert f"def {test}(" in tests, test
