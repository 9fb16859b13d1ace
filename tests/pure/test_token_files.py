"""Token files: our format, published pickles, everything that is refused, and the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_softrepa.softrepa import token_files
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.tokens import SoftTokens
from safetensors import safe_open
from safetensors.torch import save_file
from softrepa_tests import published

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("family", "blocks"), [("sd15", ("down",)), ("sdxl", ("down", "mid")), ("sd3", 5)], ids=["sd15", "sdxl", "sd3"]
)
def test_published_files(tmp_path, family, blocks):
    tokens, table = published.write(tmp_path / family, family)
    for path in (tmp_path / family, tmp_path / family / "dc_tokens.pth"):
        loaded = token_files.load(path)
        assert (loaded.family.name, loaded.blocks) == (family, blocks)
        assert torch.equal(loaded.tokens, tokens)
        assert table is None if loaded.time_table is None else torch.equal(loaded.time_table, table)


OFFICIAL = os.environ.get("SOFTREPA_OFFICIAL_TOKENS")
if OFFICIAL:

    @pytest.mark.parametrize("family", ["sd1.5", "sdxl", "sd3"])
    def test_official_files(tmp_path, family):
        loaded = token_files.load(Path(OFFICIAL) / family)
        again = token_files.load(token_files.save(loaded, tmp_path / "out.safetensors"))
        assert torch.equal(again.tokens, loaded.tokens)
        assert (again.family, again.blocks) == (loaded.family, loaded.blocks)


@pytest.mark.parametrize("shape", [(5, 4, 1536), (4, 768), (4, 2048)])
def test_agsm_files_have_two_banks(tmp_path, shape):
    banks = published.write_agsm(tmp_path, shape)
    loaded = token_files.load(tmp_path)
    assert torch.equal(loaded.tokens, banks[0])
    assert torch.equal(loaded.negative_tokens, banks[1])


def test_a_bank_axis_is_never_guessed(tmp_path):
    torch.save(torch.nn.Parameter(torch.randn(2, 5, 4, 1536)), tmp_path / "dc_tokens.pth")
    with pytest.raises(SoftREPAError, match=r"shape \[2, 5, 4, 1536\]"):
        token_files.load(tmp_path)
    torch.save(torch.nn.Parameter(torch.randn(2, 4, 768)), tmp_path / "dc_tokens.pth")
    assert token_files.load(tmp_path).family.name == "sd3"


def test_round_trip_keeps_everything(tmp_path):
    tokens = SoftTokens.of(
        torch.randn(4, 768),
        "sd15",
        ("down", "mid"),
        time_table=torch.randn(100, 768),
        negative_tokens=torch.randn(4, 768),
        metadata={"steps": "100", "base_model": "x"},
    )
    path = token_files.save(tokens, tmp_path / "deep" / "tokens.safetensors")
    loaded = token_files.load(path)
    for key in token_files.TENSORS:
        assert torch.equal(getattr(loaded, key), getattr(tokens, key))
    assert (loaded.blocks, loaded.family, loaded.metadata) == (tokens.blocks, tokens.family, tokens.metadata)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["format"] == "softrepa"
    assert header["format_version"] == "1"
    assert header["family"] == "sd15"
    assert header["blocks"] == "down,mid"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_loaded_file_is_let_go(tmp_path):
    """Windows replaces no file that is mapped."""
    path = token_files.save(SoftTokens.of(torch.randn(4, 768), "sd15", ("down",)), tmp_path / "a.safetensors")
    loaded = token_files.load(path)
    before = loaded.tokens.clone()
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(loaded.tokens, before)


def test_saving_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tokens.safetensors"
    token_files.save(SoftTokens.of(torch.ones(4, 768), "sd15", ("down",)), path)
    before = path.read_bytes()

    def full_disk(file, content):
        with file.open("wb") as opened:
            opened.write(content[:4])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        token_files.save(SoftTokens.of(torch.zeros(4, 768), "sd15", ("down",)), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_overrides(tmp_path):
    published.write(tmp_path, "sd15")
    assert token_files.load(tmp_path, blocks="mid, down").blocks == ("down", "mid")
    with pytest.raises(SoftREPAError, match="expected .* for SDXL"):
        token_files.load(tmp_path, family="sdxl")
    with pytest.raises(SoftREPAError, match='blocks is "5", expected a comma list of down, mid, up'):
        token_files.load(tmp_path, blocks="5")


class Malice:
    """Would create a file when unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.system, (f"{sys.executable} -c \"open(r'{self.target}', 'w')\"",))


