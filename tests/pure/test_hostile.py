"""Files, names and texts that are broken or made to do harm: each is refused in a sentence, and costs little."""

import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import venv
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from comfyui_softrepa.softrepa import __main__ as command_line
from comfyui_softrepa.softrepa import configuration, locks, token_files
from comfyui_softrepa.softrepa.data import swaps
from comfyui_softrepa.softrepa.errors import MOST_SAID, SoftREPAError, printable, shown
from comfyui_softrepa.softrepa.families import FAMILIES, parse_blocks
from comfyui_softrepa.softrepa.files import UnreadableError, parse_json, read_bounded, write_tensors
from comfyui_softrepa.softrepa.tokens import SoftTokens
from comfyui_softrepa.softrepa.training import state as training_state
from comfyui_softrepa.softrepa.training.timesteps import parse_timesteps
from safetensors.torch import save_file
from softrepa_tests.toy_training import trainer

ROOT = Path(__file__).resolve().parents[2]
HUGE = "1" * 5000
"""More digits than Python makes a number of."""
DEEP = "[" * 100_000
LONG = "x" * 300
"""Longer than a file name can be."""
POSIX = os.name == "posix"


def seconds(limit: int, action):
    """What `action` returns or raises; where it hangs, nothing."""
    outcome: list = []

    def run():
        try:
            outcome.append(action())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit)
    return outcome[0] if outcome else None


def sd15(**metadata: str) -> SoftTokens:
    return SoftTokens.of(torch.ones(4, 768), "sd15", ("down",), time_table=torch.ones(100, 768), metadata=metadata)


# Texts


@pytest.mark.parametrize("text", ["caf\udce9", "\ud800 alone", "a\x1b[31mred", "\x9b1m", "one\u2028two", "\u202eabc"])
def test_what_cannot_be_encoded_or_commands_a_terminal_is_escaped(text):
    for made in (str(SoftREPAError(text)), printable(text), shown(text), str(UnreadableError(text))):
        made.encode("utf-8")
        assert made.isprintable()
        assert "\\" in made


@pytest.mark.parametrize("text", ["全角　空白", "👩‍👩‍👧", "می‌خواهم", "line one\n\tline two", "é ü ß", "\u00a0"])
def test_what_people_write_stays(text):
    assert printable(text) == text
    assert str(SoftREPAError(text)) == text


def test_an_input_is_shown_on_one_line_and_short():
    assert shown("a\nb\tc") == "a\\nb\\tc"
    assert shown("y" * 10**6) == "y" * 197 + "..."
    assert len(shown("\udcff" * 1000)) == 200
    assert len(str(SoftREPAError("z" * 10**6))) == MOST_SAID


# Reading


@pytest.fixture
def unending(tmp_path):
    """Files that never end, by kind."""
    found = {"a folder": tmp_path}
    if POSIX:
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "zeros").symlink_to("/dev/zero")
        found |= {"a pipe": tmp_path / "pipe", "a device": tmp_path / "zeros"}
    return found


def test_only_regular_files_are_read(unending):
    for kind, path in unending.items():
        error = seconds(60, lambda path=path: read_bounded(path, 1000))
        assert isinstance(error, OSError), (kind, error)
    if POSIX:
        before = len(list(Path("/dev/fd").iterdir()))
        for path in unending.values():
            with pytest.raises(UnreadableError, match="no regular file"):
                read_bounded(path, 1000)
        assert len(list(Path("/dev/fd").iterdir())) == before


def test_sizes_and_names_are_bounded(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"1234")
    assert read_bounded(path, 4) == b"1234"
    with pytest.raises(UnreadableError, match="^4 bytes, expected at most 3$"):
        read_bounded(path, 3)
    for name in ("a\0b", "\ud800"):
        with pytest.raises(OSError, match=r"no name that a file can have|No such file"):
            read_bounded(tmp_path / name, 4)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (DEEP, "JSON that is nested too deep"),
        (f"[{HUGE}]", "no JSON: Exceeds the limit"),
        (b"\xff\xfe\xff", "no JSON: "),
        ("{", "no JSON: Expecting property name"),
    ],
)
def test_any_json(content, reason):
    with pytest.raises(UnreadableError, match=reason):
        parse_json(content)


# Token files


