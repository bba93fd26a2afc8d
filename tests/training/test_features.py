"""The feature cache: what the encoder gives, resumable, shared, never stale, at any block; and without it."""

import errno
import json
import math
import random
import re
import subprocess
import sys
import threading
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from captioner_training import features
from captioner_training.config import SourceConfig
from captioner_training.data import DataError, DataSet, load_data_set
from captioner_training.features import FeatureCache, LivePictures, crop_window, load_pixels, same_pictures
from filelock import FileLock
from PIL import Image
from shape_data import write_shapes, write_tar

from captioner.encoder import Encoder, cells, encode
from captioner.images import load, normalise


def load_shapes(folder: Path, images: str = "pictures") -> DataSet:
    return load_data_set("shapes", SourceConfig(annotations="shapes.json", images=[images]), folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataSet:
    source = SourceConfig(annotations="shapes.json", images=["pictures"])
    return load_data_set("shapes", source, write_shapes(tmp_path_factory.mktemp("shapes")))


@pytest.fixture(scope="module")
def busy(tmp_path_factory) -> DataSet:
    """Pictures that are no mirror images of themselves. A random network's first blocks tell them apart."""
    folder = write_shapes(tmp_path_factory.mktemp("busy"))
    chance = np.random.default_rng(0)
    for path in sorted((folder / "pictures").iterdir()):
        blotches = Image.fromarray(chance.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        blotches.resize((96, 72), Image.Resampling.BICUBIC).save(path)
    return load_shapes(folder)


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


def differ(a, b):
    """Return whether features differ far beyond what `close` allows."""
    return float((a - b).abs().max()) > 0.1 * float(a.abs().max())


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
def test_mirrored_pictures_are_the_second_variant(tmp_path, busy, encoder):
    cache = FeatureCache(tmp_path, busy, encoder, flips=True, blocks=2).build()
    assert cache.shape == (2, 24, 1024, 16)
    pixels, _ = load_pixels(busy, [5, 6], encoder)
    plain = cells(encoder.network[:2](normalise(pixels, encoder.preprocess)))
    mirrored = cells(encoder.network[:2](normalise(pixels.flip(-1), encoder.preprocess)))
    assert differ(plain, mirrored)
    assert close(cache.read([5, 6], [1, 1]), mirrored)
    assert close(cache.read([5, 6], [1, 0]), torch.stack((mirrored[0], plain[1])))
    whole = FeatureCache(tmp_path, busy, encoder, flips=True).build()
    assert whole.shape == (2, 24, 4, 1280)
    assert close(whole.read([5, 6], [1, 1]), encoder(normalise(pixels.flip(-1), encoder.preprocess)))


def test_letterboxed_pictures_keep_their_masks(tmp_path, data):
    encoder = make_encoder("letterbox")
    cache = FeatureCache(tmp_path, data, encoder, flips=False).build()
    pixels, fits = load_pixels(data, [0], encoder)
    assert torch.equal(cache.grid_features([0]).mask, encode(encoder, pixels, fits).mask)


def test_a_second_build_computes_nothing(tmp_path, data, encoder, monkeypatch):
    first = FeatureCache(tmp_path, data, encoder, flips=True).build()
    monkeypatch.setattr(features, "load", lambda *a: pytest.fail("read a picture again"))
    second = FeatureCache(tmp_path, data, encoder, flips=True).build()
    assert torch.equal(first.read([1, 2], [0, 1]), second.read([1, 2], [0, 1]))
    assert first.fits == second.fits


def stored(folder: Path) -> dict[str, bytes]:
    """Return what the one cache in a folder holds, locks left out."""
    (cache,) = folder.iterdir()
    return {f.name: f.read_bytes() for f in sorted(cache.iterdir()) if f.suffix != ".lock"}


@pytest.fixture
def small(monkeypatch):
    """Six pictures with their mirror images in a shard, two in a batch: shards of 6, 6, 6 and 6."""
    monkeypatch.setattr(features, "_BATCH", 2)
    monkeypatch.setattr(features, "_SHARD_VIEWS", 12)


def test_an_interrupted_build_goes_on_and_gives_the_same_bits(tmp_path, data, encoder, monkeypatch, small):
    whole = FeatureCache(tmp_path / "whole", data, encoder, flips=True).build()
    read, limits = [], [9, 4, 8]

    def counting(raw, preprocess):
        if limits and len(read) == limits[0]:
            raise KeyboardInterrupt
        read.append(raw)
        return load(raw, preprocess)

    monkeypatch.setattr(features, "load", counting)
    for _ in range(3):
        read.clear()
        with pytest.raises(KeyboardInterrupt):
            FeatureCache(tmp_path / "parts", data, encoder, flips=True).build()
        limits.pop(0)
        assert not [name for name in stored(tmp_path / "parts") if name.startswith(".")]
    read.clear()
    parts = FeatureCache(tmp_path / "parts", data, encoder, flips=True).build()
    assert 0 < len(read) < 24  # some had been kept
    assert parts.fits == whole.fits
    assert parts.content == whole.content
    assert stored(tmp_path / "parts") == stored(tmp_path / "whole")


BUILD = """
import sys, time
from pathlib import Path
sys.path[:0] = {path!r}
import torch
from captioner_training import features
from test_features import make_encoder, load, load_shapes

def slow(raw, preprocess):
    time.sleep(0.03)
    return load(raw, preprocess)

features.load, features._BATCH, features._SHARD_VIEWS = slow, 2, 12
torch.set_num_threads(1)
data, encoder = load_shapes(Path({data!r})), make_encoder()
print("ready", flush=True)
sys.stdin.readline()
features.FeatureCache(Path({cache!r}), data, encoder, flips=True).build()
"""


def start(pictures: Path, cache: Path, count: int = 2) -> list[subprocess.Popen]:
    """Start processes that build one cache; they begin together."""
    here = Path(__file__).parent
    path = [str(here), str(here.parent), str(here.parent.parent), str(here.parent.parent / "training")]
    script = BUILD.format(path=path, data=str(pictures), cache=str(cache))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    return processes


def finish(*processes: subprocess.Popen) -> None:
    for process in processes:
        _, error = process.communicate()
        assert process.returncode == 0, error


def test_two_processes_share_the_work_and_one_takes_over_from_a_killed_one(tmp_path, encoder, small):
    pictures = write_shapes(tmp_path / "pictures")
    FeatureCache(tmp_path / "whole", load_shapes(pictures), encoder, flips=True).build()
    first, second = start(pictures, tmp_path / "parts")
    # a shard takes 0.2 s, and each has two or three to compute
    while not list(tmp_path.glob("parts/*/*.f16")):
        assert first.poll() is second.poll() is None
        time.sleep(0.01)
    first.kill()
    first.communicate()
    assert len(list(tmp_path.glob("parts/*/*.f16"))) < 4
    finish(second)
    assert stored(tmp_path / "parts") == stored(tmp_path / "whole")


@pytest.mark.slow
def test_builders_killed_again_and_again_leave_the_same_bits(tmp_path, encoder, small):
    pictures = write_shapes(tmp_path / "pictures")
    FeatureCache(tmp_path / "whole", load_shapes(pictures), encoder, flips=True).build()
    chance = random.Random(0)
    for _ in range(6):
        processes = start(pictures, tmp_path / "parts")
        time.sleep(chance.uniform(0.02, 0.3))
        for process in processes:
            process.kill()
            process.communicate()
    finish(*start(pictures, tmp_path / "parts"))
    assert stored(tmp_path / "parts") == stored(tmp_path / "whole")


def test_a_shard_that_another_process_computes_is_waited_for(tmp_path, data, encoder, small, capsys):
    FeatureCache(tmp_path / "whole", data, encoder, flips=True).build()
    cache = FeatureCache(tmp_path / "shared", data, encoder, flips=True)
    cache.folder.mkdir(parents=True)
    other = FileLock(cache.folder / "00002.lock", thread_local=False)
    other.acquire()
    builder = threading.Thread(target=cache.build)
    builder.start()
    while len(list(cache.folder.glob("*.f16"))) < 3:
        time.sleep(0.01)
    builder.join(0.5)
    assert builder.is_alive()
    assert not (cache.folder / "00002.f16").exists()
    other.release()  # as when the other process dies
    builder.join(30)
    assert not builder.is_alive()
    assert "waiting for other processes" in capsys.readouterr().err
    assert stored(tmp_path / "shared") == stored(tmp_path / "whole")


def test_the_way_of_a_gpu_gives_the_same(tmp_path, busy, encoder, small):
    usual = FeatureCache(tmp_path / "cpu", busy, encoder, flips=True, blocks=2, crops=1).build()
    cache = FeatureCache(tmp_path / "gpu", busy, encoder, flips=True, blocks=2, crops=1)
    cache._on_cpu = False  # pictures are decoded in threads, and computed where results are taken
    cache.build()
    rows, variants = [0, 3, 23, 11], [0, 1, 2, 3]
    assert close(cache.read(rows, variants), usual.read(rows, variants))
    assert cache.content == usual.content


def test_shards_are_of_bounded_size_and_read_as_one(tmp_path, data, encoder, monkeypatch):
    whole = FeatureCache(tmp_path / "one", data, encoder, flips=True).build()
    monkeypatch.setattr(features, "_SHARD_BYTES", 7 * 2 * 4 * 1280 * 2 + 1)
    parts = FeatureCache(tmp_path / "four", data, encoder, flips=True).build()
    sizes = [len(v) // (2 * 4 * 1280 * 2) for k, v in stored(tmp_path / "four").items() if k.endswith(".f16")]
    assert sizes == [7, 7, 7, 3]
    rows, variants = [23, 0, 7, 6, 20, 20], [0, 1, 0, 1, 1, 0]
    assert close(parts.read(rows, variants), whole.read(rows, variants))
    assert parts.fits == whole.fits
    assert parts.content == whole.content


def test_the_size_is_told_before_and_is_what_is_written(tmp_path, data, encoder, capsys):
    cache = FeatureCache(tmp_path, data, encoder, flips=True).build()
    assert "features of shapes: 24 pictures in 2 variants, 492 kB in " in capsys.readouterr().err
    files = stored(tmp_path)
    assert sum(len(v) for k, v in files.items() if k.endswith(".f16")) == cache.size == 2 * 24 * 4 * 1280 * 2
    assert sum(map(len, files.values())) < cache.size + 24 * 150 + 1000
    FeatureCache(tmp_path, data, encoder, flips=True).build()
    assert capsys.readouterr().err == ""


def test_how_long_it_takes_is_told_where_it_is_long(capsys):
    with features.tqdm(total=1000, desc="features of shapes", unit="picture") as bar:
        features._estimate(bar, 290, 2, 10)
        assert "minutes" not in capsys.readouterr().err
        features._estimate(bar, 600, 2, 10)
    assert "features of shapes: about 2 minutes at 5 pictures a second" in capsys.readouterr().err


def test_too_little_room_is_told_before(tmp_path, data, encoder, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 300_000, 300_000))
    monkeypatch.setattr(features, "load", lambda *a: pytest.fail("began"))
    message = r"^the features of shapes need 492 kB more, and 300 kB are free at .*--cache.*cache: false$"
    with pytest.raises(DataError, match=message):
        FeatureCache(tmp_path, data, encoder, flips=True).build()


def test_a_disk_that_fills_up_leaves_the_finished_shards(tmp_path, data, encoder, monkeypatch, small):
    FeatureCache(tmp_path / "whole", data, encoder, flips=True).build()
    add, added = features._ShardWriter.add, []

    def full(self, *arguments):
        added.append(1)
        if len(added) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, *arguments)

    monkeypatch.setattr(features._ShardWriter, "add", full)
    message = r"^the disk is full at .*: 246 kB of 492 kB are kept; make room and start again, .*$"
    with pytest.raises(DataError, match=message):
        FeatureCache(tmp_path / "full", data, encoder, flips=True).build()
    assert sorted(stored(tmp_path / "full")) == [
        "00000.f16",
        "00000.json",
        "00001.f16",
        "00001.json",
        "cache.json",
    ]
    FeatureCache(tmp_path / "full", data, encoder, flips=True).build()
    assert len(added) == 8 + 6
    assert stored(tmp_path / "full") == stored(tmp_path / "whole")


def test_a_folder_that_cannot_be_written_is_named(tmp_path, data, encoder):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=r"file/shapes-\w+: Not a directory; name another folder with --cache"
    ):
        FeatureCache(tmp_path / "file", data, encoder, flips=False).build()


