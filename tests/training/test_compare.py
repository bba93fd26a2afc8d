"""Comparisons: the grid and its mistakes, equal terms, resuming, runs that fail, the part of the data."""

import json
from pathlib import Path
from typing import Any

import pytest
from captioner_training import compare as comparing
from captioner_training import experiment
from captioner_training.compare import Comparison, compare, make_grid, parse_vary, take_part, with_values
from captioner_training.config import ConfigError, TrainingConfig, load_config
from captioner_training.data import DataError, load_data_set
from captioner_training.report import phrase_data
from shape_data import QuickScorer, make_config, plain_config, stage, write_shapes
from typer.testing import CliRunner

from captioner.captioner import Captioner
from captioner.cli import app

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


class InProcess:
    """A run in this process, which has ended when it is asked."""

    started: list[str] = []  # noqa: RUF012

    def __init__(self, folder: Path) -> None:
        self.started.append(folder.name)
        self.code = 0
        try:
            comparing.train_and_measure(folder)
        except ValueError as error:
            (folder / "log.txt").write_text(f"progress\r\nwarning\n{error}\n")
            self.code = 1

    def poll(self) -> int:
        return self.code

    def terminate(self) -> None:
        raise AssertionError("it has ended")

    def wait(self, timeout: float | None = None) -> int:
        return self.code


def quick(patch: pytest.MonkeyPatch) -> None:
    """Train in this process, score without Java, and follow gradients within the short captions."""
    patch.setattr(experiment, "Scorer", QuickScorer)
    patch.setattr(comparing, "Scorer", QuickScorer)
    patch.setattr(comparing, "_start", InProcess)
    patch.setattr(comparing, "REACH", 4)
    InProcess.started = []


@pytest.fixture
def in_process(monkeypatch) -> None:
    quick(monkeypatch)


GRID = ["decoder.cell=rnn_tanh,lstm", "decoder.attention=none,additive"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory, data, cache) -> tuple[Path, Comparison, list[str]]:
    output, said = tmp_path_factory.mktemp("compared"), []
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        done = compare(
            make_config(), data, output, vary=GRID, seeds=1, jobs=2, cache_folder=cache, say=said.append
        )
    return output, done, said


def results_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


# --------------------------------------------------------------------------------------------------
# the grid


def test_values_are_read_as_in_yaml():
    assert parse_vary(["a.b=rnn_tanh, gru", "c=1,2.5,1e-3,null,true", "d=[1, 2],[3]", 'e="no",bf16']) == {
        "a.b": ["rnn_tanh", "gru"],
        "c": [1, 2.5, 1e-3, None, True],
        "d": [[1, 2], [3]],
        "e": ["no", "bf16"],
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["decoder.cell"], "--vary decoder.cell: expected KEY=VALUE"),
        (["decoder.cell="], "expected KEY=VALUE"),
        (["=lstm"], "expected KEY=VALUE"),
        (["a=[1"], "not values as in YAML"),
        (["a=1", "a=2"], "--vary a is given twice"),
        (["a=1,2,1"], "1 comes twice"),
        (["seed=1,2"], "use --seeds"),
        (["name=a,b"], "--vary name"),
    ],
)
def test_options_that_make_no_grid(options, message):
    with pytest.raises(ConfigError) as caught:
        parse_vary(options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_any_key_can_be_varied():
    config = with_values(
        make_config(),
        {
            "decoder.hidden": 7,
            "stages.0.learning_rate": 0.5,
            "data.sources.shapes.skip_highest": 3,
            "flips": False,
        },
    )
    assert config.decoder is not None
    assert config.decoder.hidden == 7
    assert config.stages[0].learning_rate == 0.5
    assert config.data.sources["shapes"].skip_highest == 3
    assert not config.flips


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("decoder.cel", "lstm", "--vary decoder.cel=lstm: unknown key"),
        ("decodr.cell", "lstm", "--vary decodr.cell: unknown key ('decodr' is not there)"),
        ("decoder.cell.kind", "lstm", "--vary decoder.cell.kind: unknown key"),
        ("stages.1.epochs", 2, "--vary stages.1.epochs: unknown key ('1' is not there)"),
        ("stages.5", {}, "--vary stages.5: unknown key ('5' is not there)"),
        ("decoder.cell", "lsmt", "--vary decoder.cell=lsmt: Input should be 'rnn_tanh'"),
        ("decoder.hidden", "wide", "--vary decoder.hidden=wide: Input should be a valid integer"),
        ("stages.0.average_epochs", 2, "average_epochs needs average: 0"),
    ],
)
def test_keys_and_values_that_cannot_be(key, value, message):
    with pytest.raises(ConfigError) as caught:
        with_values(make_config(), {key: value})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_combination_comes_with_every_seed_and_nothing_else_differs():
    config = make_config()
    runs = make_grid(config, parse_vary(GRID), 3, "")
    assert len(runs) == len({run.key for run in runs}) == 12
    assert [run.seed for run in runs] == [3] * 4 + [4] * 4 + [5] * 4  # whole grids first
    assert [tuple(run.settings.values()) for run in runs[:4]] == [
        ("rnn_tanh", "none"),
        ("rnn_tanh", "additive"),
        ("lstm", "none"),
        ("lstm", "additive"),
    ]
    for run in runs:
        assert run.config.decoder is not None
        assert (run.config.decoder.cell, run.config.decoder.attention) == tuple(run.settings.values())
        undone = run.config.model_dump()
        assert undone.pop("seed") == run.seed
        expected = config.model_dump()
        del expected["seed"]
        for section in (undone, expected):
            del section["name"], section["tensorboard"]
            del section["decoder"]["cell"], section["decoder"]["attention"]
        assert undone == expected


