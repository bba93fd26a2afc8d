"""Batches: the same every time, and the parts make up the whole."""

import pytest
import torch
from captioner_training.batches import make_parts
from captioner_training.experiment import Experiment
from shape_data import make_config, stage

from captioner.tokenizer import END, PAD, START


@pytest.fixture(scope="module")
def experiment(data, cache) -> Experiment:
    return Experiment(make_config(), data, cache)


def parts_of(experiment, rows, rank=0, count=1, epoch="0 0 0", **changes):
    settings = make_config([stage(**changes)]).stages[0]
    return make_parts(
        [("shapes", i) for i in rows],
        experiment.targets,
        experiment.features(settings),
        settings,
        epoch,
        flips=True,
        rank=rank,
        count=count,
    )


def batch_of(experiment, rows, **options):
    (batch,) = parts_of(experiment, rows, **options)
    return batch


def test_a_batch_holds_what_was_asked_for(experiment):
    batch = batch_of(experiment, [3, 5, 9])
    assert batch.lengths.tolist() == sorted(batch.lengths.tolist(), reverse=True)
    assert sorted(batch.picture.tolist()) == [0, 0, 1, 1, 2, 2]
    assert batch.all_captions == 6
    assert batch.all_tokens == int(batch.lengths.sum())
    known = {tuple(t) for row in (3, 5, 9) for t in experiment.targets["shapes"][row]}
    found = set()
    for tokens, length in zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True):
        assert tokens[0] == START
        assert tokens[length] == END
        assert set(tokens[length + 1 :]) <= {PAD}
        found.add(tuple(tokens[1 : length + 1]))
    assert found == known


def test_a_batch_is_the_same_every_time_and_another_in_another_epoch(experiment):
    first, second = batch_of(experiment, [3, 5, 9, 11]), batch_of(experiment, [3, 5, 9, 11])
    assert torch.equal(first.features, second.features)
    assert torch.equal(first.tokens, second.tokens)
    others = [batch_of(experiment, [3, 5, 9, 11], epoch=f"0 0 {n}") for n in range(1, 6)]
    assert any(not torch.equal(first.features.sort(0)[0], b.features.sort(0)[0]) for b in others)  # mirrored


def test_fewer_captions_of_a_picture_can_be_taken(experiment):
    batch = batch_of(experiment, [3, 5, 9], captions_per_picture=1)
    assert sorted(batch.picture.tolist()) == [0, 1, 2]
    assert batch.all_captions == 3


def test_the_shares_of_the_processes_make_up_the_batch(experiment):
    rows = [0, 4, 7, 12, 20]
    whole = batch_of(experiment, rows)
    shares = [batch_of(experiment, rows, rank=rank, count=3) for rank in range(3)]
    assert {(s.all_tokens, s.all_captions) for s in shares} == {(whole.all_tokens, whole.all_captions)}

    def content(batch):
        return sorted(
            (tokens[: length + 1], batch.features[picture].sum().item())
            for tokens, length, picture in zip(
                batch.tokens.tolist(), batch.lengths.tolist(), batch.picture.tolist(), strict=True
            )
        )

    assert sorted(c for s in shares for c in content(s)) == content(whole)


def test_a_batch_in_parts_is_shared_as_among_processes(experiment):
    rows = [0, 4, 7, 12, 20]
    parts = [p for rank in range(2) for p in parts_of(experiment, rows, rank=rank, count=2, accumulate=2)]
    shares = [batch_of(experiment, rows, rank=rank, count=4) for rank in range(4)]
    for part, share in zip(parts, [shares[i] for i in (0, 2, 1, 3)], strict=True):
        assert torch.equal(part.features, share.features)
        assert torch.equal(part.tokens, share.tokens)
        assert part.all_tokens == share.all_tokens


def test_more_processes_than_pictures_leave_some_with_nothing(experiment):
    assert [len(parts_of(experiment, [3, 4], rank=rank, count=3)) for rank in range(3)] == [1, 1, 0]


class Numbered:
    """Stands in for a cache: a feature tells which picture and variant it is of."""

    variants = 4
    frames = 1

    def __init__(self, source):
        self.source = source

    def read(self, indices, variants, *, seed=None):
        return torch.tensor([[[self.source, i, v]] for i, v in zip(indices, variants, strict=True)])

    def mask(self, indices, variants=None):
        return torch.tensor(
            [[1000 * self.source + 10 * i + v] for i, v in zip(indices, variants, strict=True)]
        )


def test_new_crops_are_the_same_with_any_number_of_processes():
    class Told(Numbered):
        def read(self, indices, variants, *, seed=None):
            seeds.add(seed)
            return super().read(indices, variants)

    seeds = set()
    places, features = [("a", i) for i in range(6)], {"a": Told(1)}
    settings = make_config([stage()]).stages[0]
    for rank, count in ((0, 1), (0, 2), (1, 2)):
        make_parts(
            places, {"a": [[[7, END]]] * 6}, features, settings, "x", flips=True, rank=rank, count=count
        )
    assert len(seeds) == 1
    make_parts(places, {"a": [[[7, END]]] * 6}, features, settings, "y", flips=True)
    assert len(seeds) == 2


def test_sources_are_mixed_and_every_variant_is_seen():
    targets = {"a": [[[7, END]]] * 9, "b": [[[8, END]]] * 9}
    features = {"a": Numbered(1), "b": Numbered(2)}
    places = [("b", 3), ("a", 5), ("b", 1), ("a", 2)]
    settings = make_config([stage()]).stages[0]
    seen = {True: set(), False: set()}
    for flips in seen:
        for number in range(60):
            (batch,) = make_parts(places, targets, features, settings, str(number), flips=flips)
            for place, row, mask in zip(
                batch.places, batch.features.tolist(), batch.mask.tolist(), strict=True
            ):
                source, index, variant = row[0]
                assert place == ("ab"[source - 1], index)
                assert mask == [1000 * source + 10 * index + variant]
                seen[flips].add(variant)
            assert sorted(batch.places) == sorted(places)
    assert seen == {True: {0, 1, 2, 3}, False: {0, 1, 2, 3}}