def test_the_manifest_says_what_it_is_a_cache_of(tmp_path, data, encoder):
    cache = FeatureCache(tmp_path, data, encoder, flips=True, blocks=12, crops=2).build()
    manifest = json.loads((cache.folder / "cache.json").read_text())
    expected = {
        "format": 2,
        "data_set": "shapes",
        "pictures": 24,
        "encoder": "efficientnet_lite0",
        "preprocess": encoder.preprocess.to_dict(),
        "weights": features.fingerprint(encoder.network[:12], encoder.preprocess),
        "blocks": 12,
        "flips": True,
        "crops": 2,
        "variants": 6,
        "dtype": "float16",
        "shard_pictures": 21,  # of six views each, at most 128 together
        "shards": 2,
    }
    assert {k: manifest[k] for k in expected} == expected
    assert cache.folder.name == f"shapes-{manifest['key'][:16]}"


def test_a_foreign_or_damaged_manifest_is_refused(tmp_path, data, encoder):
    cache = FeatureCache(tmp_path, data, encoder, flips=False).build()
    path = cache.folder / "cache.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "weights": "another", "crops": 1}))
    with pytest.raises(DataError, match=r"cache\.json belongs to other features \(weights, crops\): delete"):
        FeatureCache(tmp_path, data, encoder, flips=False).build()
    path.write_text(path.read_text()[:100])
    with pytest.raises(DataError, match=r"cache\.json is damaged: delete the folder .*shapes-"):
        FeatureCache(tmp_path, data, encoder, flips=False).build()