def test_the_name_of_a_run_changes_with_config_and_data():
    def keys(config: TrainingConfig, content: str = "") -> set[str]:
        return {run.key for run in make_grid(config, parse_vary(GRID), 1, content)}

    first = keys(make_config())
    assert keys(make_config()) == first
    assert keys(make_config(name="another")) == first
    assert not keys(make_config([stage(epochs=2)])) & first
    assert not keys(make_config(), "other pictures") & first


def test_values_that_are_possible_only_together():
    vary = parse_vary(["stages.0.average=0.0", "stages.0.average_epochs=2,3"])
    assert len(make_grid(make_config(), vary, 1, "")) == 2
    with pytest.raises(ConfigError, match="average_epochs needs average: 0"):
        make_grid(make_config(), parse_vary(["stages.0.average=0.0,0.9", "stages.0.average_epochs=2"]), 1, "")


def test_the_default_is_the_shipped_config():
    path = comparing.default_config()
    assert path.read_text() == (ROOT / "configs" / "compare.yaml").read_text()
    config = load_config(path)
    runs = make_grid(config, parse_vary(comparing.DEFAULT_VARY), 3, "")
    assert len(runs) == 27
    assert {run.config.decoder.cell for run in runs if run.config.decoder} == {"rnn_tanh", "gru", "lstm"}


# --------------------------------------------------------------------------------------------------
# a comparison


def test_a_comparison_trains_every_combination(compared):
    output, done, said = compared
    assert done == Comparison(output / "report.html", 4, {})
    results = results_of(output)
    assert [tuple(run["settings"].values()) for run in results["runs"]] == [
        ("rnn_tanh", "none"),
        ("rnn_tanh", "additive"),
        ("lstm", "none"),
        ("lstm", "additive"),
    ]
    for run in results["runs"]:
        assert run["seed"] == 3
        assert len(run["epochs"]) == 1
        assert len(run["by_picture"]) == 24
        # "a red circle on a white background" and "red circle on white"
        assert {picture["words"] for picture in run["by_picture"]} == {5.5}
        for when in ("trained", "untrained"):
            assert len(run["gradients"][when]["state"]) == 5
            assert min(run["gradients"][when]["state"]) > 0
    sizes = [run["parameters"]["decoder"] for run in results["runs"]]
    assert sizes == sorted(sizes)
    assert sizes[2] - sizes[0] == 3 * 48 * (24 + 48 + 2) + 33 * 48  # three more gates, and the memory's start
    assert "training: shapes, all 24 pictures with 48 captions, from shapes.json" in said
    assert any("4 runs, 2 at a time" in line for line in said)
    assert "rnn_tanh, additive" in said[-1]


def test_the_report_is_about_these_runs(compared):
    output, _, _ = compared
    page = (output / "report.html").read_text()
    assert "4 of 4 finished" in page
    assert "lstm, additive" in page
    assert "all 24 pictures" in page
    assert {path.name for path in (output / "figures").iterdir()} == {
        *("scores.png", "cost.png", "curves.png", "lengths.png", "gradients.png")
    }


def test_a_run_leaves_a_captioner_and_no_state(compared):
    output, _, _ = compared
    folders = sorted((output / "runs").iterdir())
    assert len(folders) == 4
    for folder in folders:
        assert not (folder / "state.pt").exists()
        assert Captioner.load(folder / "model.safetensors", device="cpu").header.name.startswith("shapes ")


