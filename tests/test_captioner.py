from __future__ import annotations

import io
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from conftest import make_header
from lively import lively_captioner, make_calibration, make_lively_model, pictures
from PIL import Image

import captioner as package
from captioner import Captioner, CheckpointError, GridFeatures, ImageError, checkpoint, identity
from captioner.calibration import caption_features, word_ranks
from captioner.captioner import pool
from captioner.decoder import DecoderConfig
from captioner.encoder import concatenate
from captioner.model import CaptionModel
from captioner.search import search
from captioner.tokenizer import BpeTokenizer


@pytest.fixture
def captioner() -> Captioner:
    return lively_captioner()


def words(caption: package.Caption) -> list[str]:
    return [word.text for word in caption.words]


def same(one: package.Caption, other: package.Caption) -> None:
    """All of two captions is equal to the last bit."""
    assert one.to_dict(attention=True) == other.to_dict(attention=True)


def alike(one: package.Caption, other: package.Caption) -> None:
    """The words are equal, and the numbers as far as another order of additions allows."""
    assert one.text == other.text
    assert one.score == pytest.approx(other.score, abs=1e-4)
    assert one.confidence == pytest.approx(other.confidence, abs=1e-4)
    assert one.attention is not None
    np.testing.assert_allclose(one.attention, other.attention, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# The package and loading


def test_everything_in_all_is_there() -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'Captionor'"):
        package.Captionor  # noqa: B018


def test_load_gives_the_saved_model(tmp_path: Path) -> None:
    calibration = make_calibration()
    model = make_lively_model()
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, model, make_header(model), calibration)
    loaded = Captioner.load(path, device="cpu")
    assert loaded.device.type == "cpu"
    assert loaded.calibration is not None
    assert loaded.options().beam == 3
    assert loaded.options().max_length == 12
    # weights are stored in 16 bits, so the words may differ from the original's, but not between loads
    again = Captioner.load(str(path))
    for picture in pictures(5):
        same(loaded.caption(picture), again.caption(picture))


def test_load_without_a_path_takes_the_built_in(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "BUILT_IN", tiny_checkpoint)
    assert Captioner.load().header.name == "tiny"


