import io
import os
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image, ImageCms, ImageFile, features
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from captioner import images
from captioner.images import Fit, Preprocess, load, normalise, open_image
from captioner.inputs import ImageError, find_images

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
PHOTOS = Path(skimage.__file__).parent / "data"
RED, GREEN, BLUE, WHITE = (250, 10, 20), (15, 200, 25), (20, 30, 240), (255, 255, 255)
has_avif = features.check("avif") if "avif" in features.features or "avif" in features.modules else False


def squash(size: int = 32) -> Preprocess:
    return Preprocess(size, "squash", MEAN, STD)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(width: int, height: int, name: str = "astronaut.png") -> Image.Image:
    return Image.open(PHOTOS / name).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def corners(width: int = 64, height: int = 48) -> Image.Image:
    """Red at top left, green at top right, blue at bottom left, white at bottom right."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def quarters(image: Image.Image) -> list[tuple[int, ...]]:
    """Read the colours in the middle of the four quarters, row by row."""
    w, h = image.size
    return [image.getpixel((w * x // 4, h * y // 4)) for y in (1, 3) for x in (1, 3)]


def assert_close(found: object, expected: object, tolerance: float) -> None:
    difference = np.abs(np.asarray(found, dtype=float) - np.asarray(expected, dtype=float))
    assert difference.max() <= tolerance, f"differs by up to {difference.max()}"


def message(source: object, **options: object) -> str:
    """Return the one line that a source is refused with, from both entrances."""
    with pytest.raises(ImageError) as first:
        open_image(source, **options)
    with pytest.raises(ImageError) as second:
        load(source, squash())
    line = str(first.value)
    assert line == str(second.value)
    assert "\n" not in line
    assert len(line) < 400
    return line


# Preprocess


def test_preprocess_round_trip() -> None:
    for preprocess in (
        squash(),
        Preprocess(224, "crop", MEAN, STD, "bicubic", 256),
        Preprocess(8, "letterbox", (0, 0, 0), (255, 255, 255)),
    ):
        assert Preprocess.from_dict(preprocess.to_dict()) == preprocess
    record = squash().to_dict()
    assert record["mean"] == list(MEAN)  # plain types, as JSON reads them back
    del record["interpolation"], record["resize"]
    assert Preprocess.from_dict(record) == squash()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", 0),
        ("size", 224.0),
        ("size", "224"),
        ("size", True),
        ("fit", "stretch"),
        ("fit", None),
        ("fit", ["crop"]),
        ("mean", [1, 2]),
        ("mean", 0.5),
        ("mean", [1, 2, "3"]),
        ("mean", [1, 2, float("nan")]),
        ("std", [1, 0, 1]),
        ("std", None),
        ("interpolation", "nearest"),
        ("interpolation", ["bilinear"]),
        ("resize", 223),
        ("resize", "256"),
        ("resise", 256),
    ],
)
def test_preprocess_names_the_bad_key(key: str, value: object) -> None:
    record = Preprocess(224, "crop", MEAN, STD, "bilinear", 256).to_dict()
    with pytest.raises(ValueError, match=rf"preprocess\.{key}: (expected .+, found .+|unknown key; )"):
        Preprocess.from_dict({**record, key: value})


def test_preprocess_missing_key_and_useless_resize() -> None:
    record = squash().to_dict()
    del record["std"]
    with pytest.raises(ValueError, match=r"preprocess\.std: missing"):
        Preprocess.from_dict(record)
    with pytest.raises(ValueError, match=r"preprocess\.resize: .*squash"):
        Preprocess(224, "squash", MEAN, STD, "bilinear", 256)
    with pytest.raises(ValueError, match="expected keys and values"):
        Preprocess.from_dict([("size", 3)])  # type: ignore[arg-type]


# Fitting


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("resize", "size"), [(256, 224), (232, 224), (64, 64), (65, 64), (40, 33)])
def test_crop_equals_torchvision(resize: int, size: int, interpolation: str) -> None:
    preprocess = Preprocess(size, "crop", MEAN, STD, interpolation, resize)
    reference = ImageClassification(
        crop_size=size,
        resize_size=resize,
        mean=tuple(m / 255 for m in MEAN),
        std=tuple(s / 255 for s in STD),
        interpolation=InterpolationMode(interpolation),
    )
    for width, height in [
        (500, 375),
        (375, 500),
        (333, 501),
        (97, 61),
        (61, 97),
        (256, 256),
        (257, 64),
        (7, 3),
    ]:
        image = photo(width, height)
        pixels, fit = load(image, preprocess)
        expected = reference(image)
        found = normalise(torch.from_numpy(pixels)[None], preprocess)[0]
        assert torch.allclose(found, expected, atol=1e-5)  # a grey level is 0.017
        assert (fit.width, fit.height) == (width, height)
        assert fit.box[2] - fit.box[0] == pytest.approx(fit.box[3] - fit.box[1], rel=0.02, abs=0.5)


def test_crop_of_a_jpeg_file_equals_torchvision(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    photo(500, 375).save(path, quality=90)
    preprocess = Preprocess(224, "crop", MEAN, STD, resize=256)
    reference = ImageClassification(crop_size=224, resize_size=256)
    with Image.open(path) as image:
        expected = reference(image)
    assert torch.allclose(
        normalise(torch.from_numpy(load(path, preprocess)[0])[None], preprocess)[0], expected, atol=1e-3
    )


def test_crop_of_a_strip_differs_by_a_grey_level_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    preprocess = Preprocess(48, "crop", MEAN, STD, resize=56)
    for size in [(1999, 101), (101, 1999)]:
        image = photo(*size)
        found, fit = load(image, preprocess)
        with monkeypatch.context() as patch:
            patch.setattr(images, "_LONGEST", 1000)
            expected, same = load(image, preprocess)
        assert_close(found, expected, 1)
        assert fit == same


def test_box_of_crop_is_what_the_square_shows() -> None:
    image = Image.new("RGB", (400, 200))
    image.paste(RED, (100, 0, 300, 200))
    pixels, fit = load(image, Preprocess(50, "crop", MEAN, STD))
    assert fit == Fit("crop", 400, 200, (100.0, 0.0, 300.0, 200.0))
    assert_close(pixels[:, :, 2:-2], np.array(RED)[:, None, None], 0)
    _, fit = load(image, Preprocess(50, "crop", MEAN, STD, resize=100))
    assert fit.box == (150.0, 50.0, 250.0, 150.0)


def test_squash_shows_all() -> None:
    pixels, fit = load(corners(640, 480), squash(32))
    assert fit == Fit("squash", 640, 480, (0.0, 0.0, 640.0, 480.0))
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert quarters(Image.fromarray(pixels.transpose(1, 2, 0))) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize(("width", "height"), [(400, 200), (200, 400), (301, 77), (32, 32), (5, 3), (1, 1)])
def test_letterbox(width: int, height: int) -> None:
    pixels, fit = load(Image.new("RGB", (width, height), BLUE), Preprocess(32, "letterbox", MEAN, STD))
    left, top, right, bottom = fit.box
    assert (fit.mode, fit.width, fit.height) == ("letterbox", width, height)
    assert left <= 0 <= width <= right
    assert top <= 0 <= height <= bottom
    # the box maps the photo's edges onto the square: inside is photo, outside is the mean colour
    columns = (np.arange(32) + 0.5) / 32 * (right - left) + left
    rows = (np.arange(32) + 0.5) / 32 * (bottom - top) + top
    inside = ((rows > 0) & (rows < height))[:, None] & ((columns > 0) & (columns < width))[None, :]
    assert inside.any()
    assert_close(pixels[:, inside], np.array(BLUE)[:, None], 0)
    assert (pixels[:, ~inside] == np.array([[124], [116], [104]])).all()
    assert (~inside).any() == (width != height)


def test_normalise() -> None:
    batch = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    before = batch.clone()
    found = normalise(batch, squash())
    assert found.dtype == torch.float32
    expected = (before.double() - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert torch.equal(batch, before)
    for wrong in (batch.float(), batch[0], batch.permute(0, 2, 3, 1)):
        with pytest.raises(ValueError, match="uint8"):
            normalise(wrong, squash())


def test_module_does_not_import_torch() -> None:
    code = (
        "import sys, captioner.images as i, numpy as n;"
        "i.load(n.zeros((4, 4, 3), n.uint8), i.Preprocess(2, 'squash', (1, 1, 1), (1, 1, 1)));"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Sources


def test_every_kind_of_source_gives_the_same_picture(tmp_path: Path) -> None:
    data = encode(corners(), "PNG")
    path = tmp_path / "ein Bild ä.png"
    path.write_bytes(data)
    opened = Image.open(path)
    at_its_end = io.BytesIO(data)
    at_its_end.seek(0, os.SEEK_END)
    with open(path, "rb") as file:
        encoded = [path, str(path), data, bytearray(data), memoryview(data), at_its_end, file]
        for source in [*encoded, opened, np.asarray(corners())]:
            image = open_image(source)
            assert image.mode == "RGB"
            assert np.array_equal(np.asarray(image), np.asarray(corners()))
            assert load(source, squash())[1] == Fit("squash", 64, 48, (0.0, 0.0, 64.0, 48.0))


def test_pipes_are_read(tmp_path: Path) -> None:
    data = encode(corners(), "PNG")

    class Pipe(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            return data

    assert open_image(Pipe()).size == (64, 48)
    if hasattr(os, "mkfifo"):
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        writer = threading.Thread(target=lambda: fifo.write_bytes(data))
        writer.start()
        assert open_image(fifo).size == (64, 48)
        writer.join()


def test_the_callers_image_is_left_alone() -> None:
    given = corners()
    given.info["note"] = "mine"
    result = open_image(given)
    result.paste((0, 0, 0), (0, 0, 64, 48))
    assert given.getpixel((1, 1)) == RED
    assert given.info == {"note": "mine"}
    load(given, squash())
    assert given.size == (64, 48)

    lazy = Image.open(io.BytesIO(encode(photo(600, 400), "JPEG")))
    open_image(lazy, draft_size=20)
    load(lazy, squash())
    assert lazy.size == (600, 400)


GREY = np.array([[0, 51], [128, 255]], np.uint8)


@pytest.mark.parametrize(
    "array",
    [
        GREY,
        GREY[:, :, None],
        np.repeat(GREY[:, :, None], 3, axis=2),
        GREY.astype(np.uint16) * 257,
        (GREY.astype(np.uint16) * 257).astype(">u2"),
        np.repeat(GREY[:, :, None].astype(np.uint16) * 257, 3, axis=2),
        GREY / 255,
        (GREY / 255).astype(np.float32),
        (GREY / 255).astype(np.float16),
        np.asfortranarray(GREY),
        GREY[::-1, ::-1][::-1, ::-1],
        np.dstack([GREY, GREY, GREY, np.full_like(GREY, 255)]),
        np.dstack([GREY, GREY, GREY, np.full_like(GREY, 255)]) / 255,
    ],
    ids=lambda array: f"{array.shape}-{array.dtype}",
)
def test_arrays(array: np.ndarray) -> None:
    assert np.array_equal(np.asarray(open_image(array)), np.repeat(GREY[:, :, None], 3, axis=2))


def test_array_of_booleans_and_transparent_array() -> None:
    assert np.asarray(open_image(GREY > 100))[:, :, 0].tolist() == [[0, 0], [255, 255]]
    rgba = np.zeros((1, 2, 4), np.uint8)
    rgba[0, 1] = (*RED, 255)
    assert np.asarray(open_image(rgba)).tolist() == [[list(WHITE), list(RED)]]


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros(5, np.uint8), "shape (5)"),
        (np.zeros((4, 4, 2), np.uint8), "shape (4 x 4 x 2)"),
        (np.zeros((3, 8, 8), np.uint8), "array.transpose(1, 2, 0)"),
        (np.zeros((2, 8, 8, 3), np.uint8), "one picture at a time"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.zeros((4, 4), complex), "complex128"),
        (np.array([["a"]], object), "object"),
        (np.full((4, 4), np.nan), "NaN"),
        (np.array([[0.0, np.inf]]), "NaN or infinity"),
        (np.array([[0.0, 200.0]]), "run from 0 to 200"),
        (np.array([[-0.5, 0.5]]), "run from -0.5 to 0.5"),
        (np.broadcast_to(np.uint8(0), (70000, 70000)), "million pixels"),
    ],
)
def test_arrays_that_are_no_pictures(array: np.ndarray, reason: str) -> None:
    line = message(array)
    assert line.startswith("the given array: ")
    assert reason in line


@pytest.mark.parametrize("source", [None, 5, {"path": "a.jpg"}, torch.zeros(3, 4, 4)])
def test_other_sources_are_refused(source: object) -> None:
    line = message(source)
    assert f"the given {type(source).__name__}: " in line
    assert "give a path, bytes" in line


# Awkward but valid pictures


def test_exif_rotation_of_every_kind(tmp_path: Path) -> None:
    upright = corners(96, 48)
    undo = {
        1: lambda i: i,
        2: lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda i: i.rotate(180),
        4: lambda i: i.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda i: i.transpose(Image.Transpose.TRANSPOSE),
        6: lambda i: i.rotate(90, expand=True),
        7: lambda i: i.transpose(Image.Transpose.TRANSVERSE),
        8: lambda i: i.rotate(270, expand=True),
    }
    kinds = ["JPEG", "PNG", "WEBP", "TIFF"] + (["AVIF"] if has_avif else [])
    for orientation, stored in undo.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in kinds:
            options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
            if kind == "TIFF":
                options = {"tiffinfo": {0x0112: orientation}}
            data = encode(stored(upright), kind, **options, **({} if kind == "TIFF" else {"exif": exif}))
            for source in (data, Image.open(io.BytesIO(data))):
                image = open_image(source)
                assert image.size == (96, 48), (kind, orientation)
                assert_close(quarters(image), [RED, GREEN, BLUE, WHITE], 12)
                assert open_image(image).size == (96, 48)  # and not turned a second time
                _, fit = load(source, squash())
                assert (fit.width, fit.height) == (96, 48)


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_in_both_byte_orders_and_damaged(order: str) -> None:
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, 6, 0)
    mark = b"II" if order == "<" else b"MM"
    exif = b"Exif\0\0" + mark + struct.pack(order + "HIH", 42, 8, 1) + entry + bytes(4)
    data = encode(corners(), "JPEG", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(data).size == (48, 64)
        for damaged in (
            exif[:-8],
            exif[:20],
            exif[:12],
            b"Exif\0\0rubbish",
            exif[:10] + b"\xff\xff\xff\xff" + exif[14:],  # the directory lies beyond the end
            exif[:14] + b"\xff\xff" + exif[16:-8] + bytes(2) + exif[-6:],  # 65,535 entries, no valid one
            exif.replace(entry, struct.pack(order + "HHIHH", 0x0112, 3, 1, 9, 0)),
            exif.replace(entry, struct.pack(order + "HHII", 0x0112, 2, 900, 1 << 30)),
        ):
            data = encode(corners(), "JPEG", exif=damaged)
            assert open_image(data).size == (64, 48)
            assert open_image(Image.open(io.BytesIO(encode(corners(), "PNG")))).size == (64, 48)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    values = np.array([[0, 257 * 51], [257 * 128, 65535]], np.uint16)
    data = encode(Image.fromarray(values), kind)
    assert np.asarray(open_image(data))[:, :, 0].tolist() == GREY.tolist()
    assert np.asarray(open_image(Image.open(io.BytesIO(data))))[:, :, 0].tolist() == GREY.tolist()


def test_16_bit_grey_modes_of_pillow() -> None:
    values = np.array([[0, 257 * 51], [257 * 128, 65535]])
    little = Image.frombytes("I;16", (2, 2), values.astype("<u2").tobytes())
    big = Image.frombytes("I;16B", (2, 2), values.astype(">u2").tobytes())
    long = Image.fromarray(values.astype(np.int32))
    assert (little.mode, big.mode, long.mode) == ("I;16", "I;16B", "I")
    for image in (little, big, long):
        assert np.asarray(open_image(image))[:, :, 2].tolist() == GREY.tolist()


def test_16_bits_are_rounded_to_the_nearest_grey() -> None:
    values = np.arange(65536).astype(np.uint16).reshape(256, 256)
    expected = np.rint(values / 257.0)
    assert np.array_equal(np.asarray(open_image(values))[:, :, 0], expected)
    assert np.array_equal(np.asarray(open_image(encode(Image.fromarray(values), "PNG")))[:, :, 0], expected)


def test_wider_greys_are_stretched() -> None:
    ints = Image.fromarray(np.array([[-1000, 0, 1000, 100_000]], np.int32))
    assert np.asarray(open_image(ints))[0, :, 0].tolist() == [0, 3, 5, 255]
    for values, expected in [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.4, 200.0], [0, 100, 200]),
        ([-10.0, 0.0, 10.0], [0, 128, 255]),
        ([500.0, 1000.0, np.nan], [0, 255, 0]),
        ([7000.0, 7000.0], [0, 0]),
    ]:
        data = encode(Image.fromarray(np.array([values], np.float32)), "TIFF")
        assert np.asarray(open_image(data))[0, :, 0].tolist() == expected
    assert "no pixel is a number" in message(Image.fromarray(np.full((2, 2), np.nan, np.float32)))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_16_bit_colour_png() -> None:
    row = b"\0" + np.array([257 * c for c in (*RED, *BLUE)], ">u2").tobytes()
    assert np.asarray(open_image(png(2, 1, 16, 2, row))).tolist() == [[list(RED), list(BLUE)]]
    alpha = b"\0" + np.array([257 * 80, 65535, 257 * 80, 0], ">u2").tobytes()
    assert np.asarray(open_image(png(2, 1, 16, 4, alpha)))[0, :, 0].tolist() == [80, 255]


def test_transparency_is_laid_on_white() -> None:
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(*RED, 255), (*RED, 0), (0, 0, 0, 128)])
    expected = [RED, WHITE, (127, 127, 127)]
    lossless = [encode(rgba, "PNG"), encode(rgba, "TIFF"), encode(rgba, "WEBP", lossless=True, exact=True)]
    for source in (rgba, rgba.convert("RGBa"), *lossless):
        image = open_image(source)
        assert_close([image.getpixel((x, 0)) for x in range(3)], expected, 1)

    la = Image.new("LA", (2, 1))
    la.putdata([(40, 255), (40, 0)])
    for source in (la, encode(la, "PNG"), la.convert("La")):
        assert np.asarray(open_image(source))[0, :, 0].tolist() == [40, 255]

    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putdata([0, 1])
    for transparency, second in [(1, WHITE), (bytes([255, 0]), WHITE), (None, BLUE)]:
        options = {} if transparency is None else {"transparency": transparency}
        image = open_image(encode(palette, "PNG", **options))
        assert [image.getpixel((x, 0)) for x in (0, 1)] == [RED, second]

    grey = Image.new("L", (2, 1), 9)
    grey.putpixel((1, 0), 70)
    assert np.asarray(open_image(encode(grey, "PNG", transparency=70)))[0, :, 0].tolist() == [9, 255]
    two = Image.new("RGB", (2, 1), RED)
    two.putpixel((1, 0), BLUE)
    assert open_image(encode(two, "PNG", transparency=BLUE)).getpixel((1, 0)) == WHITE


def test_modes_with_one_meaning() -> None:
    assert open_image(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == WHITE
    assert open_image(encode(Image.new("1", (2, 2), 1), "PNG")).getpixel((0, 0)) == WHITE
    assert open_image(Image.new("L", (2, 2), 77)).getpixel((0, 0)) == (77, 77, 77)
    for mode in ("YCbCr", "HSV", "RGBX", "CMYK"):
        assert_close(quarters(open_image(corners().convert(mode))), [RED, GREEN, BLUE, WHITE], 5)
    assert quarters(open_image(corners().quantize(4))) == [RED, GREEN, BLUE, WHITE]
    lab = Image.new("LAB", (2, 2), (255, 128, 128))
    assert_close(open_image(lab).getpixel((0, 0)), WHITE, 3)


def test_cmyk_is_not_inverted() -> None:
    cmyk = corners().convert("CMYK")
    for data in (encode(cmyk, "JPEG", quality=95, subsampling=0), encode(cmyk, "TIFF")):
        assert Image.open(io.BytesIO(data)).mode == "CMYK"
        assert_close(quarters(open_image(data)), [RED, GREEN, BLUE, WHITE], 12)
    # a profile that is damaged or made for another mode is passed over
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (b"rubbish", srgb):
        data = encode(cmyk, "JPEG", quality=95, subsampling=0, icc_profile=profile)
        assert_close(quarters(open_image(data)), [RED, GREEN, BLUE, WHITE], 12)


def test_cmyk_profile_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def convert(image: Image.Image, source: io.BytesIO, target: object, outputMode: str) -> Image.Image:
        seen.append(source.read())
        return Image.new(outputMode, image.size, GREEN)

    monkeypatch.setattr(ImageCms, "profileToProfile", convert)
    data = encode(corners().convert("CMYK"), "JPEG", icc_profile=b"a printer's profile")
    assert open_image(data).getpixel((0, 0)) == GREEN
    assert seen == [b"a printer's profile"]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_several(kind: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert_close(open_image(data).getpixel((5, 5)), RED, 4)


def test_first_picture_of_mpo() -> None:
    data = encode(photo(64, 48), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48), RED)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert_close(np.asarray(open_image(data)).mean(), np.asarray(photo(64, 48)).mean(), 3)


@pytest.mark.parametrize("kind", ["BMP", "PPM", "TIFF", "GIF", "WEBP", "PNG", "JPEG", "JPEG2000"])
def test_formats(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.dat"  # the content decides, not the suffix
    path.write_bytes(encode(corners(), kind))
    assert_close(quarters(open_image(path)), [RED, GREEN, BLUE, WHITE], 12)


@pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg", "tiff_adobe_deflate", "group4"])
def test_compressed_tiff(compression: str, tmp_path: Path) -> None:
    path = tmp_path / "scan.tif"
    image = corners() if compression != "group4" else Image.new("1", (64, 48), 1)
    image.save(path, compression=compression)
    expected = [WHITE] * 4 if compression == "group4" else [RED, GREEN, BLUE, WHITE]
    assert_close(quarters(open_image(path)), expected, 30)
    assert_close(quarters(open_image(path.read_bytes())), expected, 30)


@pytest.mark.skipif(not has_avif, reason="this Pillow was built without AVIF")
def test_avif() -> None:
    assert_close(quarters(open_image(encode(corners(), "AVIF", quality=95))), [RED, GREEN, BLUE, WHITE], 20)


def heic(image: Image.Image, exif: bytes | None = None) -> bytes:
    import pillow_heif

    file = io.BytesIO()
    heif = pillow_heif.from_bytes("RGB", image.size, image.tobytes())
    if exif is not None:
        heif.info["exif"] = exif
    heif.save(file, quality=95)
    return file.getvalue()


def test_heic_without_registering_anything() -> None:
    before = list(Image.ID), dict(Image.OPEN)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = corners().rotate(90, expand=True)
    for data in (heic(corners()), heic(turned, exif.tobytes())):
        image = open_image(data)
        assert image.size == (64, 48)
        assert_close(quarters(image), [RED, GREEN, BLUE, WHITE], 20)
    assert (list(Image.ID), dict(Image.OPEN)) == before


def test_heic_without_the_plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "holiday.heic"
    path.write_bytes(heic(corners()))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert message(path) == f'{path}: HEIC pictures need one more package; pip install "captioner[heif]"'


@pytest.mark.parametrize("size", [(1, 1), (20_000, 2), (2, 20_000), (20_000, 1), (3000, 400)])
@pytest.mark.parametrize("fit", ["squash", "crop", "letterbox"])
def test_extreme_shapes(size: tuple[int, int], fit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resize = Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *options: object, **more: object) -> Image.Image:
        assert size[0] * size[1] <= 8 * 64 * 64  # all of a strip 64 pixels high would be a million wide
        return resize(self, size, *options, **more)

    for kind in ("PNG", "JPEG"):
        data = encode(Image.new("RGB", size, GREEN), kind)
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "resize", watched)
            pixels, found = load(data, Preprocess(64, fit, MEAN, STD))
        assert pixels.shape == (3, 64, 64)
        assert (found.width, found.height) == size
        assert_close(pixels[:, 31, 31], GREEN, 3)


# Large files


def test_jpeg_draft_keeps_the_quality_and_the_true_size() -> None:
    # odd sizes and every orientation: the decoder's last column and row are only partly photo
    source = photo(1603, 1205, "coffee.png")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(source, "JPEG", quality=90, exif=exif)
        full = open_image(data)
        assert full.size == ((1603, 1205) if orientation < 5 else (1205, 1603))
        for fit in ("squash", "crop", "letterbox"):
            preprocess = Preprocess(75, fit, MEAN, STD)
            drafted, found = load(data, preprocess)
            exact, expected = load(full, preprocess)
            assert found == expected
            difference = np.abs(drafted.astype(int) - exact)
            assert 0 < difference.mean() < 0.5
            assert difference.max() <= 16


@pytest.mark.parametrize(
    ("draft_size", "short"),
    [(None, 1205), (1205, 1205), (303, 1205), (301, 603), (150, 302), (75, 151), (2, 151)],
)
def test_draft_size(draft_size: int | None, short: int) -> None:
    data = encode(photo(1603, 1205), "JPEG")
    image = open_image(data, draft_size=draft_size)
    assert min(image.size) == short
    assert open_image(encode(photo(90, 70), "PNG"), draft_size=1).size == (90, 70)
    with pytest.raises(ValueError, match="draft_size must be at least 1"):
        open_image(data, draft_size=0)


def test_drafted_cmyk_and_grey_jpeg() -> None:
    for mode in ("L", "CMYK"):
        image = photo(800, 600).convert(mode)
        data = encode(image, "JPEG", quality=95, subsampling=0)
        assert open_image(data, draft_size=37).size == (100, 75)
        drafted, exact = load(data, squash(37))[0], load(image, squash(37))[0]
        assert np.abs(drafted.astype(int) - exact).mean() < 1


def test_bombs_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = png(60_000, 60_000, 8, 2, b"\0" * 100)
    gif = b"GIF89a" + struct.pack("<HH", 65535, 65535) + encode(corners(), "GIF")[10:]
    tiff = encode(Image.new("1", (4, 4)), "TIFF")
    for tag in (256, 257):
        tiff = tiff.replace(struct.pack("<HHII", tag, 4, 1, 4), struct.pack("<HHII", tag, 4, 1, 60_000))
        tiff = tiff.replace(
            struct.pack("<HHIHH", tag, 3, 1, 4, 0), struct.pack("<HHIHH", tag, 3, 1, 60_000, 0)
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
        for data in (bomb, gif, tiff):
            line = message(data)
            assert line.startswith("the given bytes: 6")
            assert "268 million pixels" in line
            assert "make the picture smaller" in line


def test_pictures_above_pillows_own_limit_are_decoded_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [encode(corners(), kind) for kind in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")]
    sources.append(encode(corners(), "TIFF", compression="tiff_lzw"))
    for limit in (64 * 48 - 1, 100):  # the second makes Image.open fail, the first makes it warn
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises((Image.DecompressionBombError, Image.DecompressionBombWarning)):
                Image.open(io.BytesIO(sources[0]))
            for data in sources:
                assert_close(quarters(open_image(data)), [RED, GREEN, BLUE, WHITE], 12)
                load(data, Preprocess(8, "crop", MEAN, STD, resize=9))
        assert limit == Image.MAX_IMAGE_PIXELS
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_the_limit_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    assert images.MAX_PIXELS > 20_000 * 10_000
    data = encode(corners(), "PNG")
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 48)
    assert open_image(data).size == (64, 48)
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 48 - 1)
    for source in (data, corners(), np.asarray(corners())):
        assert "64 x 48 is more than" in message(source)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_panorama_of_200_megapixels(kind: str) -> None:
    data = encode(Image.new("L", (20_000, 10_000), 90), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels, fit = load(data, squash(224))
    assert (fit.width, fit.height) == (20_000, 10_000)
    assert_close(pixels, 90, 1)


# Errors


def test_paths_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "missing.jpg"
    assert message(missing) == f"{missing}: there is no such file; check the path"
    assert message(str(missing)) == message(missing)
    assert "this is a folder" in message(tmp_path)
    assert "no such file" in message("")
    assert "download it first" in message("https://example.org/cat.jpg")
    assert "not a valid path" in message("a\0b.jpg")
    assert "no such file" in message(_file(tmp_path, "plain", b"x") / "below.jpg")
    assert "cannot be read" in message("x" * 300)
    empty = _file(tmp_path, "empty.png", b"")
    assert message(empty) == f"{empty}: the file is empty; copy or download it again"

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", refuse)  # the tests may run as root, whom no file mode stops
    assert "no permission to read it" in message("private.jpg")


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="no devices here")
def test_devices_are_not_read() -> None:
    assert "this is a device" in message("/dev/null")


def _file(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("note.jpg", b"just some words\n", "not a picture that can be read"),
        ("BMW.jpg", b"BM is how these words begin", "not a picture that can be read"),
        ("P5.txt", b"P5", "not a picture that can be read"),
        (
            "drawing.svg",
            b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
            "export it as PNG",
        ),
        ("page.pdf", b"%PDF-1.7\n", "a PDF document"),
        ("renamed.jpg", b"%PDF-1.7\n", "a PDF document"),
        ("clip.mp4", b"\0\0\0\x18ftypisom\0\0\2\0isomiso2", "caption it as a video"),
        ("renamed.jpg", b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", "caption it as a video"),
        ("clip.mkv", b"\x1aE\xdf\xa3 matroska", "caption it as a video"),
        ("clip.avi", b"RIFF\0\0\0\0AVI LIST", "caption it as a video"),
        ("sensor.dng", b"II*\0\x08\0\0\0", "camera's raw file"),
        ("sensor.cr3", b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "camera's raw file"),
        ("saved.jpg", b"<!DOCTYPE html><html></html>", "a web page"),
        ("big.png", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("new.jxl", b"\xff\x0a rest", "JPEG XL"),
        ("postscript.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a picture that can be read"),
    ],
)
def test_files_that_are_no_pictures(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    path = _file(tmp_path, name, data)
    line = message(path)
    assert line.startswith(f"{path}: this is ")
    assert reason in line


KINDS = ["JPEG", "PNG", "GIF", "WEBP", "BMP", "PPM", "TIFF", "JPEG2000"] + (["AVIF"] if has_avif else [])


@pytest.mark.parametrize("kind", KINDS)
def test_truncation_is_an_error_and_never_a_grey_half(kind: str, tmp_path: Path) -> None:
    data = encode(photo(120, 90), kind)
    for share in (0.3, 0.6, 0.9):
        cut = _file(tmp_path, "cut.jpg", data[: int(len(data) * share)])
        line = message(cut)
        assert line.startswith(f"{cut}: ")
        if kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"):
            assert line == f"{cut}: the file is truncated; copy or download it again"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize("kind", [*KINDS, "HEIF"])
def test_damage_anywhere_is_an_image_error_or_a_picture(kind: str) -> None:
    data = heic(photo(64, 48)) if kind == "HEIF" else encode(photo(64, 48), kind)
    random = np.random.default_rng(0)
    lines = []
    for trial in range(60):
        damaged = bytearray(data)
        if trial % 2:
            del damaged[int(random.integers(1, len(data))) :]
        for place in random.integers(0, min(len(damaged), 700), 8):
            damaged[place] = random.integers(0, 256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                pixels, _ = load(bytes(damaged), squash(8))
                assert pixels.shape == (3, 8, 8)
            except ImageError as error:
                lines.append(str(error))
    assert lines
    for line in lines:
        assert line.startswith("the given bytes: ")
        assert "; " in line
        assert "\n" not in line


def test_corrupt_data(tmp_path: Path) -> None:
    data = bytearray(encode(photo(60, 40), "PNG"))
    data[60:80] = bytes(20)
    line = message(_file(tmp_path, "corrupt.png", bytes(data)))
    assert "the picture is damaged" in line
    assert "with another program" in line


def test_names_stay_on_one_printable_line(tmp_path: Path) -> None:
    line = message("two\nlines\x1b[31m.jpg")
    assert line.startswith("two\\nlines\\x1b[31m.jpg: ")
    assert message(b"abc\xff.jpg").startswith("the given bytes: ")
    message("broken\udcff.jpg").encode("utf-8")
    assert message(io.BytesIO(b"words")).startswith("the given file: ")
    assert "open it in binary mode" in message(io.StringIO("words"))
    file = _file(tmp_path, "words.jpg", b"words")
    with open(file, "rb") as stream:
        assert message(stream).startswith(f"{file}: ")
    closed = Image.open(io.BytesIO(encode(corners(), "PNG")))
    closed.close()
    assert message(closed).startswith("the given image: ")


def test_failures_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(corners(), "PNG")
    for error, reason in [
        (MemoryError(), "not enough memory"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (RuntimeError("two\nlines"), "(two lines)"),
    ]:

        def fail(self: Image.Image, error: Exception = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(ImageFile.ImageFile, "load", fail)
            assert reason in message(data)


def test_threads(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    paths = [
        _file(tmp_path, "a.jpg", encode(photo(700, 500), "JPEG", exif=exif)),
        _file(tmp_path, "b.png", encode(photo(70, 50).convert("P"), "PNG")),
        _file(tmp_path, "c.tif", encode(photo(70, 50), "TIFF", compression="tiff_lzw")),
        _file(tmp_path, "d.webp", encode(photo(70, 50), "WEBP")),
        _file(tmp_path, "e.heic", heic(photo(64, 48))),
        _file(tmp_path, "f.jpg", b"words"),
    ]

    def run(path: Path) -> object:
        try:
            pixels, fit = load(path, squash())
        except ImageError as error:
            return str(error)
        return pixels.tobytes(), fit

    alone = [run(path) for path in paths]
    assert sum(isinstance(result, str) for result in alone) == 1
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, paths * 15)) == alone * 15


# Folders and patterns


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "photos/b.JPG",
        "photos/a.png",
        "photos/.hidden.jpg",
        "photos/notes.txt",
        "photos/clip.mp4",
        "photos/trip/c.webp",
        "photos/trip/far/d.heic",
        "photos/.cache/e.jpg",
        "photos/folder.jpg/f.gif",
        "photos/odd[1].jpg",
        "docs/read.me",
        "docs/data.bin",
        "nested/x/y.jpg",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(paths: list[Path]) -> list[str]:
    assert all(isinstance(path, Path) for path in paths)
    return [path.as_posix() for path in paths]


def test_folders(tree: Path) -> None:
    flat = ["photos/a.png", "photos/b.JPG", "photos/odd[1].jpg"]
    assert names(find_images(["photos"])) == flat
    assert names(find_images([Path("photos/")])) == flat
    assert names(find_images("photos")) == flat
    assert names(find_images(iter(["photos"]))) == flat
    assert names(find_images(["photos"], recursive=True)) == [
        *flat[:2], "photos/folder.jpg/f.gif", flat[2], "photos/trip/c.webp", "photos/trip/far/d.heic"
    ]  # fmt: skip
    assert find_images([tree / "photos"])[0] == tree / "photos" / "a.png"
    assert find_images([]) == []


def test_files_are_taken_as_they_are(tree: Path) -> None:
    given = ["docs/read.me", "photos/odd[1].jpg", "missing.jpg", "photos/.hidden.jpg", "docs/read.me"]
    assert names(find_images(given)) == given


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("photos/*.png", ["photos/a.png"]),
        ("photos/[ab].*", ["photos/a.png", "photos/b.JPG"]),
        ("photos/?.png", ["photos/a.png"]),
        ("docs/*.bin", ["docs/data.bin"]),
        ("nested/**/*.jpg", ["nested/x/y.jpg"]),
        ("photos/**/*.heic", ["photos/trip/far/d.heic"]),
        ("photos/trip/**", ["photos/trip/c.webp", "photos/trip/far/d.heic"]),
        ("photos/t*", ["photos/trip/c.webp"]),
        ("*/x", ["nested/x/y.jpg"]),
    ],
)
def test_patterns(tree: Path, pattern: str, expected: list[str]) -> None:
    assert names(find_images([pattern])) == expected


def test_nothing_found(tree: Path) -> None:
    with pytest.raises(ImageError, match=r"docs: no pictures in this folder; pictures end in \.jpg"):
        find_images(["photos", "docs"])
    with pytest.raises(ImageError, match="nested: no pictures in this folder; use --recursive"):
        find_images(["nested"])
    with pytest.raises(ImageError, match="docs: no pictures in this folder or its sub-folders; pictures end"):
        find_images(["docs"], recursive=True)
    with pytest.raises(ImageError, match=r"none\*\.jpg: no picture matches this pattern"):
        find_images(["none*.jpg"])
    with pytest.raises(ImageError, match=r"docs/\*: no picture matches this pattern"):
        find_images(["docs/*"])
    with pytest.raises(ImageError, match="the path is empty"):
        find_images([""])


def test_links(tree: Path) -> None:
    try:
        (tree / "nested" / "x" / "loop").symlink_to(tree / "nested", target_is_directory=True)
        (tree / "nested" / "x" / "z.jpg").symlink_to(tree / "gone.jpg")
    except OSError:
        pytest.skip("no symbolic links here")
    # the loop ends, and a broken link is kept so that whoever opens it reports it
    assert names(find_images(["nested"], recursive=True)) == ["nested/x/y.jpg", "nested/x/z.jpg"]


def test_folders_that_cannot_be_listed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name == "trip":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "photos/trip" in names(find_images(["photos"], recursive=True))
    assert "no permission" in message("photos/trip")
    with pytest.raises(ImageError, match=r"photos/trip: .*Permission denied"):
        find_images(["photos/trip"])


def test_large_folders_are_listed_without_a_system_call_for_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3000):
        (tmp_path / f"{i:05}.jpg").touch()
    calls = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **options: calls.append(path) or stat(path, **options))
    found = find_images([tmp_path], recursive=True)
    assert [path.name for path in found] == [f"{i:05}.jpg" for i in range(3000)]
    assert len(calls) < 10