def test_what_is_finished_is_kept(compared, data, cache, in_process, monkeypatch):
    monkeypatch.setattr(comparing, "write_report", lambda *arguments: None)
    output, _, _ = compared
    said: list[str] = []
    lost = next((output / "runs").glob("lstm-none-*"))
    before = results_of(output)["runs"]
    (lost / "result.json").unlink()
    (lost / "log.jsonl").unlink()
    compare(make_config(), data, output, vary=GRID, seeds=1, cache_folder=cache, say=said.append)
    assert InProcess.started == [lost.name]
    assert any("3 of them finished before" in line for line in said)
    after = results_of(output)["runs"]
    assert [run["scores"] for run in after] == [run["scores"] for run in before]  # from the same seed
    assert [run["gradients"] for run in after] == [run["gradients"] for run in before]


def test_nothing_is_trained_if_a_key_is_wrong(tmp_path, data, in_process):
    with pytest.raises(ConfigError, match=r"decoder\.atention: unknown key"):
        compare(make_config(), data, tmp_path, vary=["decoder.cell=gru,lstm", "decoder.atention=dot"])
    assert InProcess.started == []


def test_nothing_is_trained_if_the_data_is_wrong(tmp_path, data, in_process):
    config = plain_config()
    config["data"]["validation"]["shapes_val"]["images"] = ["nowhere"]
    with pytest.raises(DataError, match="nowhere"):
        compare(TrainingConfig.model_validate(config), data, tmp_path, vary=GRID)
    assert InProcess.started == []


# --------------------------------------------------------------------------------------------------
# a part of the data


def test_a_random_part_of_the_data(tmp_path, data):
    config = make_config()
    part = take_part(config, data, tmp_path, 10, 6)
    source, held_out = part.data.sources["shapes"], part.data.validation["shapes_val"]
    chosen = load_data_set("shapes", source, data)
    assert len(chosen) == 10
    assert len(load_data_set("shapes_val", held_out, data)) == 6
    everything = {p.id: p for p in load_data_set("shapes", config.data.sources["shapes"], data).pictures}
    for picture in chosen.pictures:
        assert (picture.file, picture.captions) == (
            everything[picture.id].file,
            everything[picture.id].captions,
        )
        assert picture.file in chosen.store
    ids = [p.id for p in chosen.pictures]
    assert ids not in (list(everything)[:10], list(everything)[-10:])
    again = take_part(config, data, tmp_path / "again", 10, 6).data.sources["shapes"]
    assert [p.id for p in load_data_set("shapes", again, data).pictures] == ids
    other = take_part(make_config(seed=4), data, tmp_path / "other", 10, 6).data.sources["shapes"]
    assert [p.id for p in load_data_set("shapes", other, data).pictures] != ids
    facts = comparing.describe_data(part, data, config)
    assert phrase_data(facts[0]) == (
        "training: shapes, 10 of 24 pictures (drawn at random) with 20 captions, from shapes.json"
    )


def test_no_more_than_there_are(tmp_path, data):
    config = make_config()
    assert take_part(config, data, tmp_path, 24, 0) == config
    assert take_part(config, data, tmp_path, 1000, 1000) == config


def test_part_of_a_source_that_is_cut_already(tmp_path, data):
    plain = plain_config()
    plain["data"]["sources"]["shapes"]["skip_highest"] = 14
    plain["data"]["validation"]["shapes_val"]["only_highest"] = 14
    config = TrainingConfig.model_validate(plain)
    part = take_part(config, data, tmp_path, 5, 0)
    ids = {p.id for p in load_data_set("shapes", part.data.sources["shapes"], data).pictures}
    assert len(ids) == 5
    assert max(ids) < 110
    facts = comparing.describe_data(part, data, config)
    assert phrase_data(facts[0]).startswith(
        "training: shapes, 5 of 24 pictures (without the 14 highest ids, drawn at random)"
    )
    assert phrase_data(facts[1]).startswith(
        "validation: shapes_val, 14 of 24 pictures (those with the highest ids)"
    )


def test_pictures_that_prepare_noted_are_found(tmp_path, data):
    folder = write_shapes(tmp_path / "prepared")
    content = json.loads((folder / "shapes.json").read_text())
    content["info"] = {
        **{"description": "shapes", "split": "train", "partial": False, "missing_pictures": 0},
        "images": ["pictures"],
    }
    (folder / "shapes.json").write_text(json.dumps(content))
    plain = plain_config()
    for section in plain["data"].values():
        for source in section.values():
            del source["images"]
    part = take_part(TrainingConfig.model_validate(plain), folder, tmp_path / "part", 5, 0)
    chosen = load_data_set("shapes", part.data.sources["shapes"], folder)
    assert all(picture.file in chosen.store for picture in chosen.pictures)


# --------------------------------------------------------------------------------------------------
# the command, and processes