def test_code_in_a_pickle_never_runs(tmp_path):
    target = tmp_path / "created"
    for name, content in (("a", Malice(target)), ("b", {"weight": Malice(target)})):
        folder = tmp_path / name
        folder.mkdir()
        torch.save(content, folder / "dc_tokens.pth")
        with pytest.raises(
            SoftREPAError, match=r"dc_tokens\.pth cannot be read \(it asks for \w+\.system to be run\)"
        ) as caught:
            token_files.load(folder)
        assert "weights_only" not in str(caught.value)
        assert "\x1b" not in str(caught.value)
    (tmp_path / "c").mkdir()
    embedding = torch.nn.Embedding(100, 768)
    embedding.extra = Malice(target)
    published.write(tmp_path / "c", "sd15")
    torch.save(embedding, tmp_path / "c" / "dc_t_tokens.pth")
    with pytest.raises(SoftREPAError, match=r"it asks for \w+\.system to be run"):
        token_files.load(tmp_path / "c")
    assert not target.exists()


def test_bad_pickles_are_refused(tmp_path):
    path = tmp_path / "dc_tokens.pth"
    for content in (b"", b"garbage", b"PK\x03\x04 not a zip"):
        path.write_bytes(content)
        with pytest.raises(SoftREPAError, match=r"is not a whole file saved by torch\), expected a plain tensor"):
            token_files.load(path)
    torch.save(torch.randn(4, 768), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(SoftREPAError, match="is not a whole file saved by torch"):
        token_files.load(path)
    broken = torch.nn.Embedding(4, 768)
    broken._parameters = ["weight"]
    for content, found in (
        ({"weight": torch.randn(4, 768)}, r"holds a dict\), expected a plain tensor"),
        (torch.randn(4, 768).to_sparse(), "asks for torch._utils._rebuild_sparse_tensor to be run"),
        (torch.empty(4, 768, device="meta"), "expected a plain tensor"),
        (broken, "is not a whole file"),
    ):
        torch.save(content, path)
        with pytest.raises(SoftREPAError, match=found):
            token_files.load(path)


def test_bad_safetensors_are_refused(tmp_path):
    path = tmp_path / "tokens.safetensors"
    token_files.save(SoftTokens.of(torch.randn(4, 768), "sd15", ("down",)), path)
    whole = path.read_bytes()
    for content in (b"", whole[:7], whole[:40], whole[:-100]):
        path.write_bytes(content)
        with pytest.raises(SoftREPAError, match=r"cannot be read \(.*\), expected a whole file"):
            token_files.load(path)
    save_file({"lora.up": torch.ones(2, 2)}, path)
    with pytest.raises(SoftREPAError, match=r"holds lora\.up, expected `tokens`"):
        token_files.load(path)
    save_file({"tokens": torch.ones(4, 768), "bias": torch.ones(1)}, path)
    with pytest.raises(SoftREPAError, match="holds bias, expected"):
        token_files.load(path)
    save_file({"time_table": torch.ones(100, 768)}, path)
    with pytest.raises(SoftREPAError, match="time table without tokens"):
        token_files.load(path)
    save_file({"tokens": torch.ones(4, 768)}, path, metadata={"format": "softrepa", "format_version": "2"})
    with pytest.raises(SoftREPAError, match='format_version is "2", expected "1"'):
        token_files.load(path)
    save_file({"tokens": torch.full((4, 768), torch.inf)}, path)
    with pytest.raises(SoftREPAError, match="tokens has 3072 NaN or infinite values"):
        token_files.load(path)


@pytest.mark.parametrize(
    ("tokens", "table"),
    [((2, 3, 2, 8), (64, 24)), ((2, 3, 2, 8), (48,)), ((3, 3, 2, 8), (64, 72)), ((0, 3, 2, 8), (64, 0))],
    ids=["a table of one bank", "no table", "three banks", "no bank"],
)
def test_bad_files_of_anima_lora_are_refused(tmp_path, tokens, table):
    path = tmp_path / "a.safetensors"
    save_file({"tokens": torch.ones(tokens), "t_offsets.weight": torch.ones(table)}, path)
    with pytest.raises(SoftREPAError, match=r"expected \[2, layers, m, width\] and \[n, 2 x layers x width\]"):
        token_files.load(path)
    save_file({"tokens": torch.ones(3, 2, 8), "t_offsets.weight": torch.ones(64, 48)}, path)
    with pytest.raises(SoftREPAError, match=r"time_table has shape \[64, 48\], expected \[64, 24\]"):
        token_files.load(path)


def test_other_formats_and_scalars_are_refused(tmp_path):
    path = tmp_path / "tokens.safetensors"
    save_file({"tokens": torch.ones(4, 768)}, path, metadata={"format": "lora"})
    with pytest.raises(SoftREPAError, match='format is "lora", expected "softrepa"'):
        token_files.load(path)
    save_file({"tokens": torch.tensor(1.0)}, path, metadata={"family": "sd3"})
    with pytest.raises(SoftREPAError, match=r"shape \[\], expected \[layers, m, width\]"):
        token_files.load(path)


def test_safetensors_without_metadata_are_recognised_by_shape(tmp_path):
    path = tmp_path / "tokens.safetensors"
    save_file({"tokens": torch.ones(5, 4, 384)}, path)
    loaded = token_files.load(path)
    assert (loaded.family.name, loaded.blocks) == ("sd3", 5)


def test_folders_that_cannot_be_loaded(tmp_path):
    with pytest.raises(SoftREPAError, match="holds 0 published token files"):
        token_files.load(tmp_path)
    torch.save(torch.nn.Embedding(100, 768), tmp_path / "dc_t_tokens.pth")
    with pytest.raises(SoftREPAError, match="time table .* without tokens"):
        token_files.load(tmp_path)
    with pytest.raises(SoftREPAError, match=r"time table without tokens, expected its dc_tokens\.pth"):
        token_files.load(tmp_path / "dc_t_tokens.pth")
    with pytest.raises(SoftREPAError, match="no file at"):
        token_files.load(tmp_path / "missing.safetensors")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(SoftREPAError, match=r'ends in "\.txt"'):
        token_files.load(tmp_path / "x.txt")


def command(*args, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "softrepa", *map(str, args)], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_convert_and_inspect(tmp_path):
    published.write(tmp_path / "sd3", "sd3")
    out = tmp_path / "sd3.safetensors"
    assert command("convert", tmp_path / "sd3", out).returncode == 0
    shown = command("inspect", out).stdout
    assert "sd3 (SD3)" in shown
    assert "[5, 4, 1536]" in shown
    assert "[100, 7680]" in shown
    again = command("convert", tmp_path / "sd3", out)
    assert again.returncode == 1
    assert "exists, expected a new name" in again.stderr
    pair = [tmp_path / "sd3" / name for name in ("dc_t_tokens.pth", "dc_tokens.pth")]
    assert command("convert", *pair, out, "--force").returncode == 0
    assert torch.equal(token_files.load(out).tokens, token_files.load(tmp_path / "sd3").tokens)
    published.write(tmp_path / "sd15", "sd15")
    assert command("convert", tmp_path / "sd15", tmp_path / "x.safetensors", "--blocks", "down,mid").returncode == 0
    assert token_files.load(tmp_path / "x.safetensors").blocks == ("down", "mid")
    published.write(tmp_path / "sdxl", "sdxl")
    static = command("convert", tmp_path / "sdxl", tmp_path / "y.safetensors")
    assert "static tokens" in static.stderr
    missing = command("inspect", tmp_path / "nothing")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr.startswith('error: Tokens "nothing"')
    assert "Traceback" not in missing.stderr


def test_importable_with_torch_and_safetensors_alone():
    """No ComfyUI, numpy or pillow is needed by the method."""
    code = (
        "import sys\n"
        "for name in ('comfy', 'folder_paths', 'PIL', 'server'): sys.modules[name] = None\n"
        "import softrepa.tokens, softrepa.token_files, softrepa.families\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