@pytest.mark.parametrize("suffix", [".f16", ".json"])
@pytest.mark.parametrize("damage", ["shorter", "empty", "gone"])
def test_a_damaged_shard_is_computed_anew(tmp_path, data, encoder, small, capsys, suffix, damage):
    cache = FeatureCache(tmp_path, data, encoder, flips=True).build()
    before = stored(tmp_path)
    path = cache.folder / f"00001{suffix}"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20] if damage == "shorter" else b"")
    capsys.readouterr()
    FeatureCache(tmp_path, data, encoder, flips=True).build()
    said = capsys.readouterr().err
    told = "00001.f16 is damaged: its 6 pictures are computed anew"
    assert said.count(told) == (0 if (damage, suffix) == ("gone", ".f16") else 1)
    assert "6 pictures are left to compute" in said
    assert stored(tmp_path) == before


@torch.inference_mode()
@pytest.mark.parametrize("tar", [False, True])
def test_a_picture_replaced_under_its_name_is_computed_anew(
    tmp_path, encoder, monkeypatch, small, capsys, tar
):
    def write(swap: bool) -> DataSet:
        folder = write_shapes(tmp_path / "pictures", tar=False)
        path = folder / "pictures" / "red-square-white.png"
        other = path.with_name("blue-cross-black.png").read_bytes()
        size = max(len(other), len(path.read_bytes()))
        path.write_bytes((other if swap else path.read_bytes()).ljust(size, b"\0"))  # the sizes are equal
        if tar:
            write_tar(folder / "x.tar", {p.name: p.read_bytes() for p in (folder / "pictures").iterdir()})
        return load_shapes(folder, "x.tar" if tar else "pictures")

    first = FeatureCache(tmp_path / "cache", write(False), encoder, flips=True, blocks=2).build()
    time.sleep(0.01)
    data = write(True)
    index = next(i for i, p in enumerate(data.pictures) if p.file.endswith("red-square-white.png"))
    capsys.readouterr()
    second = FeatureCache(tmp_path / "cache", data, encoder, flips=True, blocks=2).build()
    said = capsys.readouterr().err
    assert said.count("red-square-white.png has changed: its features are computed anew") == 1
    assert "6 pictures are left to compute" in said
    assert second.folder == first.folder
    pixels, _ = load_pixels(data, [index], encoder)
    now, before = second.read([index], [0]), first.read([index], [0])
    assert close(now, cells(encoder.network[:2](normalise(pixels, encoder.preprocess))))
    assert differ(now, before)  # which is still open
    assert [i for i in range(24) if first.content[i] != second.content[i]] == [index]

    # written again with the same bytes: compared once, not computed
    time.sleep(0.01)
    data = write(True)
    monkeypatch.setattr(features, "load", lambda *a: pytest.fail("decoded a picture again"))
    third = FeatureCache(tmp_path / "cache", data, encoder, flips=True, blocks=2).build()
    assert third.content == second.content
    monkeypatch.setattr(data.store, "read", lambda *a: pytest.fail("read a picture again"))
    FeatureCache(tmp_path / "cache", data, encoder, flips=True, blocks=2).build()


