"""Caption-Image Folder on a real ComfyUI: what is encoded, what is kept, and what happens when files change."""

import comfy.model_management
import folder_paths
import pytest
import torch
from comfyui_softrepa.nodes import dataset as dataset_nodes
from comfyui_softrepa.softrepa import images
from comfyui_softrepa.softrepa.comfy import dataset_folders, encoding
from comfyui_softrepa.softrepa.errors import SoftREPAError
from PIL import Image
from softrepa_tests.conftest import ROOT

import nodes
from benchmarks.standins import stand_in

CAPTIONS = ("a (very) red square", "blue", "green (left) and grey", "something yellow")
COLOURS = ((200, 20, 20), (10, 10, 220), (20, 160, 60), (230, 220, 40))
SIDE = 64

Folder, FromLatents = dataset_nodes.NODES


@pytest.fixture(scope="module")
def encoders():
    """CLIP and VAE of the SD1.5 stand-in, by the stock loader."""
    checkpoint = stand_in("sd15").checkpoint
    folder_paths.add_model_folder_path("checkpoints", str(checkpoint.parent))
    with torch.inference_mode():
        _, clip, vae = nodes.CheckpointLoaderSimple().load_checkpoint(checkpoint.name)
    return clip, vae


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """input/photos with four captioned pictures, in folders of this test alone."""
    for kind in ("input", "user"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    root = tmp_path / "input" / "photos"
    root.mkdir()
    for number, (caption, colour) in enumerate(zip(CAPTIONS, COLOURS, strict=True)):
        image = Image.new("RGB", (90, 70), colour)
        image.paste((250, 250, 250), (30, 20, 50, 40))
        image.save(root / f"{number}.png")
        (root / f"{number}.txt").write_text(caption, encoding="utf-8")
    return root


@pytest.fixture
def encoded(encoders, monkeypatch):
    """What the encoders are asked for, as it happens: captions, and "image"."""
    clip, vae = encoders
    asked = []
    tokenize, encode = clip.tokenize, vae.encode
    monkeypatch.setattr(clip, "tokenize", lambda text, **rest: asked.append(text) or tokenize(text, **rest))
    monkeypatch.setattr(vae, "encode", lambda pixels: asked.append("image") or encode(pixels))
    return asked


def read(encoders, **options):
    dataset, summary = Folder.execute("photos", *encoders, **{"resolution": SIDE} | options).args
    assert summary == dataset.summary
    return dataset


def cached(tmp_path) -> list:
    return list((tmp_path / "user").rglob("*.safetensors"))


def drawn(dataset, count=3):
    """The first batches, by image."""
    view = dataset.started(0)
    found = []
    for _ in range(count):
        batch = view.batch(2)
        found += list(zip(batch.keys, batch.captions, batch.latents, batch.conds, strict=True))
    return found


def same(one, other) -> bool:
    return all(
        a[:2] == b[:2]
        and torch.equal(a[2], b[2])
        and torch.equal(a[3]["cross_attn"], b[3]["cross_attn"])
        and torch.equal(a[3]["pooled_output"], b[3]["pooled_output"])
        for a, b in zip(one, other, strict=True)
    )


def test_encodings_are_those_of_the_stock_nodes(encoders, photos):
    clip, vae = encoders
    dataset = read(encoders)
    ((empty, extra),) = nodes.CLIPTextEncode().encode(clip, "")[0]
    assert torch.equal(dataset.empty["cross_attn"], empty.float())
    assert torch.equal(dataset.empty["pooled_output"], extra["pooled_output"].float())
    for key, caption, latent, cond in drawn(dataset):
        assert caption == CAPTIONS[int(key[0])]
        pixels = images.prepared((photos / key).read_bytes(), (SIDE, SIDE))
        expected = nodes.VAEEncode().encode(vae, pixels[None])[0]["samples"]
        assert torch.equal(latent, expected[0])
        escaped = caption.replace("(", "\\(").replace(")", "\\)")
        ((context, extra),) = nodes.CLIPTextEncode().encode(clip, escaped)[0]
        assert cond["cross_attn"].dtype == torch.float32
        assert torch.equal(cond["cross_attn"], context.half().float())
        assert torch.equal(cond["pooled_output"], extra["pooled_output"].float())


def test_tensors_serve_autograd(encoders, photos):
    dataset = read(encoders)
    with torch.inference_mode(False), torch.enable_grad():
        batch = dataset.batch(2)
        weight = torch.ones(1, requires_grad=True)
        cross = [
            batch.conds[0]["cross_attn"],
            batch.conds[0]["pooled_output"],
            batch.latents,
            dataset.empty["cross_attn"],
        ]
        sum((weight * tensor).sum() for tensor in cross).backward()
    assert weight.grad is not None


def test_the_second_run_encodes_nothing(encoders, photos, encoded, tmp_path):
    first = read(encoders)
    assert sorted(encoded) == sorted(["", *CAPTIONS, *["image"] * 4])
    assert len(cached(tmp_path)) == 8
    expected = drawn(first)
    encoded.clear()
    assert same(drawn(read(encoders)), expected)
    assert set(encoded) <= {""}
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_changed_file_is_encoded_again(encoders, photos, encoded):
    before = read(encoders)
    marks = dataset_folders.fingerprint(photos)
    encoded.clear()
    (photos / "2.txt").write_text("quite another caption", encoding="utf-8")
    Image.new("RGB", (90, 70), "black").save(photos / "1.png")
    assert Folder.fingerprint_inputs(folder="photos", clip=None, vae=None) != marks
    after = read(encoders)
    assert [text for text in encoded if text] == ["image", "quite another caption"]
    assert after.fingerprint != before.fingerprint


def test_without_a_cache_everything_is_the_same(encoders, photos, encoded, tmp_path):
    expected = drawn(read(encoders))
    for path in cached(tmp_path):
        path.unlink()
    dataset = read(encoders, cache_gb=0.0)
    assert "except 4 images and 4 captions for which cache_gb leaves no room" in dataset.summary
    encoded.clear()
    assert same(drawn(dataset), expected)
    assert encoded.count("image") == 6
    assert not cached(tmp_path)


def test_a_cache_with_room_for_some(encoders, photos, tmp_path):
    dataset = read(encoders, cache_gb=0.00026)  # four latents and two captions of 120 kB
    assert "except 0 images and 2 captions" in dataset.summary
    assert sum(path.stat().st_size for path in cached(tmp_path)) <= 260_000
    assert same(drawn(dataset), drawn(read(encoders)))


def test_a_damaged_entry_is_made_anew(encoders, photos, encoded, tmp_path):
    expected = drawn(read(encoders))
    for path in cached(tmp_path):
        path.write_bytes(path.read_bytes()[:-7])
    encoded.clear()
    dataset = read(encoders)
    assert same(drawn(dataset), expected)
    repaired = len(encoded)
    assert repaired >= 4
    assert same(drawn(dataset), expected)
    assert len(encoded) == repaired


def test_an_interrupted_run_is_taken_up(encoders, photos, encoded, tmp_path, monkeypatch):
    made = []

    def interrupting(pixels):
        made.append(pixels)
        if len(made) == 2:
            comfy.model_management.interrupt_current_processing(True)
        return torch.zeros(1, 4, 8, 8)

    with monkeypatch.context() as patch:
        patch.setattr(encoders[1], "encode", interrupting)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            read(encoders)
    assert len(cached(tmp_path)) == 2
    encoded.clear()
    read(encoders)
    assert sorted(encoded) == sorted(["", *CAPTIONS, "image", "image"])


def test_an_image_that_goes_away(encoders, photos):
    in_cache, not_kept = read(encoders), read(encoders, resolution=96, cache_gb=0.0)
    for path in photos.glob("*.png"):
        path.unlink()
    assert len(drawn(in_cache)) == 6
    with pytest.raises(SoftREPAError, match=r'Dataset "photos": \d.png cannot be used any more \(No such file'):
        not_kept.batch(2)


def test_other_encoders_have_other_entries(encoders, photos):
    clip, vae = encoders
    names = {encoding.clip_identity(clip)}
    assert encoding.clip_identity(clip) in names
    skipping = nodes.CLIPSetLastLayer().set_last_layer(clip, -2)[0]
    names.add(encoding.clip_identity(skipping))
    longer = clip.clone()
    longer.set_tokenizer_option("t5xxl_min_length", 512)
    names.add(encoding.clip_identity(longer))
    patched = clip.clone()
    key = next(name for name in patched.patcher.model_state_dict() if name.endswith("q_proj.weight"))
    patched.add_patches({key: (torch.ones_like(patched.patcher.model_state_dict()[key]),)}, 0.5)
    names.add(encoding.clip_identity(patched))
    assert len(names) == 4
    # an encode loads the LoRA into the weights, which all clones share
    encoding.encode_caption(patched, "a cat")
    assert patched.patcher.backup
    assert names == {encoding.clip_identity(one) for one in (clip, skipping, longer, patched)}
    encoding.encode_caption(clip, "a cat")
    before = encoding.vae_identity(vae)
    weight = next(iter(vae.first_stage_model.parameters()))
    old = weight.data.flatten()[0].clone()
    weight.data.flatten()[0] += 1
    assert encoding.vae_identity(vae) != before
    weight.data.flatten()[0] = old
    assert encoding.vae_identity(vae) == before


def test_clip_skip_is_seen_in_the_encodings(encoders, photos):
    clip, vae = encoders
    plain = read(encoders)
    skipping = read((nodes.CLIPSetLastLayer().set_last_layer(clip, -2)[0], vae))
    assert not same(drawn(plain), drawn(skipping))


def test_buckets_and_validation(encoders, photos):
    for number in range(4, 30):
        Image.new("RGB", (100, 60) if number % 2 else (60, 100), (number, 0, 9)).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(CAPTIONS[number % 4] + "!" * (number // 4), encoding="utf-8")
    dataset = read(encoders, bucketing=True, validation_percent=20.0)
    assert (len(dataset.train), len(dataset.validation)) == (24, 6)
    shapes = set()
    for _ in range(30):
        batch = dataset.batch(2)
        shapes.add(tuple(batch.latents.shape))
        for key in batch.keys:
            if int(key.split(".")[0]) >= 4:  # the first four are nearly square, and too few for a bucket
                width, height = Image.open(photos / key).size
                assert (width > height) == (batch.latents.shape[3] > batch.latents.shape[2])
    assert shapes == {(2, 4, 6, 10), (2, 4, 10, 6)}
    measured = [key for batch in dataset.validation_batches(2) for key in batch.keys]
    assert len(measured) == len(set(measured))
    assert len(measured) >= 4


def test_the_list_of_folders(photos, tmp_path, monkeypatch):
    def fill(folder, *files):
        folder.mkdir(parents=True, exist_ok=True)
        for name in files:
            (folder / name).write_bytes(b"")

    source = tmp_path / "input"
    fill(source, "loose.png", "loose.txt")
    fill(source / "coco" / "val2017", "1.jpg")
    fill(source / "coco" / "annotations", "captions_val2017.json")
    fill(source / "uncaptioned", "1.jpg", "other.txt")
    fill(source / "texts only", "1.txt")
    fill(source / ".hidden", "1.jpg", "1.txt")
    fill(source / "深い" / "sub", "1.webp", "1.caption")
    (source / "photos" / "loop").symlink_to(source / "photos", target_is_directory=True)
    assert dataset_folders.dataset_names() == ["coco", "photos", "深い", "深い/sub"]
    extra = tmp_path / "disk" / "photos"
    fill(extra / "set", "1.png", "metadata.jsonl")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "softrepa_datasets", ([str(extra)], set()))
    assert dataset_folders.dataset_names() == ["coco", "photos", f"photos ({extra})", "photos/set", "深い", "深い/sub"]
    assert dataset_folders.dataset_path("photos") == photos
    assert dataset_folders.dataset_path(f"photos ({extra})") == extra
    assert "photos/set" in Folder.INPUT_TYPES()["required"]["folder"][1]["options"]


def test_names_that_are_no_folder(photos):
    assert Folder.validate_inputs("photos") is True
    assert Folder.validate_inputs(None) is True
    for name in ("gone", "../user", "", str(photos)):
        assert Folder.validate_inputs(name) == (
            f'folder is "{name}", which holds no captioned images below ComfyUI\'s input folder or softrepa_datasets, '
            "expected one of photos."
        )


def test_wrong_inputs(encoders, photos):
    with pytest.raises(SoftREPAError, match="resolution is 100, expected a multiple of 8"):
        read(encoders, resolution=100)
    assert [len(part) for part in (read(encoders, validation_percent=10.0).train, read(encoders).train)] == [2, 4]
    with pytest.raises(
        SoftREPAError, match="1 different images and 1 different captions for training.*percent divides"
    ):
        read(encoders, validation_percent=80.0)
    for path in photos.glob("*.txt"):
        path.write_text("the same", encoding="utf-8")
    with pytest.raises(SoftREPAError, match="4 different images and 1 different captions for training"):
        read(encoders)


def test_a_vae_that_gives_no_numbers(encoders, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(encoders[1], "encode", lambda pixels: torch.full((1, 4, 8, 8), torch.nan))
    with pytest.raises(SoftREPAError, match=r"vae gives NaN or infinite values for 0.png"):
        read(encoders)
    monkeypatch.setattr(encoders[1], "encode", lambda pixels: torch.zeros(1, 16, 1, 8, 8))
    with pytest.raises(SoftREPAError, match=r"vae gives latents of shape \[1, 16, 1, 8, 8\], expected"):
        read(encoders)
    assert not cached(tmp_path)


def test_the_cache_can_lie_elsewhere(encoders, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "softrepa_cache", ([str(tmp_path / "fast")], set()))
    read(encoders)
    assert len(list((tmp_path / "fast").rglob("*.safetensors"))) == 8
    assert not cached(tmp_path)


def test_core_training_lists(encoders, photos):
    import comfy_extras.nodes_dataset as core

    clip, vae = encoders
    pixels = [images.prepared((photos / f"{i}.png").read_bytes(), (SIDE, SIDE))[None] for i in range(4)]
    made = core.MakeTrainingDataset.execute(pixels, [vae], [clip], list(CAPTIONS)).args
    bucketed = core.ResolutionBucket.execute(*made).args
    empty = [nodes.CLIPTextEncode().encode(clip, "")[0]]
    whole = read(encoders)
    by_caption = {}
    for lists in (made, bucketed):
        (dataset,) = FromLatents.execute(*lists, empty).args
        assert torch.equal(dataset.empty["cross_attn"], whole.empty["cross_attn"])
        for key, caption, latent, cond in drawn(dataset):
            number = int(key.split()[1]) - 1
            assert torch.equal(latent, made[0][number]["samples"][0])
            assert torch.equal(cond["cross_attn"], made[1][number][0][0])
            by_caption.setdefault(caption, set()).add(number)
    assert all(len(numbers) == 1 for numbers in by_caption.values())


@pytest.mark.parametrize("node", dataset_nodes.NODES)
def test_nodes_are_documented(node, photos):
    schema = node.GET_SCHEMA()
    page = (ROOT / "nodes" / "web" / "docs" / f"{schema.node_id}.md").read_text(encoding="utf-8")
    assert schema.description
    assert schema.category == "SoftREPA"
    for entry in (*schema.inputs, *schema.outputs):
        assert entry.tooltip, entry.id
    for entry in schema.inputs:
        assert f"`{entry.id}`" in page


def test_the_optional_inputs_and_their_defaults(photos):
    inputs = Folder.INPUT_TYPES()
    assert list(inputs["required"]) == ["folder", "clip", "vae"]
    defaults = {name: options["default"] for name, (_, options) in inputs["optional"].items()}
    assert defaults == {"resolution": 512, "bucketing": False, "validation_percent": 0.0, "cache_gb": 50.0}
    assert Folder.RETURN_TYPES == ["SOFTREPA_DATASET", "STRING"]
    assert FromLatents.INPUT_IS_LIST is True
