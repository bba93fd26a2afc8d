"""Configs: strict, and every shipped one loads; the documentation names every key with its default."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from captioner_training import config as configs
from captioner_training.compare import make_grid
from captioner_training.config import ConfigError, TrainingConfig, load_config
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from shape_data import plain_config, stage

from captioner.decoder import Decoder, DecoderConfig
from captioner.frame_encoder import FrameConfig

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


def written(folder: Path, config: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return path


def changed(key: str, value: object) -> dict[str, Any]:
    """Return the plain config with one value, at a dotted key, replaced or added."""
    config = plain_config()
    *parents, last = key.split(".")
    place: Any = config
    for parent in parents:
        place = place[int(parent)] if isinstance(place, list) else place.setdefault(parent, {})
    place[last] = value
    return config


def mistake(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_every_shipped_config_is_found():
    photos = {"builtin", "small", "coco_resnet101", "flickr30k", "compare"}
    clips = {"msvd", "msvd_fine_tuned", "msrvtt", "msrvtt_fine_tuned", "compare_frames"}
    assert {path.stem for path in SHIPPED} >= photos | clips


@pytest.mark.parametrize("name", ["msvd", "msvd_fine_tuned", "msrvtt", "msrvtt_fine_tuned"])
def test_each_frame_encoder_is_a_value_away(name):
    """Frozen and fine-tuned, on both sets: what the configs' heads tell people to vary."""
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert config.stages[0].trainable_blocks == 0
    assert any(stage.trainable_blocks for stage in config.stages) == name.endswith("fine_tuned")
    grid = {"video.cell": ["none", "gru", "lstm"], "video.bidirectional": [False, True]}
    frames = "start.frames" if config.start else "decoder.frames"
    runs = make_grid(config, {**grid, frames: ["joint", "factorised", "mean"]}, 1, "")
    shapes = [(run.config.video.build(), with_frames_of(run.config)) for run in runs]
    assert len(set(shapes)) == len(runs) == 5 * 3
    kinds = {None if s is None else (s.cell, s.bidirectional) for s, _ in shapes}
    assert kinds == {None, *((c, b) for c in ("gru", "lstm") for b in (False, True))}


def with_frames_of(config):
    return config.start.frames if config.start else config.decoder.frames


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_loads_and_its_decoder_builds(path):
    config = load_config(path)
    if config.start is not None:
        assert config.decoder is None
        return
    decoder = config.decoder.build(concepts=20, styles=1)
    assert isinstance(decoder, DecoderConfig)
    assert decoder.to_dict() == {**config.decoder.model_dump(), "concepts": 20, "styles": 1}
    Decoder(decoder, 1280, 50)


def test_what_is_left_out_has_the_library_s_defaults(tmp_path):
    plain = plain_config()
    del plain["decoder"], plain["loss"], plain["search"], plain["tokenizer"]
    config = load_config(written(tmp_path, plain))
    assert config.decoder is None
    assert configs.DecoderSection().build() == DecoderConfig()
    assert config.search.beam == 3
    assert config.stages[0].clip == 5.0