def write_config(folder: Path, **changes: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(json.dumps(plain_config(**changes)))  # JSON is YAML
    return path


def test_the_command(tmp_path, data, cache, in_process):
    arguments = [
        *("compare", str(write_config(tmp_path)), "--data", str(data), "--output", str(tmp_path / "out")),
        *("--vary", "decoder.cell=gru,lstm", "--seeds", "1", "--jobs", "1", "--cache", str(cache)),
        *("--pictures", "8", "--validation-pictures", "8"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("training: shapes, 8 of 24 pictures (drawn at random)")
    assert lines[-1] == str(tmp_path / "out" / "report.html")
    assert len(InProcess.started) == 2


@pytest.mark.parametrize(("values", "code"), [("99,0", 1), ("98,99", 2)])
def test_a_run_that_fails_does_not_stop_the_others(tmp_path, data, cache, in_process, values, code):
    arguments = [
        *("compare", str(write_config(tmp_path)), "--data", str(data), "--output", str(tmp_path / "out")),
        *("--vary", f"stages.0.trainable_blocks={values}", "--seeds", "1", "--cache", str(cache)),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code
    assert "99, seed 3 failed: stages.0.trainable_blocks is 99" in result.stderr
    if code == 2:
        assert not (tmp_path / "out" / "report.html").exists()
    else:
        page = (tmp_path / "out" / "report.html").read_text()
        assert "Runs that failed" in page
        assert "99, seed 3: stages.0.trainable_blocks is 99" in page
        assert "1 of 2 finished" in page


def test_a_mistake_is_one_line(tmp_path, data):
    arguments = ["compare", str(write_config(tmp_path)), "--data", str(data), "--output", str(tmp_path / "o")]
    result = CliRunner().invoke(app, [*arguments, "--vary", "decoder.cell=lsmt"])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("captioner: --vary decoder.cell=lsmt: Input should be")


def test_a_process_of_its_own_and_its_last_words(tmp_path, data, cache, monkeypatch):
    monkeypatch.setattr(comparing, "build_features", lambda *arguments: None)
    done = compare(
        make_config(),
        data,
        tmp_path,
        vary=["stages.0.trainable_blocks=99"],
        seeds=1,
        cache_folder=cache,
        say=lambda line: None,
    )
    assert done.report is None
    (reason,) = done.failures.values()
    assert reason.startswith("stages.0.trainable_blocks is 99: efficientnet_lite0 has")
    assert "log.txt" in reason


def test_the_processes_end_when_a_person_interrupts(tmp_path, monkeypatch):
    class Endless:
        def __init__(self, folder: Path) -> None:
            self.ended = False
            processes.append(self)

        def poll(self) -> None:
            if len(processes) == 2:
                raise KeyboardInterrupt

        def terminate(self) -> None:
            self.ended = True

        def wait(self, timeout: float | None = None) -> int:
            assert self.ended
            return -15

    processes: list[Endless] = []
    monkeypatch.setattr(comparing, "_start", Endless)
    runs = make_grid(make_config(), parse_vary(GRID), 1, "")
    with pytest.raises(KeyboardInterrupt):
        list(comparing._train_all(runs, 2, tmp_path, tmp_path, tmp_path, "cpu"))
    assert [process.ended for process in processes] == [True, True]


def test_what_another_process_has_done_meanwhile_is_not_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "_start", None)
    (run,) = make_grid(make_config(), parse_vary(["decoder.cell=gru"]), 1, "")
    folder = tmp_path / "runs" / run.key
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    assert list(comparing._train_all([run], 2, tmp_path, tmp_path, tmp_path, "cpu")) == [(run, None)]


@pytest.mark.slow
def test_processes_of_their_own_train_and_score(tmp_path, data, cache):
    done = compare(make_config(), data, tmp_path, vary=["decoder.cell=gru,lstm"], seeds=1, cache_folder=cache)
    assert done.finished == 2
    for run in results_of(tmp_path)["runs"]:
        assert run["scores"].keys() == {"CIDEr", "METEOR", "BLEU-4"}
        assert run["scores"]["METEOR"] > 0


def test_a_set_that_is_only_partly_there_is_called_partial():
    fact = {
        **{"kind": "training", "name": "mine", "pictures": 5, "of": 5, "captions": 9},
        **{"annotations": "train.json", "how": ""},
    }
    assert "partial" not in phrase_data(fact)
    assert phrase_data({**fact, "partial": True}).endswith("so scores are partial")


def test_the_facts_say_whether_a_set_is_partial(tmp_path):
    folder = write_shapes(tmp_path)
    text = json.loads((folder / "shapes.json").read_text())
    config = make_config()
    assert [fact["partial"] for fact in comparing.describe_data(config, folder, config)] == [False, False]
    (folder / "shapes.json").write_text(json.dumps({**text, "info": {"partial": True}}))
    assert [fact["partial"] for fact in comparing.describe_data(config, folder, config)] == [True, True]
