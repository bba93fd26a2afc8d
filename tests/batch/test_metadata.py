from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

pytest.importorskip("exiv2")

from captioner.batch import metadata
from captioner.batch.beside import Plan
from captioner.batch.metadata import AltText, MetadataError, read_alt_text

XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="Adobe XMP Core 7.0">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:crs="http://ns.adobe.com/camera-raw-settings/1.0/"
   xmlns:lr="http://ns.adobe.com/lightroom/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/"
   xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:xmpMM="http://ns.adobe.com/xap/1.0/mm/"
   xmlns:stEvt="http://ns.adobe.com/xap/1.0/sType/ResourceEvent#" xmlns:my="http://example.com/my/"
   crs:Exposure2012="+0.35" crs:HasSettings="True" xmp:Rating="4" my:thing="7">
   <dc:subject><rdf:Bag><rdf:li>dog</rdf:li><rdf:li>bär</rdf:li></rdf:Bag></dc:subject>
   <dc:description><rdf:Alt><rdf:li xml:lang="x-default">Rex at the lake</rdf:li>
    <rdf:li xml:lang="de-DE">Rex am See</rdf:li></rdf:Alt></dc:description>
   <lr:hierarchicalSubject><rdf:Bag><rdf:li>animals|dog</rdf:li></rdf:Bag></lr:hierarchicalSubject>
   <crs:ToneCurve><rdf:Seq><rdf:li>0, 0</rdf:li><rdf:li>255, 255</rdf:li></rdf:Seq></crs:ToneCurve>
   <crs:MaskGroupBasedCorrections><rdf:Seq><rdf:li><rdf:Description crs:What="Correction"
    crs:CorrectionAmount="1.0"><crs:CorrectionMasks><rdf:Seq><rdf:li crs:What="Mask/Gradient"
    crs:ZeroX="0.5"/></rdf:Seq></crs:CorrectionMasks></rdf:Description></rdf:li></rdf:Seq>
   </crs:MaskGroupBasedCorrections>
   <xmpMM:History><rdf:Seq><rdf:li stEvt:action="saved" stEvt:instanceID="xmp.iid:1"/></rdf:Seq>
   </xmpMM:History>
   <my:deep rdf:parseType="Resource"><my:a>1</my:a>
    <my:b rdf:parseType="Resource"><my:c>2</my:c></my:b></my:deep>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
ALT = "{http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/}AltTextAccessibility"
TEXT = "a dög & <two> “cats”"


def said(caption: str) -> dict[str, Any]:
    return {"schema": 1, "caption": caption, "error": None}


def exif() -> Image.Exif:
    made = Image.Exif()
    made[0x010F], made[0x0112] = "Canon", 6
    made.get_ifd(0x8769)[0x927C] = bytes(range(256))  # the maker's note, which nobody else understands
    made.get_ifd(0x8825)[1] = "N"
    return made


ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def picture(seed: int = 0, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, len(mode)), np.uint8)
    return Image.fromarray(pixels, mode).resize((64, 48), Image.Resampling.BICUBIC)


def encoded(format: str, xmp: str | None = None, full: bool = True, **options: Any) -> bytes:
    """A picture with much metadata."""
    if full:
        options |= {"exif": exif(), "icc_profile": ICC}
    if format == "PNG":
        info = PngImagePlugin.PngInfo()
        if full:
            info.add_text("Description", "mine")
            info.add_itxt("Comment", "Bär", lang="de", zip=True)
        if xmp:
            info.add_itxt("XML:com.adobe.xmp", xmp)
        options["pnginfo"] = info
    elif format == "TIFF":
        options["tiffinfo"] = {270: "desc", **({700: xmp.encode()} if xmp else {})}
    elif xmp:
        options["xmp"] = xmp.encode()
    if format == "JPEG" and full:
        options |= {"comment": b"a comment", "progressive": True}
    buffer = io.BytesIO()
    picture().save(buffer, format, **options)
    data = buffer.getvalue()
    if format == "JPEG" and full:  # captions of newsrooms, extended XMP, a trailer
        iptc = b"\x1c\x02\x78\x00\x05hello\0"
        block = b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0" + struct.pack(">I", len(iptc)) + iptc
        more = b"http://ns.adobe.com/xmp/extension/\0" + b"A" * 32 + struct.pack(">II", 9, 0) + b"<x:xmpmet"
        extra = b"".join(
            b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body
            for marker, body in ((0xED, block), (0xE1, more))
        )
        data = data[:2] + extra + data[2:] + b"a trailer"
    return data


