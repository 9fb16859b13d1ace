"""Each judge gives what its library gives when it is called directly; no network is touched."""

import json
import re
import socket
import sys
import sysconfig
import venv
from functools import partial
from pathlib import Path

import open_clip
import PIL
import pytest
import torch
import torchmetrics.functional.image.lpips as lpips
from comfyui_softrepa.softrepa.data.sources import WholeFile
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.evaluation import metrics, weights
from comfyui_softrepa.softrepa.evaluation.metrics import METRICS, JudgeOptions, check_metric, judge_of
from comfyui_softrepa.softrepa.evaluation.pictures import Picture, as_tensor
from PIL import Image
from softrepa_tests.judges import clip_folder, photograph, vit_folder
from torchmetrics.image import FrechetInceptionDistance
from torchmetrics.image.fid import NoTrainInceptionV3
from transformers import CLIPModel, CLIPProcessor, ViTModel

PROMPTS = ("a red cat", "the dog on the hill", "a green house")
TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(autouse=True)
def no_socket(monkeypatch):
    def refused(*_, **__):
        raise AssertionError("a connection was opened")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    for name in weights.OFFLINE:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def pictures(tmp_path):
    return [
        Picture(photograph(tmp_path / f"{seed}.png", seed), prompt, WholeFile(photograph(tmp_path / f"p{seed}.png", 9)))
        for seed, prompt in enumerate(PROMPTS)
    ]


def judge(name, path, **options):
    return judge_of(METRICS[name], path, JudgeOptions(**options))


def images(pictures):
    return [Image.open(picture.path) for picture in pictures]


class TestClip:
    def expected(self, folder, pictures):
        model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
        given = processor(text=list(PROMPTS), images=images(pictures), padding=True, return_tensors="pt")
        with torch.no_grad():
            return model(**given).logits_per_image.diagonal(), model.logit_scale.exp()

    def test_score_is_the_cosine(self, tmp_path, pictures):
        folder = clip_folder(tmp_path / "clip")
        logits, factor = self.expected(folder, pictures)
        assert judge("clip", folder)(pictures) == pytest.approx((logits / factor).tolist(), abs=1e-6)

    def test_pickscore_is_the_cosine_times_the_models_factor(self, tmp_path, pictures):
        folder = clip_folder(tmp_path / "clip")
        logits, factor = self.expected(folder, pictures)
        assert factor > 10
        assert judge("pickscore", folder)(pictures) == pytest.approx(logits.tolist(), rel=1e-5)

    def test_prompts_that_are_not_read_to_their_end_are_counted(self, tmp_path, pictures):
        found = judge("clip", clip_folder(tmp_path / "clip"))
        assert found.notes(list(PROMPTS)) == []
        long = "red " * 80
        assert found.notes([long, *PROMPTS, long]) == ["1 prompts are longer than the 77 tokens that it reads"]
        assert len(found([Picture(pictures[0].path, long), pictures[1]])) == 2


def test_hps_is_open_clips_cosine(tmp_path, pictures):
    config = tmp_path / "tiny-hps.json"
    config.write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(config)
    torch.manual_seed(0)
    model, _, prepare = open_clip.create_model_and_transforms("tiny-hps")
    checkpoint = tmp_path / "HPS_v2_compressed.pt"
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, checkpoint)  # as HPSv2 is published
    with torch.no_grad():
        seen, read, _ = model.eval()(
            torch.stack([prepare(image) for image in images(pictures)]),
            open_clip.get_tokenizer("tiny-hps")(list(PROMPTS)),
        )
    expected = (seen * read).sum(-1).tolist()
    assert judge("hps", checkpoint, hps_architecture="tiny-hps")(pictures) == pytest.approx(expected, abs=1e-6)


def test_fid_is_torchmetrics(tmp_path, pictures, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: None)
    monkeypatch.setattr(NoTrainInceptionV3, "load_state_dict", lambda *_, **__: None)
    random = NoTrainInceptionV3("inception-v3-compat", ["2048"])
    monkeypatch.undo()
    path = tmp_path / "inception.pth"
    torch.save(random.state_dict(), path)
    found = judge("fid", path)
    found.photographs([picture.photograph() for picture in pictures])
    library = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(path), antialias=False)
    library.update(torch.stack([as_tensor(picture.photograph()) for picture in pictures]), real=True)
    for chosen in (pictures, pictures[1:]):  # an arm, and another one after it
        library.fake_features_sum.zero_(), library.fake_features_cov_sum.zero_()
        library.fake_features_num_samples.zero_()
        library.update(torch.stack([as_tensor(picture.image()) for picture in chosen]), real=False)
        distance = found.distance(picture.image() for picture in chosen)
        assert distance == pytest.approx(library.compute().item(), rel=1e-4)
        assert distance > 0


