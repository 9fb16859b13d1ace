"""The small world without ComfyUI: what is drawn, what the checker says of it, how the model's file is packed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.smallworld import checker, fitting
from benchmarks.smallworld.measure import measure_checker, wilson
from softrepa.smallworld import checkpoint, pictures, text, world
from softrepa.smallworld.world import Group, Scene, Spec, Thing

TOKENS = [1.12109375, -1.0654296875, 1.3486328125]
POSITIONS = [0.389892578125, -0.156982421875]
PAPER = (0.9, 0.92, 0.9, 0.0, 0.03)


def picture(*things):
    return world.draw(Scene(tuple(Thing(*thing) for thing in things), PAPER))


RED_CIRCLE_LEFT_OF_BLUE_SQUARE = picture(("circle", "red", "large", 16, 48), ("square", "blue", "small", 80, 50))
PAIR = (Group("circle", colour="red"), Group("square", colour="blue"))


def test_pictures_of_a_seed_are_the_same_and_stay(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        pictures.write_pictures(folder, 12, seed=3)
    names = sorted(path.name for path in one.iterdir())
    assert len(names) == 24
    assert {name: (one / name).read_bytes() for name in names} == {name: (other / name).read_bytes() for name in names}
    drawn, text = (one / "0004.png").read_bytes(), one / "0005.txt"
    (one / "0004.png").unlink()
    text.write_text("mine", encoding="utf-8")
    pictures.write_pictures(one, 12, seed=3)
    assert (one / "0004.png").read_bytes() == drawn
    assert text.read_text(encoding="utf-8") == "mine"


def verdict(image, *groups, relation=None):
    return checker.facts(checker.find(image), Spec(groups, relation))


def test_checker_reads_drawn_scenes_and_refuses_wrong_captions():
    report = measure_checker(700, seed=3)
    assert report["scenes read exactly"]["share"] >= 0.995
    assert report["true captions accepted"]["share"] >= 0.995
    assert report["captions wrong by one fact refused"]["share"] >= 0.995


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("size", world.SIZES)
def test_checker_names_every_shape_colour_and_size(shape, size):
    for colour in world.COLOURS:
        (found,) = checker.find(picture((shape, colour, size, 40.3, 51.6)))
        assert (found.shape, found.colour, found.size) == (shape, colour, size)
        assert abs(found.x - 40.3) < 1.5
        assert abs(found.y - 51.6) < 1.5


def test_facts_of_a_pair():
    everything = verdict(RED_CIRCLE_LEFT_OF_BLUE_SQUARE, *PAIR, relation="left of")
    assert everything == {"two_objects": True, "colour_attribution": True, "position": True}


def test_swapped_colours_fail_only_attribution():
    swapped = (replace(PAIR[0], colour="blue"), replace(PAIR[1], colour="red"))
    assert verdict(RED_CIRCLE_LEFT_OF_BLUE_SQUARE, *swapped) == {"two_objects": True, "colour_attribution": False}


@pytest.mark.parametrize("relation", ["right of", "above", "below"])
def test_wrong_relations_fail(relation):
    assert verdict(RED_CIRCLE_LEFT_OF_BLUE_SQUARE, *PAIR, relation=relation)["position"] is False


@pytest.mark.parametrize("relation", world.RELATIONS)
def test_every_relation_holds_where_it_is_drawn(relation):
    spec = Spec((Group("circle"), Group("cross")), relation)
    for seed in range(20):
        scene = world.random_scene(np.random.default_rng(seed), spec)
        assert checker.correct(world.draw(scene), spec)


def test_counts_are_exact():
    three = picture(*(("diamond", "green", "small", x, 48) for x in (16, 48, 80)))
    for count in (2, 4):
        assert verdict(three, Group("diamond", count))["counting"] is False
    assert verdict(three, Group("diamond", 3)) == {"single_object": True, "counting": True}


def test_missing_object_fails():
    assert verdict(RED_CIRCLE_LEFT_OF_BLUE_SQUARE, Group("triangle")) == {"single_object": False}
    assert verdict(RED_CIRCLE_LEFT_OF_BLUE_SQUARE, Group("circle"), Group("cross")) == {"two_objects": False}


def test_colour_outside_the_palette_is_no_colour():
    image = RED_CIRCLE_LEFT_OF_BLUE_SQUARE.copy()
    image[image.min(-1) < 0.55] = (0.5, 0.5, 0.1)
    assert {found.colour for found in checker.find(image)} == {None}


def test_shapeless_blot_is_no_shape():
    image = picture()
    image[20:60, 20:24] = image[56:60, 20:60] = (0.86, 0.16, 0.16)  # an L
    (found,) = checker.find(image)
    assert (found.shape, found.colour) == (None, "red")


def test_noise_and_empty_pictures():
    assert checker.find(picture()) == []
    noise = np.random.default_rng(0).random((96, 96, 3)).astype(np.float32)
    assert not [found for found in checker.find(noise) if found.shape and found.colour]


def test_how_many_too_many_or_too_few():
    three = checker.find(picture(*(("diamond", "green", "small", x, 48) for x in (16, 48, 80))))
    assert [checker.surplus(three, Spec((Group("diamond", count),))) for count in (2, 3, 4)] == [[1], [0], [-1]]
    assert checker.surplus(three, Spec((Group("diamond"), Group("cross", 2)))) == [2, -2]


def half_drawn(rows: int):
    """A large diamond without its lowest rows."""
    image = picture(("diamond", "red", "large", 48, 48))
    last = np.flatnonzero((image.min(-1) < 0.55).any(1))[-1]
    image[last - rows + 1 : last + 1] = image[0, 0]
    return checker.find(image)


def test_the_margin_of_what_is_half_drawn():
    """Where one row of pixels turns the verdict, the verdicts on both sides are near each other."""
    spec = Spec((Group("diamond"),))
    found = [half_drawn(rows) for rows in range(14)]
    right = [all(checker.facts(things, spec).values()) for things in found]
    margins = [checker.margin(things, spec) for things in found]
    turn = right.index(False)
    assert right == [True] * turn + [False] * (14 - turn)
    assert max(margins[turn - 1 : turn + 1]) < 0.06 < min(margins[0], margins[-1])


def test_the_margin_of_what_is_drawn_whole():
    rng = np.random.default_rng(5)
    for number in range(60):
        spec = world.random_spec(rng, world.CATEGORIES[number % 6])
        assert checker.margin(checker.find(world.draw(world.random_scene(rng, spec))), spec) > checker.UNCLEAR


@pytest.mark.parametrize(
    ("shape", "overlaps", "margin"),
    [
        ("circle", {"circle": 0.9, "square": 0.8}, 0.1),  # it might be a square
        ("circle", {"circle": 0.7, "square": 0.3}, 0.05),  # or nothing
        ("square", {"circle": 0.3, "square": 0.8}, 0.5),
        (None, {"circle": 0.6, "square": 0.5}, 0.05),
        (None, {"circle": 0.4, "square": 0.5}, 0.25),  # more than the square, and enough
    ],
)
def test_margins_by_hand(shape, overlaps, margin):
    thing = checker.Found(shape, "red", "large", 48, 48, overlaps)
    assert checker.margin([thing], Spec((Group("circle"),))) == pytest.approx(margin)


def test_a_thing_that_decides_nothing_has_no_margin():
    circle, blot = checker.find(RED_CIRCLE_LEFT_OF_BLUE_SQUARE)[0], half_drawn(7)[0]
    spec = Spec((Group(str(circle.shape)),))
    assert checker.margin([circle, circle, blot], spec) == 1  # neither of two circles alone turns the verdict
    assert checker.margin([circle], spec) < 0.4


def test_checker_says_which_picture_size_it_reads():
    with pytest.raises(ValueError, match=r"expected a picture of shape \(96, 96, 3\), got \(64, 64, 3\)"):
        checker.find(np.zeros((64, 64, 3), np.float32))


def test_label_numbers_components():
    mask = np.array([[1, 1, 0, 1], [0, 1, 0, 1], [1, 0, 0, 1], [1, 0, 1, 0]], bool)
    labels, count = checker.label(mask)
    assert count == 4
    assert (labels > 0).tolist() == mask.tolist()
    assert labels[0, 0] == labels[1, 1]
    assert len({labels[0, 0], labels[2, 0], labels[0, 3], labels[3, 2]}) == 4


def test_captions_say_the_spec():
    spec = Spec((Group("triangle", 2, "red", "small"), Group("square", 1, "orange")), "left of")
    assert world.plain_caption(spec) == "two small red triangles left of an orange square"
    wordings = {world.caption(np.random.default_rng(seed), spec) for seed in range(60)}
    assert "a drawing of two small red triangles to the left of an orange square" in wordings
    assert "an orange square right of two small red triangles" in wordings
    assert len(wordings) > 8


def test_plain_caption_of_three_groups():
    groups = tuple(Group(shape) for shape in ("circle", "square", "cross"))
    assert world.plain_caption(Spec(groups)) == "a circle, a square and a cross"


def test_hard_negatives_change_one_fact_and_keep_the_shapes():
    rng = np.random.default_rng(1)
    for category in ("counting", "position", "colour_attribution", "mixed"):
        for _ in range(30):
            spec = world.random_spec(rng, category)
            for other in world.hard_negatives(spec):
                assert other != spec
                assert [group.shape for group in other.groups] == [group.shape for group in spec.groups]


def test_scenes_repeat_for_a_seed():
    scenes = [world.random_scene(np.random.default_rng(5), Spec((Group("circle", 3),))) for _ in range(2)]
    assert scenes[0] == scenes[1]


def test_unknown_category_is_named():
    with pytest.raises(ValueError, match="unknown category 'cats'"):
        world.random_spec(np.random.default_rng(0), "cats")


def test_text_weights_are_the_same_everywhere():
    tokens, positions = text.embeddings()
    assert tokens.shape == (49408, 768)
    assert tokens[[0, 320, 49407], [0, 5, 767]].tolist() == TOKENS
    assert positions[[0, 18], [0, 3]].tolist() == POSITIONS
    assert positions[18:].eq(positions[18]).all()
    assert abs(tokens.float().std().item() - 1) < 1e-3


def test_quantised_weights_are_close():
    weights = {"a.weight": torch.randn(64, 48), "conv": torch.randn(8, 4, 2, 2), "bias": torch.randn(9)}
    back = checkpoint.dequantise(checkpoint.quantise(weights))
    assert back["bias"].equal(weights["bias"])
    for key in ("a.weight", "conv"):
        rows = weights[key].flatten(1)
        assert back[key].shape == weights[key].shape
        assert ((back[key].flatten(1) - rows).abs() <= rows.abs().amax(1, keepdim=True) / 250).all()


def test_shipped_file_is_small_and_complete():
    assert checkpoint.SHIPPED.stat().st_size < 8_000_000
    parts = checkpoint.read_shipped()
    assert parts["model"]["x_embedder.proj.weight"].shape == (192, 16, 2, 2)
    assert parts["encoder"]["outline"].shape == (13, 64)
    assert all(value.isfinite().all() for part in parts.values() for value in part.values())


def test_other_files_are_refused(tmp_path):
    fitting.save_atomically({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors is not a smallworld-1 file"):
        checkpoint.read_shipped(tmp_path / "other.safetensors")


def test_broken_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")

    def fail(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(fitting, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        fitting.save_atomically({"x": torch.zeros(1)}, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]
    assert path.read_bytes() == b"old"


def _a_number(rng):
    return float(rng.random())


def test_training_resumes_where_it_stopped(tmp_path):
    """With batches drawn as they are needed or ahead by other processes."""

    def run(folder, workers, *stops):
        for stop in stops:
            torch.manual_seed(0)
            module = torch.nn.Linear(3, 2)

            def loss(drawn, rng, generator, module=module, stop=stop):
                if stop == "stopped" and loss.steps == 25:
                    raise KeyboardInterrupt
                loss.steps += 1
                noise = torch.randn(4, 3, generator=generator) + drawn * float(rng.random())
                return (module(noise) - 1).square().mean()

            loss.steps = 0
            schedule = fitting.Schedule(40, lr=0.01, seed=4, warmup=5, save_every=10)
            if stop == "stopped":
                with pytest.raises(KeyboardInterrupt):
                    fitting.fit(module, _a_number, loss, schedule, folder, "line", workers=workers)
            else:
                return fitting.fit(module, _a_number, loss, schedule, folder, "line", workers=workers)
        return None

    whole = run(tmp_path / "whole", 0, "finished")
    resumed = run(tmp_path / "resumed", 2, "stopped", "finished")
    for key, value in whole.items():
        assert torch.equal(value, resumed[key])


def test_wilson_interval():
    low, high = wilson(90, 100)
    assert (round(low, 3), round(high, 3)) == (0.826, 0.945)
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-9)