def test_threads_are_given_back(tmp_path, data, encoder):
    before = torch.get_num_threads()
    FeatureCache(tmp_path, data, encoder, flips=False).build()
    assert torch.get_num_threads() == before


def test_a_stale_cache_is_not_used(tmp_path, data, encoder):
    seen = set()

    def is_new(encoder, data=data, flips=False, blocks=None, crops=0):
        folder = FeatureCache(tmp_path, data, encoder, flips, blocks, crops=crops).folder
        known = folder in seen
        seen.add(folder)
        return not known

    assert is_new(encoder)
    assert not is_new(encoder)
    assert not is_new(make_encoder())  # another object with the same weights
    weights, statistics = make_encoder(), make_encoder()
    with torch.no_grad():
        next(weights.network[9].parameters()).view(-1)[0] += 1e-3
        next(b for n, b in statistics.network.named_buffers() if n.endswith("running_var"))[0] += 1e-3
    assert is_new(weights)
    assert is_new(statistics)
    assert is_new(make_encoder("crop"))
    assert is_new(encoder, flips=True)
    assert is_new(encoder, crops=1)
    assert is_new(encoder, blocks=10)
    assert is_new(encoder, DataSet("shapes", data.pictures[1:], data.store))
    assert is_new(encoder, DataSet("shapes", data.pictures[::-1], data.store))
    assert is_new(
        encoder, DataSet("shapes", (replace(data.pictures[0], id=7), *data.pictures[1:]), data.store)
    )