@pytest.mark.parametrize("side", [None, 40])
def test_lpips_is_torchmetrics_with_the_same_backbone(tmp_path, pictures, monkeypatch, side):
    import torchvision

    torch.manual_seed(0)
    backbone = torchvision.models.squeezenet1_1(weights=None)
    path = tmp_path / "squeezenet1_1.pth"
    torch.save(backbone.state_dict(), path)
    found = judge("lpips", path, lpips_net="squeeze", side=side)(pictures)
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda *_: backbone.features)
    library = lpips._LPIPS(net="squeeze").eval()
    for score, picture in zip(found, pictures, strict=True):
        pair = [picture.image(), picture.photograph()]
        if side:
            pair = [image.resize((side, side), Image.Resampling.BILINEAR) for image in pair]
        expected = library(*(as_tensor(image)[None] / 127.5 - 1 for image in pair))
        assert score == pytest.approx(expected.item(), rel=1e-4)
        assert score > 0


class TestStructure:
    def test_distance_is_of_the_keys_similarities(self, tmp_path, pictures):
        folder = vit_folder(tmp_path / "dino")
        model = ViTModel.from_pretrained(folder).eval()

        def similarities(image):
            keys = []
            layer = model.layers[-1] if hasattr(model, "layers") else model.encoder.layer[-1]
            layer.attention.k_proj.register_forward_hook(lambda _, __, found: keys.append(found[0]))
            pixels = as_tensor(image.resize((224, 224), Image.Resampling.BILINEAR)).float() / 255
            mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
            with torch.no_grad():
                model(((pixels - mean[:, None, None]) / deviation[:, None, None])[None])
            return torch.nn.functional.cosine_similarity(keys[0][:, None], keys[0][None], dim=-1)

        expected = [
            (similarities(picture.image()) - similarities(picture.photograph())).square().mean().item()
            for picture in pictures
        ]
        found = judge("structure", folder)(pictures)
        assert found == pytest.approx(expected, rel=1e-3)
        assert min(found) > 0

    def test_a_picture_has_its_own_structure_whatever_its_shape(self, tmp_path):
        path = photograph(tmp_path / "wide.png", 1, (96, 64))
        found = judge("structure", vit_folder(tmp_path / "dino"))
        assert found([Picture(path, "", WholeFile(path))]) == [0]


class TestImageReward:
    """Its sizes are fixed, 1.8 GB: here a stand-in of imscore says what it was given."""

    def python(self, tmp_path, body):
        """A Python that finds a package `imscore`."""
        package = tmp_path / "packages" / "imscore" / "imreward"
        package.mkdir(parents=True)
        for folder in (package, package.parent):
            (folder / "__init__.py").touch()
        (package / "model.py").write_text(body)
        home = tmp_path / "environment"
        venv.create(home, with_pip=False)
        paths = {"base": str(home), "platbase": str(home)}
        own = Path(sysconfig.get_path("purelib", vars=paths))
        (own / "stand_in.pth").write_text(
            "\n".join(
                [str(tmp_path / "packages"), str(Path(torch.__file__).parents[1]), str(Path(PIL.__file__).parents[1])]
            )
        )
        return str(Path(sysconfig.get_path("scripts", vars=paths)) / Path(sys.executable).name)

    MODEL = """
import os
class ImageReward:
    @classmethod
    def from_pretrained(cls, name):
        print("loading", name)
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        self = cls()
        self.name = name
        return self
    def train(self, mode):
        assert not mode
        return self
    def to(self, device):
        return self
    def score(self, pixels, prompts):
        assert self.name == "RE-N-Y/ImageReward" and pixels.shape == (1, 3, 48, 48)
        return pixels.mean() + len(prompts[0])
"""

    def test_pictures_go_to_a_python_of_its_own(self, tmp_path, pictures):
        found = judge("imagereward", "RE-N-Y/ImageReward", imagereward_python=self.python(tmp_path, self.MODEL))
        expected = [
            as_tensor(picture.image()).float().mean().item() / 255 + len(picture.prompt) for picture in pictures
        ]
        assert found(pictures) == pytest.approx(expected, rel=1e-5)
        assert found.batch >= 1000  # each loads the model

    def test_what_fails_there_is_said(self, tmp_path, pictures):
        found = judge("imagereward", "x", imagereward_python=self.python(tmp_path, "raise OSError('no weights')"))
        with pytest.raises(SoftREPAError, match=r"gave no scores \(OSError: no weights\), expected a Python"):
            found(pictures)

    @pytest.mark.parametrize("python", ["", "/nowhere/python"])
    def test_it_needs_that_python(self, python):
        with pytest.raises(SoftREPAError, match=rf'imagereward_python is "{python}", expected the Python of an env'):
            check_metric(METRICS["imagereward"], Path("x"), JudgeOptions(imagereward_python=python))
        check_metric(METRICS["imagereward"], Path("x"), JudgeOptions(imagereward_python=sys.executable))


