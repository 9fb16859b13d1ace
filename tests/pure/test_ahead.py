"""What is encoded before it is drawn, and captions of other images that a batch is compared with."""

import random
from collections import Counter

import pytest
import torch
from comfyui_softrepa.softrepa.data.ahead import FIRST_STRETCH, LONGEST_STRETCH
from comfyui_softrepa.softrepa.data.batches import Example, caption_key
from comfyui_softrepa.softrepa.data.dataset import Dataset, further_captions
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.training import loss
from comfyui_softrepa.softrepa.training.config import TrainingConfig
from softrepa_tests.toy_training import batches, trainer


class Stretch:
    def __init__(self, plan, log):
        self.batches, self.log = list(plan), log
        self.names = {one.name for needed in self.batches for one in needed.images}
        self.captions = {caption for needed in self.batches for caption in needed.captions}

    def has(self, needed):
        return self.captions.issuperset(needed.captions) and self.names.issuperset(one.name for one in needed.images)

    def latent(self, example):
        self.log.append(example.name in self.names)
        return torch.zeros(4, 8, 8)

    def cond(self, caption):
        self.log.append(caption in self.captions)
        return caption


class Logged:
    """Encodings that remember their stretches, and whether what was asked for was in one."""

    identity, empty = "logged", ""

    def __init__(self):
        self.stretches, self.log = [], []

    def ahead(self, plan):
        self.stretches.append(Stretch(plan, self.log))
        return self.stretches[-1]

    def prepare(self, captions):
        raise AssertionError(captions)


def examples(count, captions=2) -> list[Example]:
    return [
        Example(f"{i}.png", f"digest{i}", tuple(f"a cat {i} on mat {i} {j}" for j in range(captions)), (64, 64))
        for i in range(count)
    ]


def dataset(count=40, captions=2) -> Dataset:
    return Dataset("toy", examples(count, captions), [], Logged(), [])


def lengths(data) -> list[int]:
    return [len(stretch.batches) for stretch in data.encodings.stretches]


def test_batches_are_encoded_a_stretch_ahead_up_to_the_last_one():
    data = dataset()
    plain = dataset().started(0)
    expected = [plain.batch(4, 1, 6).captions for _ in range(50)]
    view = data.started(0)
    assert [view.batch(4, 1, 6, left=50 - step).captions for step in range(50)] == expected
    assert lengths(data) == [FIRST_STRETCH, 2 * FIRST_STRETCH, 50 - 3 * FIRST_STRETCH]
    assert all(data.encodings.log)
    assert lengths(data.started(0)) != []  # the same encodings
    assert len(plain.encodings.stretches) == 50  # nothing that nobody asked for


def test_a_stretch_has_an_end():
    data = dataset(400)
    view = data.started(0)
    for _ in range(1200):
        view.batch(2, left=10**9)
    assert max(lengths(data)) == LONGEST_STRETCH


def test_going_back_encodes_nothing_again():
    data = dataset()
    view = data.started(0)
    position = view.state()
    first = view.batch(4, left=50)
    view.restore(position)
    assert view.batch(4, left=50).captions == first.captions
    assert lengths(data) == [FIRST_STRETCH]
    resumed = data.started(0)
    resumed.restore(view.state())
    assert resumed.batch(4, left=49).captions == view.batch(4, left=49).captions


def test_what_is_measured_on_is_encoded_ahead_and_no_further():
    train, held_out = examples(40)[:28], examples(40)[28:]
    data = Dataset("toy", train, held_out, Logged(), [])
    assert len(list(data.validation_batches(2, 3))) == 3
    assert lengths(data) == [3]
    assert len(list(data.started(0).one_epoch(2, 5))) == 5
    assert lengths(data) == [3, 5]
    assert len(list(data.validation_batches(2))) == 6
    assert [len(list(data.started(0).one_epoch(2))), sum(lengths(data)[3:])] == [14, 14]
    assert all(data.encodings.log)


def test_hard_negatives_of_many_captions_are_made_while_training():
    data = dataset(300, captions=4)
    data.encodings.prepare = lambda captions: ""
    assert "while training" in data.prepare_hard_negatives()
    plain = Dataset(
        "toy",
        [Example(f"{i}", f"d{i}", tuple(f"cat{j}{i}" for j in range(4)), (64, 64)) for i in range(300)],
        [],
        data.encodings,
        [],
    )
    with pytest.raises(SoftREPAError, match="no caption with two words to swap"):
        plain.prepare_hard_negatives()