def without_xmp(data: bytes) -> list[tuple[bytes, bytes]]:
    """Every part of a JPEG, PNG or WebP but its XMP, in order; sizes and flags of XMP left out."""
    parts = []
    if data[:2] == b"\xff\xd8":
        place = 2
        while data[place + 1] != 0xDA:
            end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
            if not data[place + 4 : end].startswith(b"http://ns.adobe.com/xap/1.0/\0"):
                parts.append((data[place : place + 2], data[place:end]))
            place = end
        return [*parts, (b"scan", data[place:])]
    if data[:4] == b"\x89PNG":
        place = 8
        while place < len(data):
            end = place + 12 + int.from_bytes(data[place : place + 4], "big")
            if b"XML:com.adobe.xmp" not in data[place : place + 30]:
                parts.append((data[place + 4 : place + 8], data[place:end]))
            place = end
        return parts
    assert int.from_bytes(data[4:8], "little") + 8 == len(data)
    place = 12
    while place < len(data):
        kind, size = struct.unpack_from("<4sI", data, place)
        end = place + 8 + size + size % 2
        if kind == b"VP8X":
            parts.append((kind, bytes([data[place + 8] & ~4]) + data[place + 9 : end]))
        elif kind != b"XMP ":
            parts.append((kind, data[place:end]))
        place = end
    return parts


def pixels(data: bytes) -> list[bytes]:
    found = Image.open(io.BytesIO(data))
    frames = []
    for frame in range(getattr(found, "n_frames", 1)):
        found.seek(frame)
        frames.append(found.tobytes())
    return frames


def packet(path: Path) -> ElementTree.Element:
    """The XMP as Pillow finds it."""
    with Image.open(path) as found:
        xmp = found.info.get("xmp") or found.info.get("XML:com.adobe.xmp") or found.tag_v2[700]
    text = xmp if isinstance(xmp, str) else xmp.decode()
    return ElementTree.fromstring(text[text.index("<x:xmpmeta") : text.rindex("</x:xmpmeta>") + 12])


def write(path: Path, caption: str = TEXT, ours: str | None = None, **options: Any) -> str:
    plan = AltText(**options).plan(str(path), said(caption), ours)
    assert plan.kept is None, plan.kept
    plan.write()
    return plan.digest


FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif"}