@pytest.mark.parametrize(
    "key",
    [
        "sede",
        "data.souces",
        "data.sources.shapes.image",
        "data.validation.shapes_val.skip",
        "encoder.sise",
        "tokenizer.mincount",
        "decoder.hiden",
        "loss.smoothing",
        "stages.0.epoch",
        "video.every",
        "search.beams",
    ],
)
def test_an_unknown_key_is_named(tmp_path, key):
    assert mistake(written(tmp_path, changed(key, 1))) == f"{key}: unknown key"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 5),
        ("seed", "one"),
        ("seed", 1.5),
        ("seed", -1),
        ("seed", 2**63),
        ("name", " "),
        ("save_minutes", float("inf")),
        ("search.length_penalty", float("nan")),
        ("flips", 1),
        ("flips", "yes"),
        ("save_minutes", 0),
        ("data.sources", ["shapes"]),
        ("data.sources.shapes.images", "pictures"),
        ("data.sources.shapes.skip_highest", -1),
        ("encoder.name", "efficientnet_lite9"),
        ("mixed_precision", "fp8"),
        ("crops", -1),
        ("stages.0.objective", "reinforce"),
        ("stages.0.samples", 1),
        ("stages.0.scheduled_sampling", 1.5),
        ("stages.0.schedule", "linear"),
        ("stages.0.clip_value", 0.0),
        ("encoder.size", 16),
        ("encoder.size", 64.0),
        ("encoder.fit", "stretch"),
        ("tokenizer.kind", "characters"),
        ("tokenizer.min_count", 0),
        ("decoder.cell", "LSTM"),
        ("decoder.attention", "soft"),
        ("decoder.hidden", "512"),
        ("decoder.hidden", 0),
        ("decoder.gate", "true"),
        ("decoder.dropout", 1.0),
        ("loss.label_smoothing", 1.0),
        ("loss.reduction", "mean"),
        ("loss.doubly_stochastic", -0.1),
        ("decoder.frames", "all"),
        ("decoder.frame_attention_width", 0),
        ("video.frames", 0),
        ("video.frames", 16.0),
        ("video.cell", "GRU"),
        ("video.over", "regions"),
        ("video.width", 0),
        ("video.positions", -1),
        ("video.bidirectional", 1),
        ("video", None),
        ("stages", []),
        ("stages.0.sources", {}),
        ("stages.0.sources.shapes", 0),
        ("stages.0.epochs", True),
        ("stages.0.epochs", 1.0),
        ("stages.0.learning_rate", "fast"),
        ("stages.0.learning_rate", 0),
        ("stages.0.warmup", 1.1),
        ("stages.0.average", 1.0),
        ("stages.0.clip", 0),
        ("search.beam", 0),
        ("search.length_penalty", None),
    ],
)
def test_a_wrong_value_is_named(tmp_path, key, value):
    assert re.match(rf"{re.escape(key)}: \S", mistake(written(tmp_path, changed(key, value))))


def test_a_missing_key_is_named(tmp_path):
    plain = plain_config()
    del plain["stages"][0]["epochs"]
    assert mistake(written(tmp_path, plain)) == "stages.0.epochs: Field required"


def test_several_mistakes_are_told_at_once(tmp_path):
    plain = changed("decoder.hiden", 5)
    plain["stages"][0]["epochs"] = 0
    message = mistake(written(tmp_path, plain))
    assert "decoder.hiden: unknown key" in message
    assert "stages.0.epochs: " in message


def test_a_stage_must_name_sources_that_exist(tmp_path):
    plain = plain_config([stage(), stage(name="second", sources={"shapes": 1, "photos": 2})])
    message = mistake(written(tmp_path, plain))
    assert "stages.1.sources" in message
    assert "'photos'" in message


def test_there_must_be_something_to_validate_on(tmp_path):
    plain = plain_config()
    plain["data"]["validation"] = {}
    assert "data.validation" in mistake(written(tmp_path, plain))


def test_what_reads_no_frames_reads_them_in_no_direction(tmp_path):
    message = mistake(written(tmp_path, changed("video.bidirectional", True)))
    assert message.startswith("video: bidirectional needs a cell")


def test_without_attention_there_is_nothing_to_factorise(tmp_path):
    plain = changed("decoder.frames", "factorised")
    plain["decoder"]["attention"] = "none"
    message = mistake(written(tmp_path, plain))
    assert message == "decoder: frames: factorised needs an attention within each frame, additive or dot"


def test_the_frame_encoder_is_the_library_s(tmp_path):
    plain = changed("video", {"frames": 8})
    assert load_config(written(tmp_path, plain)).video.build() is None
    plain["video"].update(cell="lstm", bidirectional=True, over="frames", width=12, positions=3)
    config = load_config(written(tmp_path, plain)).video
    assert config.build() == FrameConfig("lstm", True, "frames", 12, 3)
    assert configs.VideoSection(positions=4).build() == FrameConfig(positions=4)
    assert configs.VideoSection(cell="gru").build() == FrameConfig(cell="gru")  # the same defaults


def test_numbers_may_be_written_with_an_exponent(tmp_path):
    """YAML 1.1 takes 1e-3 for text."""
    text = yaml.safe_dump(changed("stages.0.learning_rate", 123.0))
    for number, value in (("1e-3", 1e-3), ("2.5e-4", 2.5e-4), ("1E2", 100.0), (".5e+1", 5.0)):
        path = written(tmp_path, text.replace("123.0", number))
        assert load_config(path).stages[0].learning_rate == value