def test_a_picture_of_another_size_makes_another_cache(tmp_path, encoder):
    folder = write_shapes(tmp_path / "pictures")
    first = FeatureCache(tmp_path, load_shapes(folder), encoder, flips=False)
    with (folder / "pictures" / "red-square-white.png").open("ab") as file:
        file.write(b"\0")
    assert FeatureCache(tmp_path, load_shapes(folder), encoder, flips=False).folder != first.folder


def test_a_cache_of_lower_blocks_outlives_a_change_of_the_upper_ones(tmp_path, data, monkeypatch):
    encoder = make_encoder()
    FeatureCache(tmp_path, data, encoder, flips=False, blocks=12).build()
    with torch.no_grad():
        next(encoder.network[12].parameters()).add_(1)
    monkeypatch.setattr(features, "load", lambda *a: pytest.fail("read a picture again"))
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
    shard = np.fromfile(cache.folder / "00000.f16", np.float16).reshape(24, 1, 4, 1280)
    assert torch.equal(cache.read([5], [0]), torch.from_numpy(shard[[5], 0].astype(np.float32)))


@torch.inference_mode()
def test_what_16_bits_cannot_hold_is_cut_and_told(tmp_path, data, encoder, monkeypatch, capsys):
    compute = features.compute
    monkeypatch.setattr(features, "compute", lambda *a: compute(*a) * 1e7)
    cache = FeatureCache(tmp_path, data, encoder, flips=False).build()
    assert float(cache.read(range(24), [0] * 24).amax()) == 65504
    assert "is kept as 65504, the most that 16 bits hold" in capsys.readouterr().err