@pytest.mark.parametrize("xmp", [None, XMP])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_nothing_but_the_xmp_changes(format: str, full: bool, xmp: str | None, tmp_path: Path) -> None:
    data = encoded(format, xmp, full)
    path = tmp_path / f"x.{FORMATS[format]}"
    path.write_bytes(data)
    assert read_alt_text(path) is None
    ours = write(path)
    changed = path.read_bytes()
    assert read_alt_text(path) == TEXT
    assert pixels(changed) == pixels(data)
    if format == "TIFF":
        old, new = (Image.open(io.BytesIO(d)) for d in (data, changed))
        compressed = [
            [d[a : a + n] for a, n in zip(i.tag_v2[273], i.tag_v2[279], strict=True)]
            for d, i in ((data, old), (changed, new))
        ]
        assert compressed[0] == compressed[1]
        places = {273, 700, 34665, 34853}
        assert {k: v for k, v in new.tag_v2.items() if k not in places} == {
            k: v for k, v in old.tag_v2.items() if k not in places
        }
        assert new.getexif().get_ifd(0x8769) == old.getexif().get_ifd(0x8769)
    else:
        kept = without_xmp(changed)
        if format == "WEBP" and not full and not xmp:
            assert kept[0][0] == b"VP8X"  # a plain file has to become one with extensions
            del kept[0]
        assert kept == without_xmp(data)
    # what is in the packet is there still, and as it was
    root = packet(path)
    (alternatives,) = root.iter(ALT)
    assert [
        (li.get("{http://www.w3.org/XML/1998/namespace}lang"), li.text)
        for li in alternatives.iter(f"{RDF}li")
    ] == [("x-default", TEXT)]
    if xmp:
        before = metadata._meaning("x", XMP)
        assert len(before) == 11
        assert metadata._meaning("x", ElementTree.tostring(root, "unicode")) == before
    # and what is written once more replaces ours alone
    write(path, "a cat", ours)
    assert read_alt_text(path) == "a cat"
    write(path, TEXT, AltText().plan(str(path), said("a cat"), ours).digest)
    assert path.read_bytes() == changed


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("webp", {"lossless": True}),
        ("webp", {"save_all": True, "append_images": [picture(1)], "duration": 100}),
        ("png", {"save_all": True, "append_images": [picture(1)], "duration": 100}),
        ("tif", {"save_all": True, "append_images": [picture(1), picture(2)], "compression": "tiff_lzw"}),
        ("tif", {"compression": "jpeg"}),
    ],
)
def test_other_shapes_of_the_formats(suffix: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    picture().save(path, **options)
    data = path.read_bytes()
    write(path)
    assert read_alt_text(path) == TEXT
    assert pixels(path.read_bytes()) == pixels(data)


def test_transparency_stays(tmp_path: Path) -> None:
    for name in ("x.webp", "x.png"):
        path = tmp_path / name
        picture(mode="RGBA").save(path, lossless=True)
        data = path.read_bytes()
        write(path)
        assert pixels(path.read_bytes()) == pixels(data)
        with Image.open(path) as image:
            assert image.mode == "RGBA"


def test_photos_of_cameras(tmp_path: Path) -> None:
    media = pytest.importorskip("gradio.media")
    for name in ("cheetah1.jpg", "tower.jpg", "groot.jpeg"):
        data = Path(media.get_image(name)).read_bytes()
        path = tmp_path / name
        path.write_bytes(data)
        write(path)
        assert read_alt_text(path) == TEXT
        assert without_xmp(path.read_bytes()) == without_xmp(data)
        assert pixels(path.read_bytes()) == pixels(data)


def test_further_pictures_in_a_file_are_found_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    picture().save(path, "MPO", save_all=True, append_images=[picture(1)])
    data = path.read_bytes()
    write(path)
    assert len(pixels(data)) == 2
    assert pixels(path.read_bytes()) == pixels(data)


# --------------------------------------------------------------------------------------------------
# whose words


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded("JPEG", XMP))
    return path


def type_in(path: Path, **texts: str) -> None:
    """Write alt text as a person would in another program."""
    from captioner.batch.metadata import _Picture

    path.write_bytes(
        _Picture(str(path), path.read_bytes()).with_alt_text(
            {k.replace("_", "-"): v for k, v in texts.items()}
        )
    )


def test_the_alt_text_of_a_person_is_never_replaced(photo: Path) -> None:
    type_in(photo, x_default="Rex and I")
    plan = AltText().plan(str(photo), said(TEXT))
    assert (plan.data, plan.kept) == (None, f"{photo}: it has an alt text that is kept")
    # not even one that was ours before it was edited
    photo.write_bytes(encoded("JPEG", XMP))
    ours = write(photo)
    type_in(photo, x_default="a dög at the lake")
    assert AltText().plan(str(photo), said("a cat"), ours).kept
    assert read_alt_text(photo) == "a dög at the lake"
    photo.write_bytes(encoded("JPEG"))
    type_in(photo, de_DE="Rex und ich")
    assert AltText().plan(str(photo), said(TEXT)).kept
    assert read_alt_text(photo) == "Rex und ich"