class Called:
    """What a pickle would call, and with what."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def zipped(path: Path, pickle: bytes, numbers: bytes = b"", compression=zipfile.ZIP_STORED, extra: int = 0) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/data/0", numbers)
        for index in range(extra):
            archive.writestr(f"archive/more/{index}", b"")


def strided(size, stride, count, offset=0) -> bytes:
    """The pickle of a float tensor, as torch writes it, of any size."""

    def number(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    def numbers(values) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + number(count)
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    rest = numbers(size) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)Rt"
    return b"\x80\x02" + rebuild + storage + b"tQ" + number(offset) + rest + b"R."


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (Called(torch.nn.Embedding, 10**6, 768), "asks for torch.nn.modules.sparse.Embedding to be run"),
        (Called(bytearray, 10**10), r"asks for (__builtin__|builtins)\.bytearray to be run"),
        (Called(torch.FloatStorage, 10**10), "asks for torch.FloatStorage to be run"),
        (torch.zeros(1).expand(10**6, 768), "holds 1 numbers for a tensor of shape"),
        (torch.zeros(1, 1).expand(4, 768), "holds 1 numbers for a tensor of shape"),
        (
            lambda: torch.nested.nested_tensor([torch.zeros(2, 768)]),
            "asks for torch._utils._rebuild_nested_tensor to be run",
        ),
        ({("a", "key"): 1}, "a dictionary with a tuple for a key"),
        ("x" * 10**5, "a pickle of 100,0.. bytes, expected at most"),
    ],
    ids=["embedding", "bytearray", "storage", "stride 0", "small stride 0", "nested", "key", "pickle"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_pickle_makes_nothing_that_the_file_does_not_hold(tmp_path, monkeypatch, content, reason):
    path = tmp_path / "dc_tokens.pth"
    torch.save(content() if callable(content) else content, path)

    def made(*_, **__):
        raise AssertionError("it was made")

    monkeypatch.setattr(torch.nn.Embedding, "__init__", made)
    monkeypatch.setattr(torch, "load", made)
    with pytest.raises(SoftREPAError, match=rf"dc_tokens\.pth cannot be read \(.*{reason}"):
        token_files.load(path)


@pytest.mark.parametrize(
    ("pickle", "numbers"),
    [
        (strided((10**6, 768), (768, 1), 10), bytes(40)),
        (strided((10**6, 768), (768, 1), 768 * 10**6), bytes(40)),
        (strided((4, 768), (768, 1), 3072, offset=1), bytes(4 * 3072)),
        (strided((4, 768), (768, -1), 3072), bytes(4 * 3072)),
        (strided((2**62, 2**62), (1, 1), 3072), bytes(4 * 3072)),
        (strided((1,) * 1000, (1,) * 1000, 1), bytes(4)),
        (strided((4, 768), (768, 1), 3072), b""),
        (b"\x80\x02" + b"(" * 60000 + b".", b""),
        (b"\x80\x02" + b")\x85" + b"\x85" * 60000 + b".", b""),
        (b"\x80\x02" + b"L" + b"1" * 60000 + b"L\n.", b""),
        (b"\x80\x02h\x00.", b""),
        (b"", b""),
    ],
)
def test_broken_pickles(tmp_path, pickle, numbers):
    path = tmp_path / "dc_tokens.pth"
    zipped(path, pickle, numbers)
    with pytest.raises(SoftREPAError, match=r"dc_tokens\.pth cannot be read \(it ") as caught:
        token_files.load(path)
    assert len(str(caught.value)) < 400
    zipped(path, strided((4, 768), (768, 1), 3072), bytes(4 * 3072))
    assert token_files.load(path).tokens.shape == (4, 768)


def test_archives_that_unfold_are_refused(tmp_path):
    path = tmp_path / "dc_tokens.pth"
    good = strided((4, 768), (768, 1), 3072)
    zipped(path, good, bytes(10**7), compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**5
    with pytest.raises(SoftREPAError, match="its contents are compressed"):
        token_files.load(path)
    zipped(path, good, bytes(4 * 3072), extra=1000)
    with pytest.raises(SoftREPAError, match="a .zip of more than 64 files"):
        token_files.load(path)


def test_files_of_old_torch_are_read_too(tmp_path):
    path = tmp_path / "dc_tokens.pth"
    for tokens in (torch.randn(4, 768), torch.randn(768, 4).T):
        torch.save(tokens, path, _use_new_zipfile_serialization=False)
        assert torch.equal(token_files.load(path).tokens, tokens)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(SoftREPAError, match="is not a whole file saved by torch"):
        token_files.load(path)


def safetensors_file(path: Path, header: object) -> None:
    """Four bytes of numbers, or as many as the header says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    tensor = header.get("tokens") if isinstance(header, dict) else None
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(tensor["data_offsets"][1] if tensor else 4))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b'{"__metadata__":' + DEEP.encode(), "nested too deep"),
        (b'{"tokens":' + HUGE.encode() + b"}", "Exceeds the limit"),
        ({"tokens": {"dtype": "F32", "shape": [1] * 9999, "data_offsets": [0, 4]}}, "more than 8 dimensions"),
        ({"tokens": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, "a type or shape that PyTorch does not"),
        ({"tokens": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}}, "a type or shape that PyTorch"),
        ({"tokens": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4]}}, "invalid shape"),
        ({"x" * 2_000_000: 1}, r"a header of 2,000,\d+ bytes, expected at most"),
        (b"[]", "."),
    ],
)
def test_safetensors_headers(tmp_path, header, reason):
    path = tmp_path / "tokens.safetensors"
    safetensors_file(path, header)
    with pytest.raises(SoftREPAError, match=rf"the .safetensors file cannot be read \(.*{reason}.*, expected a whole"):
        token_files.load(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"family": "sd3", "blocks": HUGE}, "blocks is .* expected the number of joint blocks"),
        ({"format_version": HUGE}, "format_version is .* expected"),
        ({"family": HUGE}, "family is .* expected one of"),
        ({"format": HUGE}, "format is .* expected"),
    ],
)
def test_metadata_of_thousands_of_digits(tmp_path, metadata, message):
    path = tmp_path / "tokens.safetensors"
    save_file({"tokens": torch.ones(5, 4, 64)}, path, metadata)
    with pytest.raises(SoftREPAError, match=message) as caught:
        token_files.load(path)
    assert len(str(caught.value)) < 500