class TestWeights:
    @pytest.mark.parametrize("name", [name for name in METRICS if name != "imagereward"])
    def test_what_is_not_there_is_refused_and_not_fetched(self, tmp_path, name):
        path = tmp_path / "no"
        with pytest.raises(SoftREPAError, match=rf'metrics {name} is "{re.escape(str(path))}", expected the .*--down'):
            check_metric(METRICS[name], path, JudgeOptions(download=False))

    def test_a_download_that_is_asked_for_is_whole_or_not_there(self, tmp_path, monkeypatch):
        asked = []

        def download(address, path, hashed):
            asked.append((address, hashed))
            Path(path).write_text("weights")
            if len(asked) == 1:
                raise RuntimeError("invalid hash value")

        monkeypatch.setattr(weights, "download_url_to_file", download)
        path = tmp_path / "inception.pth"
        with pytest.raises(SoftREPAError, match=r"could not be fetched \(invalid hash value\)"):
            check_metric(METRICS["fid"], path, JudgeOptions(download=True))
        assert list(tmp_path.iterdir()) == []
        check_metric(METRICS["fid"], path, JudgeOptions(download=True))
        assert path.read_text() == "weights"
        assert asked == [(METRICS["fid"].published, "6726825d")] * 2

    def test_a_model_and_its_tokenizer_are_fetched_into_one_folder(self, tmp_path, monkeypatch, pictures):
        local = clip_folder(tmp_path / "published")
        asked = []

        def fetched(kind, name):
            asked.append(name)
            return kind.from_pretrained(local)

        monkeypatch.setattr("transformers.AutoModel.from_pretrained", partial(fetched, CLIPModel))
        monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", partial(fetched, CLIPProcessor))
        folder = tmp_path / "weights" / "PickScore_v1"
        check_metric(METRICS["pickscore"], folder, JudgeOptions(download=True))
        assert asked == ["yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"]
        assert [path.name for path in folder.parent.iterdir()] == ["PickScore_v1"]
        assert judge("pickscore", folder)(pictures) == judge("pickscore", local)(pictures)
        check_metric(METRICS["pickscore"], folder, JudgeOptions(download=True))
        assert len(asked) == 2

    @pytest.mark.parametrize("name", ["fid", "lpips", "hps"])
    def test_no_code_of_a_file_is_run(self, tmp_path, name):
        class Evil:
            def __reduce__(self):
                return (open, (str(tmp_path / "was-run"), "w"))

        path = tmp_path / "weights.pth"
        torch.save({"state_dict": {"a": Evil()}}, path)
        with pytest.raises(SoftREPAError, match="expected"):
            judge(name, path, hps_architecture="RN50")
        assert not (tmp_path / "was-run").exists()

    def test_weights_of_something_else_are_refused(self, tmp_path):
        path = tmp_path / "weights.pth"
        torch.save({"features.0.weight": torch.zeros(3)}, path)
        with pytest.raises(SoftREPAError, match=r"which lacks \d+ of \d+ weights \(first"):
            judge("lpips", path, lpips_net="squeeze")
        path.write_bytes(b"no weights")
        with pytest.raises(SoftREPAError, match="expected a file of weights"):
            judge("lpips", path, lpips_net="squeeze")
        folder = tmp_path / "empty"
        folder.mkdir()
        with pytest.raises(SoftREPAError, match="which cannot be loaded .* expected openai/clip-vit-large-patch14 or"):
            judge("clip", folder)

    @pytest.mark.parametrize(
        ("name", "module", "package"),
        [
            ("clip", "transformers", "transformers"),
            ("hps", "open_clip", "open_clip_torch"),
            ("fid", "torch_fidelity", "torch-fidelity"),
            ("lpips", "torchmetrics", "torchmetrics"),
        ],
    )
    def test_a_library_that_is_missing_is_named_before_anything_is_drawn(self, monkeypatch, name, module, package):
        monkeypatch.setattr(metrics, "is_installed", lambda asked: asked != module)
        with pytest.raises(SoftREPAError, match=rf"metrics {name} needs {package}, .*: pip install {package}\."):
            check_metric(METRICS[name], Path("x"), JudgeOptions())

    def test_all_libraries_are_here(self):
        assert all(metrics.is_installed(module) for metric in METRICS.values() for module in metric.packages)
        assert not metrics.is_installed("no_such_library")