def test_features_that_are_no_numbers_are_refused(tmp_path, data, encoder, monkeypatch):
    compute = features.compute

    def broken(network, pixels, preprocess):
        given = compute(network, pixels, preprocess)
        given[3, 0, 0] = math.nan
        return given

    monkeypatch.setattr(features, "compute", broken)
    name = re.escape(data.pictures[3].file)
    with pytest.raises(DataError, match=f"shapes: efficientnet_lite0 gives no finite features for {name}"):
        FeatureCache(tmp_path, data, encoder, flips=False).build()


def test_pictures_that_stand_in_two_sets_are_found_by_content(tmp_path, data, encoder):
    other = write_shapes(tmp_path / "other", 6)
    for path in (other / "pictures").iterdir():  # other names, other pictures but for one
        path.write_bytes(path.read_bytes() + (b"" if path.name == "red-cross-white.png" else b"\0"))
        path.rename(path.with_name(f"x-{path.name}"))
    record = json.loads((other / "shapes.json").read_text())
    for image in record["images"]:
        image["file_name"] = f"x-{image['file_name']}"
    (other / "shapes.json").write_text(json.dumps(record))
    held_out = load_shapes(other)
    a = FeatureCache(tmp_path / "cache", data, encoder, flips=False).build()
    b = FeatureCache(tmp_path / "cache", held_out, encoder, flips=False).build()
    ((i, j),) = same_pictures(a, b)
    assert data.pictures[i].file == "red-cross-white.png"
    assert held_out.pictures[j].file == "x-red-cross-white.png"
    assert same_pictures(a, a) == [(k, k) for k in range(24)]


def test_reading_comes_after_building(tmp_path, data, encoder):
    with pytest.raises(ValueError, match="build"):
        FeatureCache(tmp_path, data, encoder, flips=False).read([0], [0])
    with pytest.raises(ValueError, match="blocks must be 1 to 18, not 0"):
        FeatureCache(tmp_path, data, encoder, flips=False, blocks=0)


# Crops, masks, and features without a cache


@pytest.mark.parametrize("fit", ["squash", "crop", "letterbox"])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (100, 100), (1000, 10)])
def test_crops_keep_most_of_the_photo_and_its_proportions(fit, size):
    chance = random.Random(1)
    across, down = size if fit == "squash" else (min(size), min(size))
    shares, lefts = [], []
    for _ in range(300):
        left, top, right, bottom = crop_window(*size, fit, chance)
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        shares.append((right - left) * (bottom - top) / (across * down))
        lefts.append(left / max(1e-9, size[0] - (right - left)))
        stretch = (right - left) / (bottom - top) / (across / down)
        assert math.exp(-0.101) <= stretch <= math.exp(0.101)
    assert min(shares) == pytest.approx(0.6, abs=0.02)
    assert max(shares) == pytest.approx(1, abs=0.05)
    assert sum(shares) / 300 == pytest.approx(0.8, abs=0.02)
    assert min(lefts) < 0.05
    assert max(lefts) > 0.95