def test_numbers_of_thousands_of_digits_in_inputs():
    with pytest.raises(SoftREPAError, match="blocks is .* expected the number of joint blocks"):
        parse_blocks(HUGE, FAMILIES["sd3"], "Training")
    with pytest.raises(SoftREPAError, match="timesteps is .* expected numbers from 0 to 999"):
        parse_timesteps(HUGE)


@pytest.mark.parametrize("name", [LONG, "a\0b", "caf\udce9", "\ud800", "\x1b[31m"])
def test_names_that_are_no_files(tmp_path, name):
    for path in (tmp_path / f"{name}.safetensors", tmp_path / name / "tokens.safetensors", tmp_path / name):
        with pytest.raises(SoftREPAError, match="no file at") as caught:
            token_files.load(path)
        str(caught.value).encode("utf-8")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no such names")
def test_a_name_in_latin_1(tmp_path):
    path = token_files.save(sd15(), tmp_path / "caf\udce9.safetensors")
    assert os.fsencode(path).endswith(b"caf\xe9.safetensors")
    assert path in list(tmp_path.iterdir())
    loaded = token_files.load(path)
    loaded.label.encode("utf-8")


def test_metadata_that_cannot_be_encoded_loses_no_tokens(tmp_path):
    path = token_files.save(sd15(dataset="caf\udce9 pictures"), tmp_path / "a.safetensors")
    assert token_files.load(path).metadata["dataset"] == "caf\\udce9 pictures"


# The command line


def command(*arguments: object) -> subprocess.CompletedProcess:
    run = [sys.executable, "-m", "softrepa", *map(str, arguments)]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)


def said_by(capsys, *arguments: object) -> str:
    """The one line that a refused command prints."""
    before, sys.argv = sys.argv, ["softrepa", *map(str, arguments)]
    try:
        assert command_line.main() == 1
    finally:
        sys.argv = before
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


def test_inspect_prints_nothing_that_a_terminal_acts_on(tmp_path):
    evil = {f"\x1b]0;title\x07{index}": "\x1b[2J\u202e\nfamily sd3\r" + "x" * 5000 for index in range(200)}
    path = tmp_path / "evil.safetensors"
    write_tensors(path, {"tokens": torch.ones(4, 768)}, {"family": "sd15"})
    save_file({"tokens": torch.ones(4, 768)}, path, {"family": "sd15"} | evil)
    printed = command("inspect", path).stdout
    assert all(line.isprintable() for line in printed.splitlines())
    assert "\\x1b[2J\\u202e\\nfamily sd3\\r" in printed
    assert len(printed.splitlines()) < 60
    assert "... and 150 more" in printed