def test_what_a_person_adds_to_ours_in_another_language_stays(photo: Path) -> None:
    ours = write(photo, "a dog")
    type_in(photo, x_default="a dog", de_DE="ein Hund")
    write(photo, "a cat", ours)
    texts = [
        (li.get("{http://www.w3.org/XML/1998/namespace}lang"), li.text)
        for e in packet(photo).iter(ALT)
        for li in e.iter(f"{RDF}li")
    ]
    assert texts == [("x-default", "a cat"), ("de-DE", "ein Hund")]


def test_other_descriptions_stay_and_may_be_reason_enough(tmp_path: Path) -> None:
    described = tmp_path / "described.jpg"
    described.write_bytes(encoded("JPEG", XMP))
    camera = tmp_path / "camera.jpg"
    made = Image.Exif()
    made[0x010E] = "OLYMPUS DIGITAL CAMERA         "
    picture().save(camera, exif=made)
    person = tmp_path / "person.jpg"
    made[0x010E] = "my mother, 1962"
    picture().save(person, exif=made)
    for path in (described, person):
        plan = AltText(keep_described=True).plan(str(path), said(TEXT))
        assert plan.kept == f"{path}: there is no alt text: it has a description"
        write(path)
        assert read_alt_text(path) == TEXT
    write(camera, keep_described=True)
    with Image.open(person) as image:
        assert image.getexif()[0x010E] == "my mother, 1962"
    (description,) = packet(described).iter("{http://purl.org/dc/elements/1.1/}description")
    assert [li.text for li in description.iter(f"{RDF}li")] == ["Rex at the lake", "Rex am See"]


def test_a_kill_at_any_moment_neither_loses_nor_doubles(photo: Path) -> None:
    start = photo.read_bytes()
    rng = random.Random(5)
    writer = AltText()
    for _ in range(8):
        photo.write_bytes(start)
        journal: str | None = None
        for caption in ("a dog", "a cat", "a dog in the snow"):
            for _ in range(rng.randrange(4)):
                plan = writer.plan(str(photo), said(caption), journal)
                if rng.random() < 0.7:
                    journal = plan.digest or journal
                    if rng.random() < 0.5:
                        plan.write()
            plan = writer.plan(str(photo), said(caption), journal)
            assert plan.kept is None
            journal = plan.digest
            plan.write()
        assert read_alt_text(photo) == "a dog in the snow"
        assert writer.plan(str(photo), said("a dog in the snow"), journal) == Plan(
            photo, None, journal.split()[0]
        )


# --------------------------------------------------------------------------------------------------
# files


def test_permissions_and_time_stay(photo: Path) -> None:
    photo.chmod(0o600)
    os.utime(photo, ns=(1, 1_234_567_890_123_456_789))
    plan = AltText().plan(str(photo), said(TEXT))
    assert photo.read_bytes() == encoded("JPEG", XMP)
    plan.write()
    found = photo.stat()
    assert (found.st_mode & 0o777, found.st_mtime_ns) == (0o600, 1_234_567_890_123_456_789)
    assert plan.data is not None
    assert found.st_size == len(plan.data)
    assert list(photo.parent.iterdir()) == [photo]


def test_what_changes_between_plan_and_writing_is_not_lost(photo: Path) -> None:
    plan = AltText().plan(str(photo), said(TEXT))
    type_in(photo, x_default="just typed")
    with pytest.raises(OSError, match="changed while it was being captioned"):
        plan.write()
    assert read_alt_text(photo) == "just typed"


def reason(path: Path | str, **record: Any) -> str:
    plan = AltText().plan(str(path), {**said(TEXT), **record})
    assert plan.data is None
    assert plan.kept is not None
    assert "\n" not in plan.kept
    return plan.kept.removeprefix(f"{path}: there is no alt text: ")