@pytest.mark.parametrize("fit", ["squash", "crop", "letterbox"])
def test_a_crop_shows_its_window(tmp_path, fit):
    # red grows from left to right, green from top to bottom: each pixel says where it is from
    folder = write_shapes(tmp_path, 1)
    x, y = np.meshgrid(np.linspace(0, 255, 256), np.linspace(0, 255, 192))
    ramp = np.stack([x, y, 0 * x], -1).round().astype(np.uint8)
    Image.fromarray(ramp).save(folder / "pictures" / "red-circle-white.png")
    data = load_shapes(folder)
    live = LivePictures(data, make_encoder(fit), flips=True, crops=2)
    assert live.variants == 6
    left, top, right, bottom = crop_window(256, 192, fit, random.Random("100 1"))
    pixels, mirrored = live.pixels([0, 0], [2, 3]).float()
    assert torch.equal(mirrored, pixels.flip(-1))
    centres = (torch.arange(64) + 0.5) / 64
    expected_x = (left + centres * (right - left) - 0.5) / 255 * 255
    expected_y = (top + centres * (bottom - top) - 0.5) / 191 * 255
    assert float((pixels[0] - expected_x)[:, 2:-2].abs().max()) < 2  # ringing at the edges
    assert float((pixels[1] - expected_y[:, None])[2:-2].abs().max()) < 2


@torch.inference_mode()
@pytest.mark.parametrize("blocks", [None, 2])
def test_cached_and_live_features_are_the_same(tmp_path, busy, encoder, blocks):
    cache = FeatureCache(tmp_path, busy, encoder, flips=True, blocks=blocks, crops=2).build()
    live = LivePictures(busy, encoder, flips=True, blocks=blocks, crops=2, threads=2)
    assert cache.variants == live.variants == 6
    assert cache.shape == live.shape
    assert cache.map_shape == live.map_shape
    rows, variants = [0, 0, 0, 0, 0, 0, 23, 9], [0, 1, 2, 3, 4, 5, 4, 1]
    cached = cache.read(rows, variants)
    assert close(live.read(rows, variants), cached)
    if blocks == 2:
        assert all(differ(cached[a], cached[b]) for a in range(6) for b in range(a))
    assert torch.equal(live.mask(rows, variants), cache.mask(rows, variants))
    if blocks is None:
        ours, theirs = live.grid_features([3, 1]), cache.grid_features([3, 1])
        assert close(ours.data, theirs.data)
        assert torch.equal(ours.mask, theirs.mask)
        assert ours.fits == theirs.fits
        assert ours.grid == theirs.grid


def test_live_crops_are_drawn_by_the_seed(busy, encoder):
    live = LivePictures(busy, encoder, flips=False, crops=1)
    one = live.pixels([0, 1], [1, 1], seed="a")
    assert torch.equal(live.pixels([1, 0], [1, 1], seed="a"), one.flip(0))  # wherever it stands in the batch
    assert not torch.equal(live.pixels([0, 1], [1, 1], seed="b"), one)
    assert torch.equal(live.pixels([0], [0], seed="a"), live.pixels([0], [0], seed="b"))


def test_upper_blocks_can_learn_on_live_features(data, encoder):
    live = LivePictures(data, encoder, flips=False, blocks=12)
    weight = torch.ones(live.shape[-1], requires_grad=True)
    (live.read([0, 1], [0, 0]) * weight).sum().backward()
    assert weight.grad is not None


def test_masks_are_mirrored_with_the_picture_and_crops_have_no_bars(tmp_path):
    # 33 of 64 pixels wide: 15 pixels of bar on the left, 16 on the right; cells are 32 wide
    folder = write_shapes(tmp_path / "data", 2)
    Image.new("RGB", (33, 64)).save(folder / "pictures" / "red-circle-white.png")
    data, encoder = load_shapes(folder), make_encoder("letterbox")
    whole = torch.tensor([17 / 32, 16 / 32] * 2)
    cache = FeatureCache(tmp_path / "cache", data, encoder, flips=True, crops=1).build()
    live = LivePictures(data, encoder, flips=True, crops=1)
    for source in (cache, live, cache):
        assert torch.equal(
            source.mask([0, 0, 0, 0, 1], [2, 0, 1, 3, 1])[1:3], torch.stack([whole, whole[[1, 0, 3, 2]]])
        )
        assert torch.equal(source.mask([0, 0, 1], [2, 3, 1]), torch.ones(3, 4))
        assert torch.equal(source.mask([1, 0]), torch.stack([torch.ones(4), whole]))