def test_names_that_no_file_can_have(capsys, tmp_path):
    assert "no file at" in said_by(capsys, "inspect", LONG)
    assert "cannot be read (File name too long)" in said_by(capsys, "train", f"{LONG}.json") or not POSIX
    assert "could not be written" in said_by(capsys, "convert", whole(tmp_path), tmp_path / f"{LONG}.safetensors")


def whole(folder: Path) -> Path:
    return token_files.save(sd15(), folder / "whole.safetensors")


def test_convert_below_a_file(capsys, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    message = said_by(capsys, "convert", whole(tmp_path), tmp_path / "file" / "out.safetensors")
    assert "could not be written" in message
    assert "expected a folder with room" in message


def test_convert_onto_a_full_disk(capsys, tmp_path, monkeypatch):
    source = whole(tmp_path)

    def full(file, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    message = said_by(capsys, "convert", source, tmp_path / "out.safetensors")
    assert "out.safetensors could not be written (No space left on device), expected a folder with room." in message


@pytest.mark.parametrize("missing", ["torch", "safetensors"])
def test_a_python_that_is_not_comfyuis(missing):
    code = f"import runpy, sys; sys.modules['{missing}'] = None; runpy.run_module('softrepa', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"has no {missing}, expected the Python that runs ComfyUI" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "python", ["", "ComfyUI/.venv/bin/python", "ComfyUI/venv/Scripts/python.exe", "python_embeded/python.exe"]
)
def test_a_python_without_torch_says_which_has_it(tmp_path, python):
    venv.create(tmp_path / "bare", with_pip=False, symlinks=POSIX)
    bare = tmp_path / "bare" / ("bin/python" if POSIX else "Scripts/python.exe")
    pack = tmp_path / "ComfyUI" / "custom_nodes" / "pack"
    shutil.copytree(ROOT / "softrepa", pack / "softrepa", ignore=shutil.ignore_patterns("*.safetensors", "*.pyc"))
    if python:
        (tmp_path / python).parent.mkdir(parents=True)
        (tmp_path / python).touch()
    done = subprocess.run(
        [bare, "-m", "softrepa", "inspect", "x"], cwd=pack, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    expected = str(tmp_path / python) if python else "in a portable installation python_embeded\\python.exe, otherwise"
    assert f"has no torch, expected the Python that runs ComfyUI: {expected}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEP, "cannot be read (JSON that is nested too deep)"),
        ("[1]", "holds a list, expected inputs by name"),
        ("caf\udce9", "cannot be read (no JSON"),
    ],
)
def test_configurations(capsys, tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    assert message in said_by(capsys, "train", path)
    tokens = tmp_path / "trained.safetensors"
    token_files.save(sd15(inputs=text), tokens)
    assert message in said_by(capsys, "train", tokens)


def test_numbers_that_are_none_in_a_configuration():
    for value in (float("nan"), float("inf"), 10**400):
        for name in ("validation_percent", "cache_gb", "learning_rate", "seed"):
            with pytest.raises(SoftREPAError, match=f"CONFIG: {name} is"):
                configuration.check_inputs({name: value})
    configuration.check_inputs({"validation_percent": 10, "seed": 2**63 - 1})


def test_a_file_that_grows_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "log"
    path.write_bytes(b"x" * 10)
    fstat = os.fstat

    def growing(handle):
        facts = fstat(handle)
        with path.open("ab") as file:
            file.write(b"more")
        return facts

    assert read_bounded(path, 100) == b"x" * 10
    monkeypatch.setattr(os, "fstat", growing)
    with pytest.raises(UnreadableError, match="it grows while it is read"):
        read_bounded(path, 100)


# Checkpoints


@pytest.fixture
def saved(tmp_path):
    """A checkpoint after two steps."""
    one = trainer(learning_rate=0.02, ema_decay=0.9)
    records = [one.step(1), one.step(1)]
    path = tmp_path / "run.checkpoint.safetensors"
    training_state.save(training_state.capture(one, records, [(1, 0.5, 0.2)], {"drawn": 2}, {"seed": 0}), path)
    return path


def rewritten(path: Path, tensors: dict | None = None, **metadata: str) -> None:
    from comfyui_softrepa.softrepa.files import read_tensors

    old, texts = read_tensors(path, 10**9)
    write_tensors(path, old | (tensors or {}), texts | metadata)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {"position": DEEP}, r"cannot be read \(JSON that is nested too deep"),
        ({}, {"step": HUGE}, r"cannot be read \(no JSON: Exceeds the limit"),
        ({}, {"step": "2.5"}, "has step of another kind"),
        ({}, {"step": "3"}, "has 2 records, expected one of each of its 3 steps"),
        ({}, {"identity": "[]"}, "has identity of another kind"),
        ({"records": torch.zeros(2)}, {}, "has records of another kind"),
        ({"records": torch.full((2, 6), torch.nan, dtype=torch.float64)}, {}, "has records of another kind"),
        ({"records": torch.tensor([[1, torch.nan, 0, 0, 0, 0]] * 2).double()}, {}, "has records of another kind"),
        ({"held_out": torch.full((2, 3), torch.inf, dtype=torch.float64)}, {}, "has held_out of another kind"),
    ],
)
def test_changed_checkpoints_are_refused(saved, tensors, metadata, message):
    rewritten(saved, tensors, **metadata)
    with pytest.raises(SoftREPAError, match=rf'Checkpoint "run\.checkpoint\.safetensors" {message}'):
        training_state.load(saved)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"generator": torch.zeros(3)}, {}),
        ({"parameter/tokens": torch.zeros(1)}, {}),
        ({"optimizer/x/step": torch.zeros(1)}, {}),
        ({}, {"optimizer": "{}"}),
        ({}, {"optimizer": '{"groups": [], "numbers": {}}'}),
        ({}, {"optimizer": '{"groups": [1], "numbers": {}}'}),
        ({}, {"optimizer": '{"groups": null, "numbers": 3}'}),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(saved, tensors, metadata):
    rewritten(saved, tensors, **metadata)
    with pytest.raises(SoftREPAError, match="The checkpoint does not fit the run it is of"):
        training_state.restore(trainer(learning_rate=0.02, ema_decay=0.9), training_state.load(saved))


