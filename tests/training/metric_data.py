"""Captions and references with what is hard about them, files of them, and stand-ins for SPICE."""

import json
import sys

import pytest
from captioner_training import metrics

FAST = ("BLEU", "ROUGE_L", "CIDEr")

REFERENCES = {
    11: ["A man rides a brown horse.", "A person on a horse, in a field!", "the man is riding"],
    3: ["Two dogs run on the grass.", "A couple of dogs are running through grass"],
    7: ["A café with a red sign; people sit outside.", "People at a café", "It's the bus no."],
    20: ["5 children play football", "Kids playing soccer (on a lawn)", "..."],
    5: ["A plate of food 😀 on a table", "Some food on a white plate ||| next to a fork"],
    8: ["A kite in the sky.", "Someone flies a kite on the beach"],
}
GENERATED = {
    3: "two dogs are running on grass",
    11: "a man on a horse ||| in a field",
    7: "People sit at a café.",
    20: "",
    5: "a white plate with food",
    8: "a kite in the sky",  # equal to a reference
}


def coco(references):
    """Return these references in COCO's caption format."""
    pairs = [(key, text) for key, texts in references.items() for text in texts]
    return {
        "images": [{"id": key, "file_name": f"{key}.jpg"} for key in references],
        "annotations": [{"id": n, "image_id": key, "caption": text} for n, (key, text) in enumerate(pairs)],
    }


def results(generated):
    return [{"image_id": key, "caption": text} for key, text in generated.items()]


def write(path, data):
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


FAKE_JAVA = """#!{python}
import json, sys
if "-version" in sys.argv:
    print('openjdk version "{version}" 2099', file=sys.stderr)
elif "{failure}":
    print("Exception in thread \\"main\\" java.lang.Error", file=sys.stderr)
    print("Caused by: {failure}", file=sys.stderr)
    sys.exit(1)
else:
    assert "-cache" not in sys.argv  # it is what fails on Java 16 and later
    given, found = sys.argv[sys.argv.index("spice-1.0.jar") + 1], sys.argv[sys.argv.index("-out") + 1]
    entries = json.load(open(given))
    values = [float(entry["test"] in entry["refs"]) for entry in entries]
    scores = [{{"image_id": e["image_id"], "scores": {{"All": {{"f": v}}}}}} for e, v in zip(entries, values)]
    json.dump(scores[::-1], open(found, "w"))
"""


@pytest.fixture
def spice(tmp_path, monkeypatch):
    """A folder for SPICE's models, with spaces in its path, and a function that sets up Java runtimes."""
    folder = tmp_path / "site packages" / "spice"
    (folder / "lib").mkdir(parents=True)
    library = metrics._pycocoevalcap
    stand_in = type("module", (), {"__file__": str(folder / "get_stanford_models.py")})
    monkeypatch.setattr(
        metrics, "_pycocoevalcap", lambda name: stand_in if name.startswith("spice") else library(name)
    )

    def javas(*failures):
        made = []
        for number, failure in enumerate(failures):
            path = tmp_path / f"java {number}"
            text = FAKE_JAVA.format(python=sys.executable, version=number + 8, failure=failure)
            write(path, text).chmod(0o755)
            made.append(str(path))
        monkeypatch.setattr(metrics, "_javas", lambda: made)

    javas.lib = folder / "lib"
    return javas


def put_models(lib):
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (lib / name).touch()