def test_load_errors(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors"):
        Captioner.load(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="unknown device 'warp'; use auto, cpu, cuda"):
        Captioner.load(tiny_checkpoint, device="warp")
    with pytest.raises(ValueError, match="device 'meta' is not available here"):
        Captioner.load(tiny_checkpoint, device="meta")
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, float16"):
        Captioner.load(tiny_checkpoint, device="cpu", precision="int8")


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps"])
def test_a_missing_device_is_named(
    device: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device '{device}' is not available here"):
        Captioner.load(tiny_checkpoint, device=device)


def test_the_global_random_state_stays(tiny_checkpoint: Path) -> None:
    before = torch.random.get_rng_state()
    Captioner.load(tiny_checkpoint, device="cpu").caption(pictures(1)[0], sample=True)
    assert torch.equal(torch.random.get_rng_state(), before)


class FakeMps:
    """A machine with MPS: what is loaded there is on the CPU, but changed by ``damage``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, damage: object) -> None:
        self.devices: list[str] = []
        self.damage = damage
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        monkeypatch.setattr(checkpoint, "load", self.load)

    def load(self, path: Path, device: object) -> checkpoint.Loaded:
        self.devices.append(str(device))
        model = make_lively_model()
        if str(device) == "mps":
            self.damage(model)  # type: ignore[operator]
        return checkpoint.Loaded(model, make_header(model), None)


def harmless(model: CaptionModel) -> None:
    model.on_mps = True


def wrong_words(model: CaptionModel) -> None:
    model.on_mps = True
    with torch.no_grad():
        model.decoder.output.bias[7] += 50


def lacks_an_operation(model: CaptionModel) -> None:
    model.on_mps = True

    def fail(*_: object) -> None:
        raise NotImplementedError("not implemented for MPS")

    model.encoder.network.register_forward_hook(fail)


def cannot_be_moved(model: CaptionModel) -> None:
    raise RuntimeError("PyTorch is not linked with support for mps devices")


@pytest.mark.parametrize(
    ("damage", "taken"),
    [(harmless, True), (wrong_words, False), (lacks_an_operation, False), (cannot_be_moved, False)],
)
def test_auto_takes_mps_only_if_it_gives_the_words_of_the_cpu(
    damage: object, taken: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = FakeMps(monkeypatch, damage)
    loaded = Captioner.load(tmp_path / "any", device="auto")
    assert hasattr(loaded.model, "on_mps") == taken
    assert sorted(machine.devices) == ["cpu", "mps"]


def test_mps_is_taken_unchecked_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = FakeMps(monkeypatch, wrong_words)
    assert hasattr(Captioner.load(tmp_path / "any", device="mps").model, "on_mps")
    assert machine.devices == ["mps"]


def test_auto_prefers_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = FakeMps(monkeypatch, harmless)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    Captioner.load(tmp_path / "any")
    assert machine.devices == ["cuda"]


def test_bfloat16_is_near_float32(captioner: Captioner) -> None:
    model = make_lively_model()
    half = Captioner(model, make_header(model), precision="bfloat16")
    picture = pictures(1)[0]
    found, expected = half.encode(picture).data, captioner.encode(picture).data
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    # random weights make much of roundings
    assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).min() > 0.8


def test_vocabulary(captioner: Captioner) -> None:
    assert captioner.vocabulary[:3] == ["a", "the", "on"]
    assert len(captioner.vocabulary) == 30


# --------------------------------------------------------------------------------------------------
# What can be captioned


def test_all_kinds_of_pictures_give_the_same_caption(captioner: Captioner, tmp_path: Path) -> None:
    array = pictures(3)[2]
    image = Image.fromarray(array)
    path = tmp_path / "picture.png"
    image.save(path)
    expected = captioner.caption(array)
    data = path.read_bytes()
    for source in (path, str(path), data, bytearray(data), io.BytesIO(data), image):
        same(captioner.caption(source), expected)


def test_a_real_photo_with_its_overlay(captioner: Captioner) -> None:
    photo = skimage.data.chelsea()
    caption = captioner.caption(photo)
    assert caption.text == " ".join(words(caption))
    assert (caption.fit.width, caption.fit.height) == (photo.shape[1], photo.shape[0])
    assert caption.grid == (2, 2)
    sheet = caption.overlay(photo)
    assert isinstance(sheet, Image.Image)
    assert np.asarray(sheet).std() > 10


def test_encode_once_ask_often(captioner: Captioner) -> None:
    picture = pictures(2)[1]
    features = captioner.encode(picture)
    assert isinstance(features, GridFeatures)
    assert features.data.shape == (1, 1, 4, 1280)
    height, width = picture.shape[:2]
    for options in (
        {},
        {"prefix": "a red"},
        {"region": (0, 0, width / 2, height)},
        {"must": ["tree"]},
        {"beam": 5, "n_best": 4},
        {"sample": True, "seed": 11, "temperature": 0.7},
    ):
        same(captioner.caption(features, **options), captioner.caption(picture, **options))


def test_what_a_caption_holds(captioner: Captioner) -> None:
    for picture in pictures(10):
        caption = captioner.caption(picture)
        assert caption.attention is not None
        assert caption.attention.shape == (len(caption.words), 1, 4)
        assert caption.attention.dtype == np.float32
        np.testing.assert_allclose(caption.attention.sum((1, 2)), 1, atol=1e-5)
        assert caption.times.tolist() == [0.0]
        assert 0 <= caption.confidence <= 1
        assert caption.n_best == ()
        for word in caption.words:
            assert 0 <= word.probability <= 1
            assert word.confidence == word.probability  # without a calibration
            assert word.gate is not None
            assert 0 <= word.gate <= 1
            assert not word.given
            shown = [a.probability for a in word.alternatives]
            assert shown == sorted(shown, reverse=True)
            assert sum(shown) <= 1 + 1e-6
            own = [a.probability for a in word.alternatives if a.text == word.text]
            assert not own or own == [pytest.approx(word.probability, rel=1e-5)]
        logs = np.log([word.probability for word in caption.words])
        assert caption.confidence == pytest.approx(np.exp(logs.mean()), rel=1e-6)
        # what is missing from the sum is the end
        end = caption.log_probability - logs.sum()
        assert end < 1e-5
        length = len(caption.words) + 1
        assert caption.score == pytest.approx(caption.log_probability / length**0.7, rel=1e-5)


def test_a_model_without_attention_says_so() -> None:
    model = make_lively_model(attention="none")
    captioner = Captioner(model, make_header(model))
    caption = captioner.caption(pictures(1)[0])
    assert caption.words
    assert all(word.attention is None for word in caption.words)
    assert caption.attention is None
    assert caption.to_dict(attention=True)["words"][0]["attention"] is None
    assert caption.overlay(pictures(1)[0]).size[0] > 0


def test_a_caption_without_words(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_lively_model()
    with torch.no_grad():
        model.decoder.output.bias[2] += 100  # the end
    empty = Captioner(model, make_header(model)).caption(pictures(1)[0], min_length=0)
    assert empty.text == ""
    assert empty.words == ()
    assert empty.confidence == 0
    assert empty.attention is not None
    assert empty.attention.shape == (0, 1, 4)
    assert empty.to_dict(attention=True)["words"] == []
    assert empty.overlay(pictures(1)[0]).size[0] > 0


# --------------------------------------------------------------------------------------------------
# Prefix, region, must, n best, sampling


def test_prefix(captioner: Captioner) -> None:
    picture = pictures(1)[0]
    caption = captioner.caption(picture, prefix="a large dog")
    assert words(caption)[:3] == ["a", "large", "dog"]
    assert [word.given for word in caption.words[:4]] == [True, True, True, False]
    assert len(caption.words) > 3
    free = np.log([word.probability for word in caption.words[3:]])
    assert caption.log_probability <= free.sum() + 1e-5  # given words do not count
    assert caption.confidence == pytest.approx(np.exp(free.mean()), rel=1e-6)
    # the last words of a caption, asked for again behind the first, come back
    plain = captioner.caption(picture, beam=1)
    half = " ".join(words(plain)[: len(plain.words) // 2])
    assert captioner.caption(picture, beam=1, prefix=half).text == plain.text


def test_unknown_words_of_a_prefix_stay_as_typed(captioner: Captioner) -> None:
    caption = captioner.caption(pictures(1)[0], prefix="A Zebra's red-eyed ÖKAPI, the dog")
    assert words(caption)[:7] == ["a", "Zebra", "'s", "red-eyed", "ÖKAPI", "the", "dog"]
    assert caption.text.startswith("a Zebra's red-eyed ÖKAPI the dog ")
    assert "<unk>" not in caption.text
    assert all(word.given == (i < 7) for i, word in enumerate(caption.words))
    # an unknown word means the same to the model whatever it is
    assert (
        words(captioner.caption(pictures(1)[0], prefix="a gnu"))[2:]
        == (words(captioner.caption(pictures(1)[0], prefix="a zebra"))[2:])
    )


@pytest.mark.parametrize("prefix", ["", " ", "!?", "…"])
def test_a_prefix_of_no_words_is_none(prefix: str, captioner: Captioner) -> None:
    same(captioner.caption(pictures(1)[0], prefix=prefix), captioner.caption(pictures(1)[0]))


def test_a_prefix_longer_than_a_caption_may_be(captioner: Captioner) -> None:
    with pytest.raises(ValueError, match=r"prefix .* take 13 tokens, more than max_length 12"):
        captioner.caption(pictures(1)[0], prefix="a dog " * 6 + "a")


def test_a_prefix_for_each_picture(captioner: Captioner) -> None:
    found = captioner.caption_batch(pictures(3), prefix=["a gnu", "", "the"])
    assert [caption.text.split()[0] for caption in found[::2]] == ["a", "the"]
    assert found[0].words[1].text == "gnu"
    alike(found[1], captioner.caption(pictures(3)[1]))


def test_a_region_hides_everything_else(captioner: Captioner) -> None:
    calibrated = Captioner(
        captioner.model, captioner.header, make_calibration()
    )  # familiarity must not look outside either
    picture = pictures(4)[3]
    height, width = picture.shape[:2]
    box = (width // 2, 0, width, height)  # cells 1 and 3 of 2 x 2
    features = calibrated.encode(picture)
    seen = calibrated.caption(features, region=box)
    assert seen.attention is not None
    np.testing.assert_allclose(seen.attention[..., [1, 3]].sum((1, 2)), 1, atol=1e-5)
    data = features.data.clone()
    data[:, :, [0, 2]] += 30 * torch.randn(2, 1280, generator=torch.Generator().manual_seed(0))
    other = replace(features, data=data)
    alike(calibrated.caption(other, region=box), seen)
    assert calibrated.caption(other).score != pytest.approx(calibrated.caption(features).score, abs=1e-3)
    for options in ({"beam": 1}, {"sample": True}, {"must": ["cat"]}, {"prefix": "a"}):
        alike(
            calibrated.caption(other, region=box, **options),
            calibrated.caption(features, region=box, **options),
        )


def test_a_mask_is_worth_its_box(captioner: Captioner) -> None:
    picture = pictures(4)[3]
    height, width = picture.shape[:2]
    mask = np.zeros((height, width), bool)
    mask[: height // 3, 5:] = True
    alike(
        captioner.caption(picture, region=mask), captioner.caption(picture, region=(5, 0, width, height // 3))
    )
    alike(captioner.caption(picture, region=(-9, -9, 999, 999)), captioner.caption(picture))


def test_regions_for_some_of_a_batch(captioner: Captioner) -> None:
    some = pictures(3)
    box = (0, 0, some[1].shape[1] / 2, some[1].shape[0] / 2)
    found = captioner.caption_batch(some, regions=[None, box, None])
    alike(found[0], captioner.caption(some[0]))
    alike(found[1], captioner.caption(some[1], region=box))
    assert found[1].attention is not None
    np.testing.assert_allclose(found[1].attention[..., 0], 1, atol=1e-6)


@pytest.mark.parametrize(
    ("region", "reason"),
    [
        ((5, 5, 5, 9), "is empty"),
        ((900, 900, 950, 950), "lies outside the photo"),
        ((0, 0, float("nan"), 9), "is empty"),
        ((1, 2, 3), "this one has shape"),
        (np.zeros((3, 3), bool), "as large as the photo"),
        ("left", "a region is a box"),
    ],
)
def test_impossible_regions(region: object, reason: str, captioner: Captioner) -> None:
    with pytest.raises(ValueError, match=reason):
        captioner.caption(pictures(1)[0], region=region)


@pytest.mark.parametrize("options", [{"beam": 1}, {}, {"beam": 5}, {"sample": True}])
def test_must(options: dict[str, object], captioner: Captioner) -> None:
    for picture in pictures(4):
        caption = captioner.caption(picture, must=["Bicycle", "red car", ["water"]], **options)
        assert {"bicycle", "water"} <= set(words(caption))
        assert "red car" in caption.text


def test_must_takes_one_of_the_alternatives(captioner: Captioner) -> None:
    for picture in pictures(4):
        assert set(words(captioner.caption(picture, must=[["table", "grass"]]))) & {"table", "grass"}


def test_must_errors(captioner: Captioner) -> None:
    with pytest.raises(ValueError, match="the required word 'zebra' is not in the model's vocabulary"):
        captioner.caption(pictures(1)[0], must=["dog", "zebra"])
    with pytest.raises(ValueError, match="the required word '' is not"):
        captioner.caption(pictures(1)[0], must=[""])
    with pytest.raises(ValueError, match="must is a list of words: write must=\\['dog'\\]"):
        captioner.caption(pictures(1)[0], must="dog")
    with pytest.raises(ValueError, match="more than max_length 2"):
        captioner.caption(pictures(1)[0], must=["dog", "cat", "car"], max_length=2)


def test_n_best(captioner: Captioner) -> None:
    picture = pictures(1)[0]
    caption = captioner.caption(picture, n_best=6)  # more than the model's beam of 3
    assert len(caption.n_best) == 6
    assert caption.n_best[0].text == caption.text
    assert len({other.text for other in caption.n_best}) == 6
    scores = [other.score for other in caption.n_best]
    assert scores == sorted(scores, reverse=True)
    assert all(other.n_best == () for other in caption.n_best)
    assert len(caption.to_dict()["n_best"]) == 6
    with pytest.raises(ValueError, match="n_best 4 needs a beam at least as wide"):
        captioner.caption(picture, n_best=4, beam=2)


def test_sampling_depends_on_the_seed_alone(captioner: Captioner) -> None:
    some = pictures(12)
    alone = [captioner.caption(p, sample=True, seed=100 + i) for i, p in enumerate(some)]
    order = [7, 3, 11, 0, 5]
    together = captioner.caption_batch(
        [some[i] for i in order], sample=True, seeds=[np.int64(100 + i) for i in order]
    )
    for i, caption in zip(order, together, strict=True):
        alike(caption, alone[i])
    assert len({captioner.caption(some[0], sample=True, seed=s).text for s in range(8)}) > 4
    cautious = {captioner.caption(some[0], sample=True, seed=s, top_k=1).text for s in range(4)}
    assert cautious == {captioner.caption(some[0], beam=1).text}


def test_huge_and_negative_seeds(captioner: Captioner) -> None:
    for seed in (-1, 2**62, 10**30):
        alike(
            captioner.caption(pictures(1)[0], sample=True, seed=seed),
            captioner.caption(pictures(1)[0], sample=True, seed=seed),
        )


def test_samples_of_one_picture_differ(captioner: Captioner) -> None:
    caption = captioner.caption(pictures(1)[0], sample=True, n_best=5, seed=3)
    assert len({other.text for other in caption.n_best}) > 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"beams": 3}, "unknown option 'beams'; there are alternatives, beam"),
        ({"beam": 0}, "beam must be from 1 to 1000"),
        ({"beam": 2.5}, "beam must be of type int"),
        ({"n_best": "3"}, "n_best must be of type int"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"min_length": 9, "max_length": 3}, "min_length 9 is larger than max_length 3"),
        ({"length_penalty": float("nan")}, "must be a finite number"),
    ],
)
def test_impossible_options(options: dict[str, object], reason: str, captioner: Captioner) -> None:
    with pytest.raises(ValueError, match=reason):
        captioner.caption(pictures(1)[0], **options)
    with pytest.raises(ValueError, match=reason):
        captioner.check(**options)


def test_check(captioner: Captioner) -> None:
    captioner.check(must=["dog"], beam=4)
    with pytest.raises(ValueError, match="'zebra' is not in"):
        captioner.check(must=["zebra"])


# --------------------------------------------------------------------------------------------------
# Batches and threads


def test_batch_size_and_order_change_no_word(captioner: Captioner) -> None:
    many = pictures(100)
    alone = [captioner.caption(picture) for picture in many]
    assert len({caption.text for caption in alone}) > 20
    order = np.random.default_rng(0).permutation(100).tolist()
    for size in (7, 100):
        for i in range(0, 100, size):
            places = order[i : i + size]
            for place, caption in zip(
                places, captioner.caption_batch([many[p] for p in places]), strict=True
            ):
                alike(caption, alone[place])


def test_features_may_be_joined_and_parted(captioner: Captioner) -> None:
    some = pictures(4)
    joined = concatenate([captioner.encode(picture) for picture in some])
    together = captioner.caption_batch(joined)
    for i, picture in enumerate(some):
        alike(together[i], captioner.caption(picture))
        alike(captioner.caption(joined[i]), together[i])


def test_threads_share_a_captioner(captioner: Captioner) -> None:
    some = pictures(24)
    jobs = [
        (picture, {"sample": i % 2 == 1, "seed": i, "prefix": "a" * (i % 3 == 0)})
        for i, picture in enumerate(some)
    ]
    expected = [captioner.caption(picture, **options) for picture, options in jobs]
    found: dict[int, package.Caption] = {}
    failures: list[Exception] = []

    def work(first: int) -> None:
        try:
            for i in range(first, len(jobs), 6):
                found[i] = captioner.caption(jobs[i][0], **jobs[i][1])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for i, caption in enumerate(expected):
        alike(found[i], caption)


@pytest.mark.parametrize(
    "images",
    ["photo.jpg", Path("photo.jpg"), b"bytes", np.zeros((9, 9, 3), np.uint8), Image.new("RGB", (9, 9)), 5],
)
def test_one_picture_is_no_batch(images: object, captioner: Captioner) -> None:
    with pytest.raises(ValueError, match="give a list of pictures"):
        captioner.caption_batch(images)


def test_batch_errors(captioner: Captioner, tmp_path: Path) -> None:
    two = pictures(2)
    with pytest.raises(ValueError, match="there are no pictures"):
        captioner.caption_batch([])
    with pytest.raises(ValueError, match="regions: expected one for each of 2 pictures, found 1"):
        captioner.caption_batch(two, regions=[(0, 0, 5, 5)])
    with pytest.raises(ValueError, match="seeds: expected one for each of 2 pictures, found 3"):
        captioner.caption_batch(two, seeds=[1, 2, 3])
    with pytest.raises(ValueError, match="prefix: expected one for each of 2"):
        captioner.caption_batch(two, prefix=["a"])
    with pytest.raises(ImageError, match=r"missing\.jpg: there is no such file"):
        captioner.caption_batch([two[0], tmp_path / "missing.jpg"])
    features = captioner.encode_batch(two)
    with pytest.raises(ValueError, match=r"one picture, and these are 2: use caption_batch"):
        captioner.caption(features)
    narrow = replace(features, data=features.data[..., :100])
    with pytest.raises(ValueError, match=r"width 100, and this model's encoder gives 1280"):
        captioner.caption_batch(narrow)


def test_two_frames(captioner: Captioner) -> None:
    first, second = (captioner.encode(picture) for picture in pictures(6)[4:])
    clip = replace(
        first,
        data=torch.cat((first.data, second.data), 1),
        mask=torch.cat((first.mask, second.mask), 1),
        times=torch.tensor([[0.0, 0.5]]),
    )
    caption = captioner.caption_batch(clip)[0]
    assert caption.attention is not None
    assert caption.attention.shape == (len(caption.words), 2, 4)
    np.testing.assert_allclose(caption.attention.sum((1, 2)), 1, atol=1e-5)
    assert caption.times.tolist() == [0.0, 0.5]
    assert np.shape(caption.to_dict(attention=True)["words"][0]["attention"]) == (2, 2, 2)
    # a photo is a clip of one frame: a second that is padding changes nothing
    padded = replace(clip, mask=torch.cat((first.mask, torch.zeros_like(first.mask)), 1))
    alone, cut = captioner.caption(first), captioner.caption(padded)
    assert alone.text == cut.text
    assert alone.score == pytest.approx(cut.score, abs=1e-4)
    assert cut.attention is not None
    assert cut.attention[:, 1].max() == 0
    # and a region holds for all frames
    box = (0, 0, first.fits[0].width / 2, first.fits[0].height / 2)
    limited = captioner.caption(clip, region=box)
    assert limited.attention is not None
    np.testing.assert_allclose(limited.attention[..., 0].sum(1), 1, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Calibrated confidence


def test_calibrated_confidences(captioner: Captioner) -> None:
    calibration = make_calibration()
    calibrated = Captioner(captioner.model, captioner.header, calibration)
    for picture in pictures(5):
        features = calibrated.encode(picture)
        caption, plain = calibrated.caption(features, prefix="a"), captioner.caption(features, prefix="a")
        assert caption.text == plain.text  # the search does not know of it
        for word in caption.words:
            log_odds = np.log(word.probability / (1 - word.probability))
            assert word.confidence == pytest.approx(1 / (1 + np.exp(-0.8 * log_odds - 0.3)), rel=1e-6)
        chosen = caption.words[1:]
        texts = [w.text for w in chosen]
        numbers = caption_features(
            texts,
            [w.probability for w in chosen],
            word_ranks(captioner.model.tokenizer, texts),
            *calibration.familiarity(features.data.mean((0, 1, 2)).numpy()),
        )
        logits = [w[0] + np.dot(w[1:], numbers) for w in (calibration.caption, calibration.shown)]
        assert caption.confidence == pytest.approx(np.prod(1 / (1 + np.exp(-np.array(logits)))), rel=1e-4)
        assert 0 < caption.confidence < 1


def test_pool_weighs_cells_by_what_is_seen(captioner: Captioner) -> None:
    features = captioner.encode_batch(pictures(2))
    mask = torch.tensor([[[1.0, 0.5, 0.0, 0.0]], [[1.0, 1.0, 1.0, 1.0]]])
    pooled = pool(replace(features, mask=mask))
    data = features.data.numpy()
    np.testing.assert_allclose(pooled[0], (data[0, 0, 0] + data[0, 0, 1] / 2) / 1.5, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pooled[1], data[1, 0].mean(0), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Byte-pair encoding


@pytest.fixture(scope="module")
def bpe() -> Captioner:
    sentences = [
        "a dog runs in the grass",
        "two dogs running on the street",
        "a woman walking with a doghouse",
        "the houses stand behind the trees",
        "a bicycle and a motorcycle",
    ]
    tokenizer = BpeTokenizer.build(sentences * 3, size=70)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        encoder = make_lively_model().encoder
        config = DecoderConfig(hidden=24, embedding=16, cells=20, attention_width=12)
        model = CaptionModel(encoder, config, tokenizer).eval()
        with torch.no_grad():
            model.decoder.embedding.weight.normal_(0, 1)
    return Captioner(model, make_header(model, search={"beam": 3, "max_length": 14}))


def test_a_word_of_several_tokens(bpe: Captioner) -> None:
    several = 0
    for picture in pictures(6):
        features = bpe.encode(picture)
        caption = bpe.caption(features)
        continues = bpe._continues
        hypothesis = search(
            bpe.model.decoder, bpe.model.memory(features), bpe.options(), continues=continues
        )[0][0]
        probabilities = np.exp(hypothesis.token_log_probabilities.astype(float))
        groups = bpe.model.tokenizer.words(hypothesis.tokens)
        assert words(caption) == [text for text, _ in groups]
        assert hypothesis.attention is not None
        for word, (_, positions) in zip(caption.words, groups, strict=True):
            several += len(positions) > 1
            assert word.probability == pytest.approx(np.prod(probabilities[positions]), rel=1e-6)
            assert word.attention is not None
            np.testing.assert_allclose(
                word.attention, hypothesis.attention[positions].mean(0)[None], rtol=1e-5
            )
    assert several > 3


def test_a_bpe_prefix_is_not_grown(bpe: Captioner) -> None:
    for picture in pictures(8):
        for prefix in ("a dog", "the hous", "Łukasz and a dog"):
            caption = bpe.caption(picture, prefix=prefix)
            assert words(caption)[: len(prefix.split())] == prefix.split()
            given = [word.given for word in caption.words]
            assert given == [True] * len(prefix.split()) + [False] * (len(given) - len(prefix.split()))


def test_bpe_must(bpe: Captioner) -> None:
    caption = bpe.caption(pictures(1)[0], must=["bicycle"])
    assert "bicycle" in words(caption)
    with pytest.raises(ValueError, match="'Ω' is not in the model's vocabulary"):
        bpe.caption(pictures(1)[0], must=["Ω"])