def test_what_differs_is_named_in_short():
    (phrase,) = training_state.differences({"seed": "\x1b" * 10**5}, {"seed": 1})
    assert len(phrase) < 120
    assert phrase.isprintable()


# Captions whose words are swapped


def test_captions_of_any_letters_and_length(monkeypatch):
    assert swaps.swaps("a red\ud800 ball and a blue box")
    looked = Counter()
    sense = swaps._Parts.sense

    def counted(self, words):
        looked["senses"] += 1
        return sense(self, words)

    monkeypatch.setattr(swaps._Parts, "sense", counted)
    assert swaps.swaps("red of " * 500) == []
    assert looked["senses"] <= swaps.MOST_TRIED + 1


# Locks


def test_a_lock_has_one_holder(tmp_path):
    path = tmp_path / "lock"
    with locks.held(path):
        with pytest.raises(locks.HeldError), locks.held(path):
            pass
        assert path.exists()
    assert not path.exists()
    with locks.held(path):
        pass


HOLDER = """
import pathlib, sys
from softrepa import locks
with locks.held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_goes_with_its_process(tmp_path):
    path, pipe = tmp_path / "lock", subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(locks.HeldError), locks.held(path):
            pass
        holder.kill()
    assert path.exists()
    with locks.held(path):
        pass


def test_a_lock_on_a_deleted_file_is_none(tmp_path, monkeypatch):
    path, opened = tmp_path / "lock", Path.open
    calls = []

    def deleted_meanwhile(self, *mode):
        file = opened(self, *mode)
        if not calls:
            calls.append(self.unlink() if POSIX else None)
        return file

    monkeypatch.setattr(Path, "open", deleted_meanwhile)
    with locks.held(path):
        assert path.exists()
        with pytest.raises(locks.HeldError), locks.held(path):
            pass


def test_folders_without_locks_are_told_apart(tmp_path, monkeypatch):
    def unsupported(file):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks, "try_lock", unsupported)
    with pytest.raises(locks.NoLocksError, match="Operation not supported"), locks.held(tmp_path / "lock"):
        pass