def test_further_captions_are_wrong_for_all_of_the_batch():
    shared = Example("copy.png", "digest0", ("a copy of the first",), (32, 32))
    equal = Example("equal.png", "digest77", ("A cat 0 on mat 0 1.", "a dog"), (32, 32))
    found = [*examples(12), shared, equal]
    drawn = [(one, one.captions[0]) for one in found[:4]]
    seen = Counter()
    for seed in range(60):
        captions = further_captions(found, drawn, 5, random.Random(seed))
        assert len(set(map(caption_key, captions))) == 5
        seen.update(captions)
    owned = {key for one, _ in drawn for key in one.caption_keys}
    assert not owned & set(map(caption_key, seen))
    assert "a copy of the first" not in seen
    assert seen.keys() >= {caption for one in found[4:12] for caption in one.captions}
    assert len(further_captions(found, drawn, 99, random.Random(0))) in (8, 9)  # as many as there are


def test_batches_with_more_negatives_than_images():
    first, again = dataset().started(3), dataset().started(3)
    for _ in range(12):
        batch = first.batch(4, negatives=10)
        assert len(batch.conds) == 4
        assert len(batch.further) == 10 - 3
        assert len(set(batch.conds + batch.further)) == 11
        assert again.batch(4, negatives=10).further == batch.further
    assert first.batch(4, negatives=2).further == []
    assert dataset().started(3).batch(4).captions == dataset().started(3).batch(4, negatives=10).captions


def test_every_caption_is_wrong_for_as_many_images():
    order = torch.tensor([2, 0, 4, 1, 3])
    compared = loss.comparison([1, 0, 0, 2, 0], negatives=2, order=order)
    assert compared.shape == (5, 8)
    assert compared[:, :5].sum(1).tolist() == compared[:, :5].sum(0).tolist() == [3] * 5
    assert compared.diagonal().all()
    assert compared[:, 5:].sum(1).tolist() == [1, 0, 0, 2, 0]
    assert compared[2].nonzero().flatten().tolist() == [0, 2, 4]  # itself and the next two in the order
    for negatives in (0, 4):
        assert loss.comparison([0] * 5, negatives=negatives).all()
    assert loss.comparison([0] * 5, shared=9, negatives=8).shape == (5, 9)


@pytest.mark.parametrize(("negatives", "pairs"), [(0, 16), (1, 8), (2, 12), (3, 16), (6, 28)])
def test_a_step_costs_its_negatives(negatives, pairs):
    run = trainer(negatives=negatives)
    plain = run.next_batch

    def next_batch(size):
        latents, conds, wrong = plain(size)
        more = [conds[0] | {"name": f"further {j}"} for j in range(max(0, negatives - size + 1))]
        return latents, conds + more, wrong

    run.next_batch = next_batch
    sizes = []
    gradients = run.pairs.gradients
    run.pairs.gradients = lambda rows, batch, size: sizes.append(batch.pairs) or gradients(rows, batch, size)
    record = run.step(1)
    assert sum(sizes) == pairs
    assert 0 <= record.accuracy <= 1


def test_who_is_not_compared_does_not_count():
    errors = torch.tensor([[2.0, 1.0, 9.0], [3.0, 2.0, 1.0], [1.0, 9.0, 2.0]])
    compared = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1]]).bool()
    assert loss.retrieval_accuracy(errors) == 0.0
    assert loss.retrieval_accuracy(errors, compared) == 1.0
    tau = errors[compared].mean()
    expected = loss.contrast(errors, tau, 4.0, compared).mean()
    assert torch.equal(loss.contrastive_loss(errors, 1.0, relative=True, compared=compared), expected)
    wide = torch.cat([errors, torch.full((3, 2), 100.0)], dim=1)
    mask = torch.cat([compared, torch.ones(3, 2).bool()], dim=1)
    expected = loss.contrast(wide, wide[mask].mean(), 4.0, mask).mean()
    assert torch.equal(loss.contrastive_loss(wide, 1.0, relative=True, compared=mask, shared=5), expected)


def test_negatives_that_do_not_go_together():
    for options, message in (
        ({"negatives": 2, "symmetric": True}, "symmetric is True, expected False with negatives 2"),
        ({"negatives": -1}, "negatives is -1, expected 0 or more"),
        (
            {"negatives": 2, "objective": "denoising"},
            "negatives is 2, expected its default, 0, with objective denoising",
        ),
    ):
        with pytest.raises(SoftREPAError, match=message):
            TrainingConfig(steps=1, **options)
    assert [TrainingConfig(negatives=negatives, hard_negatives=1).wrong_captions for negatives in (0, 2, 9)] == [
        4,
        3,
        10,
    ]


def test_a_run_with_negatives_goes_on_as_it_was():
    whole, first = trainer(negatives=1), trainer(negatives=1)
    for _ in range(6):
        whole.step(1)
    for _ in range(3):
        first.step(1)
    second = trainer(negatives=1)
    second.tokens.load_state_dict(first.tokens.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.generator.set_state(first.generator.get_state())
    second.step_index, second.next_batch = 3, batches()
    for _ in range(3):
        second.next_batch(4)
    for _ in range(3):
        second.step(1)
    assert torch.equal(second.tokens.tokens, whole.tokens.tokens)