def test_a_key_that_stands_twice_is_an_error(tmp_path):
    message = mistake(written(tmp_path, yaml.safe_dump(plain_config()) + "\nseed: 5\n"))
    assert "'seed'" in message
    assert "twice" in message


@pytest.mark.parametrize(
    "text", ["? [a, b]\n: 1\n", "name: 2020-13-45\n", "[" * 3000, f"seed: {'9' * 5000}\n"]
)
def test_odd_yaml_is_one_line_that_names_the_file(tmp_path, text):
    assert mistake(written(tmp_path, text)).startswith("not YAML: ")


def test_a_search_that_cannot_be_is_refused_before_training(tmp_path):
    """It would run for the first time after the first epoch."""
    assert (
        mistake(written(tmp_path, changed("search.beam", 1001)))
        == "search: beam must be from 1 to 1000, not 1001"
    )


def test_a_tokenizer_of_another_kind_cannot_be_given_with_start(tmp_path):
    config = plain_config()
    del config["encoder"], config["decoder"]
    config.update(start={"model": "built-in"}, tokenizer={"kind": "bpe"})
    assert "tokenizer.kind cannot be given with start" in mistake(written(tmp_path, config))


def test_anchors_and_merges_work(tmp_path):
    text = yaml.safe_dump(plain_config([stage()]))
    text = text.replace("stages:\n- ", "stages:\n- &first\n  ") + "- <<: *first\n  name: second\n"
    text = re.sub(r"(stages:\n(?:.*\n)*?)((?:\w+:.*\n(?: .*\n)*)*)(- <<: .*\n.*\n)", r"\1\3\2", text)
    config = load_config(written(tmp_path, text))
    assert [s.name for s in config.stages] == ["first", "second"]
    assert config.stages[0].learning_rate == config.stages[1].learning_rate


@pytest.mark.parametrize("text", ["a: [", "- a\n- b", "just words", "", "a: \x00"])
def test_what_is_no_config_is_one_line(tmp_path, text):
    assert mistake(written(tmp_path, text))


def test_a_missing_file_is_one_line(tmp_path):
    assert "No such file" in mistake(tmp_path / "mine.yaml")


def test_a_folder_is_one_line(tmp_path):
    (tmp_path / "mine.yaml").mkdir()
    assert mistake(tmp_path / "mine.yaml")


def test_a_file_that_is_not_text_is_one_line(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    assert mistake(tmp_path / "mine.yaml")


def sections() -> dict[str, type[BaseModel]]:
    return {
        "": TrainingConfig,
        "data.": configs.DataConfig,
        "data.sources.NAME.": configs.SourceConfig,
        "start.": configs.StartConfig,
        "encoder.": configs.EncoderConfig,
        "tokenizer.": configs.TokenizerConfig,
        "decoder.": configs.DecoderSection,
        "video.": configs.VideoSection,
        "concepts.": configs.ConceptsConfig,
        "loss.": configs.LossConfig,
        "stages[].": configs.StageConfig,
        "search.": configs.SearchConfig,
    }


def test_no_section_is_forgotten_here():
    strict = {
        value
        for value in vars(configs).values()
        if isinstance(value, type) and issubclass(value, BaseModel) and value.model_config.get("strict")
    }
    assert strict - {configs._Strict} == set(sections().values())


def test_the_documentation_names_every_key_with_its_default():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([^`]+)` \| ([^|]+?) \|", text, re.MULTILINE))
    expected = {}
    for prefix, section in sections().items():
        for name, field in section.model_fields.items():
            if isinstance(field.default, BaseModel):
                continue  # a section of its own
            if field.default is PydanticUndefined:
                expected[prefix + name] = "required"
            else:
                expected[prefix + name] = field.default
    for name in ("data", "start", "encoder", "decoder", "concepts"):  # sections too, whose keys have rows
        del expected[name]
    assert rows.keys() == expected.keys()
    for key, default in expected.items():
        if default == "required":
            assert rows[key] == "required", key
        else:
            assert yaml.load(rows[key].strip("`"), configs._Loader) == default, key