def test_files_that_cannot_have_one(tmp_path: Path, photo: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = "only JPEG, PNG, WebP and TIFF can be given one without harm"
    for name in ("x.gif", "x.bmp", "x.jp2", "x.avif"):
        picture().save(tmp_path / name)
        assert reason(tmp_path / name) == other
    big = tmp_path / "big.tif"
    picture().save(big, big_tiff=True)
    assert reason(big) == other
    raw = tmp_path / "x.dng"
    picture().save(raw, "TIFF")
    assert reason(raw) == other
    data = photo.read_bytes()
    for name, content in (
        ("half.jpg", data[:300]),
        ("twice.jpg", data[:2] + data[data.index(b"\xff\xe1", 300) :][:0] + doubled(data)),
        ("empty.jpg", b""),
        ("png.png", encoded("PNG")[:90]),
        ("webp.webp", encoded("WEBP")[:900]),
        ("tiff.tif", encoded("TIFF")[:4] + b"\xff" * 50),
        (
            "bomb.png",
            encoded("PNG", XMP.replace("<x:xmpmeta", '<!DOCTYPE x [<!ENTITY a "b">]><x:xmpmeta', 1)),
        ),
        ("noxml.jpg", encoded("JPEG", "<x:xmpmeta><broken")),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert reason(path)
        assert path.read_bytes() == content
    assert reason("https://example.com/x.jpg") == "the file is on another machine"
    assert reason(tmp_path / "shard.tar::x.jpg") == "the file is in an archive, or gone"
    link = tmp_path / "link.jpg"
    link.symlink_to(photo)
    assert reason(link) == f"{link} is a link, and is kept"
    assert reason(photo, segments=[]) == "videos have no place for it"
    assert reason(photo, caption="") == "nothing was captioned"
    assert photo.read_bytes() == data
    assert capfd.readouterr() == ("", "")


def doubled(data: bytes) -> bytes:
    """What follows a JPEG's first two bytes, its XMP twice."""
    begin = data.index(b"http://ns.adobe.com/xap/1.0/\0") - 4
    end = begin + 2 + int.from_bytes(data[begin + 2 : begin + 4], "big")
    return data[2:end] + data[begin:end] + data[end:]


def test_content_credentials_are_not_broken(tmp_path: Path) -> None:
    signed = "it carries Content Credentials, which a change would break"
    data = encoded("JPEG")
    body = b"JP\0\1\0\0\0\1\0\0\0\x20jumb\0\0\0\x18jumdc2pa"
    (tmp_path / "x.jpg").write_bytes(
        data[:2] + b"\xff\xeb" + struct.pack(">H", len(body) + 2) + body + data[2:]
    )
    assert reason(tmp_path / "x.jpg") == signed
    data = encoded("PNG")
    (tmp_path / "x.png").write_bytes(data[:33] + b"\0\0\0\x04caBXjumb\0\0\0\0" + data[33:])
    assert reason(tmp_path / "x.png") == signed
    data = encoded("WEBP") + b"C2PA\x04\0\0\0jumb"
    (tmp_path / "x.webp").write_bytes(data[:4] + struct.pack("<I", len(data) - 8) + data[8:])
    assert reason(tmp_path / "x.webp") == signed


def test_a_missing_library_is_told_at_once(monkeypatch: pytest.MonkeyPatch, photo: Path) -> None:
    monkeypatch.setattr(metadata.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MetadataError, match=r'pip install "captioner\[metadata\]"'):
        AltText()
    with pytest.raises(MetadataError, match=r'pip install "captioner\[metadata\]"'):
        read_alt_text(photo)


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(MetadataError, match=r"nowhere\.jpg: No such file"):
        read_alt_text(tmp_path / "nowhere.jpg")
    with pytest.raises(MetadataError, match="only JPEG, PNG, WebP and TIFF"):
        read_alt_text(__file__)


def test_planning_brings_no_torch(photo: Path) -> None:
    code = (
        "import sys\nfrom captioner.batch.metadata import AltText\n"
        "print(AltText().plan(sys.argv[1], {'caption': 'x'}).data is None, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(photo)], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False False\n", "")
