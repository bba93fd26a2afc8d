"""The feature cache: what the encoder gives, resumable, never stale, at any block."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from captioner_training import features
from captioner_training.config import SourceConfig
from captioner_training.data import DataError, DataSet, load_data_set
from captioner_training.features import FeatureCache, load_pixels
from shape_data import write_shapes

from captioner.encoder import Encoder, cells, encode
from captioner.images import normalise


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataSet:
    source = SourceConfig(annotations="shapes.json", images=["pictures"])
    return load_data_set("shapes", source, write_shapes(tmp_path_factory.mktemp("shapes")))


def make_encoder(fit: str = "squash", seed: int = 0) -> Encoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        usual = Encoder("efficientnet_lite0").preprocess
        encoder = Encoder("efficientnet_lite0", preprocess=replace(usual, size=64, fit=fit))
        for module in encoder.modules():  # statistics as training leaves them: of use to a folded norm
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.3, 1)
    return encoder.eval()


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return make_encoder()


def close(found, expected):
    """Return whether the two agree within what 16 bits and folded norms leave."""
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))
    return True


@torch.inference_mode()
def test_the_cache_holds_what_the_encoder_gives(tmp_path, data, encoder):
    cache = FeatureCache(tmp_path, data, encoder, flips=False).build()
    rows = [3, 0, 17]
    pixels, fits = load_pixels(data, rows, encoder)
    direct, cached = encode(encoder, pixels, fits), cache.grid_features(rows)
    assert cached.data.dtype == torch.float32
    assert close(cached.data, direct.data)
    assert float(direct.data.std()) > 0.01
    assert torch.equal(cached.mask, direct.mask)
    assert torch.equal(cached.times, direct.times)
    assert cached.fits == direct.fits
    assert cached.grid == direct.grid == (2, 2)


@torch.inference_mode()
def test_mirrored_pictures_are_the_second_variant(tmp_path, data, encoder):
    cache = FeatureCache(tmp_path, data, encoder, flips=True).build()
    assert cache.shape == (2, 24, 4, 1280)
    pixels, _ = load_pixels(data, [5, 6], encoder)
    mirrored = encoder(normalise(pixels.flip(-1), encoder.preprocess))
    plain = encoder(normalise(pixels, encoder.preprocess))
    assert close(cache.read([5, 6], [1, 1]), mirrored)
    assert close(cache.read([5, 6], [1, 0]), torch.stack((mirrored[0], plain[1])))


def test_letterboxed_pictures_keep_their_masks(tmp_path, data):
    encoder = make_encoder("letterbox")
    cache = FeatureCache(tmp_path, data, encoder, flips=False).build()
    pixels, fits = load_pixels(data, [0], encoder)
    assert torch.equal(cache.grid_features([0]).mask, encode(encoder, pixels, fits).mask)


def test_a_second_build_computes_nothing(tmp_path, data, encoder, monkeypatch):
    first = FeatureCache(tmp_path, data, encoder, flips=True).build()
    monkeypatch.setattr(features, "load_pixels", lambda *a: pytest.fail("read a picture again"))
    second = FeatureCache(tmp_path, data, encoder, flips=True).build()
    assert torch.equal(first.read([1, 2], [0, 1]), second.read([1, 2], [0, 1]))
    assert first.fits == second.fits


def test_an_interrupted_build_goes_on_and_gives_the_same(tmp_path, data, encoder, monkeypatch):
    whole = FeatureCache(tmp_path / "whole", data, encoder, flips=True).build()
    monkeypatch.setattr(features, "_BATCH", 2)
    monkeypatch.setattr(features, "_SAVE_EVERY", 3)
    read, limits = [], [8, 4, 10]

    def counting(data, indices, encoder):
        if limits and len(read) == limits[0]:
            raise KeyboardInterrupt
        read.extend(indices)
        return load_pixels(data, indices, encoder)

    monkeypatch.setattr(features, "load_pixels", counting)
    while limits:
        read.clear()
        with pytest.raises(KeyboardInterrupt):
            FeatureCache(tmp_path / "parts", data, encoder, flips=True).build()
        limits.pop(0)
    read.clear()
    parts = FeatureCache(tmp_path / "parts", data, encoder, flips=True).build()
    assert 0 < len(read) < 24  # some had been kept
    assert parts.fits == whole.fits
    # batches of another size may differ in the last bit
    everything = list(range(24))
    for variant in (0, 1):
        assert close(parts.read(everything, [variant] * 24), whole.read(everything, [variant] * 24))
    (found,), (expected,) = (list((tmp_path / name).glob("*.f16")) for name in ("parts", "whole"))
    assert found.name == expected.name
    assert found.stat().st_size == expected.stat().st_size == whole.size


def test_threads_are_given_back(tmp_path, data, encoder):
    before = torch.get_num_threads()
    FeatureCache(tmp_path, data, encoder, flips=False).build()
    assert torch.get_num_threads() == before


def test_a_stale_cache_is_not_used(tmp_path, data, encoder):
    def file(encoder, data=data, flips=False, blocks=None):
        known = set(tmp_path.glob("*.f16"))
        FeatureCache(tmp_path, data, encoder, flips, blocks).build()
        new = set(tmp_path.glob("*.f16")) - known
        return new.pop() if new else None

    assert file(encoder) is not None
    assert file(encoder) is None
    assert file(make_encoder()) is None  # another object with the same weights
    weights, statistics = make_encoder(), make_encoder()
    with torch.no_grad():
        next(weights.network[9].parameters()).view(-1)[0] += 1e-3
        next(b for n, b in statistics.network.named_buffers() if n.endswith("running_var"))[0] += 1e-3
    assert file(weights) is not None
    assert file(statistics) is not None
    assert file(make_encoder("crop")) is not None
    assert file(encoder, flips=True) is not None
    assert file(encoder, blocks=10) is not None
    assert file(encoder, DataSet("shapes", data.pictures[1:], data.store)) is not None
    assert file(encoder, DataSet("shapes", data.pictures[::-1], data.store)) is not None


def test_a_cache_of_lower_blocks_outlives_a_change_of_the_upper_ones(tmp_path, data, monkeypatch):
    encoder = make_encoder()
    FeatureCache(tmp_path, data, encoder, flips=False, blocks=12).build()
    with torch.no_grad():
        next(encoder.network[12].parameters()).add_(1)
    monkeypatch.setattr(features, "load_pixels", lambda *a: pytest.fail("read a picture again"))
    FeatureCache(tmp_path, data, encoder, flips=False, blocks=12).build()


@torch.inference_mode()
@pytest.mark.parametrize("blocks", [1, 6, 12, 17])
def test_lower_blocks_from_the_cache_and_upper_blocks_make_the_network(tmp_path, data, encoder, blocks):
    cache = FeatureCache(tmp_path, data, encoder, flips=True, blocks=blocks).build()
    rows = [2, 11]
    pixels, _ = load_pixels(data, rows, encoder)
    normalised = normalise(pixels, encoder.preprocess)
    lower = cache.read(rows, [0, 0])
    width, height, columns = cache.map_shape
    assert lower.shape == (2, height * columns, width)
    assert close(lower, cells(encoder.network[:blocks](normalised)))
    feature_map = lower.transpose(1, 2).unflatten(2, (height, columns))
    assert close(cells(encoder.network[blocks:](feature_map)), encoder(normalised))
    assert cache.mask(rows).shape == (2, 4)  # of the grid, not of the map that is kept


def test_the_encoder_itself_is_left_as_it_is(tmp_path, data):
    encoder = make_encoder()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    FeatureCache(tmp_path, data, encoder, flips=False, blocks=5).build()
    after = encoder.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_an_unreadable_picture_is_named(tmp_path, encoder):
    folder = write_shapes(tmp_path / "shapes")
    (folder / "pictures" / "red-square-white.png").write_bytes(b"nothing")
    data = load_data_set("shapes", SourceConfig(annotations="shapes.json", images=["pictures"]), folder)
    with pytest.raises(DataError, match=r"shapes: red-square-white\.png: "):
        FeatureCache(tmp_path / "cache", data, encoder, flips=False).build()


def test_features_are_kept_in_16_bits(tmp_path, data, encoder):
    cache = FeatureCache(tmp_path, data, encoder, flips=False).build()
    assert cache.size == 24 * 4 * 1280 * 2
    assert cache._map is not None
    assert cache._map.dtype == np.float16
