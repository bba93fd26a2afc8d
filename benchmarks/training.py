"""Training speed over cached features, in the shape of the built-in model, with one thread.

8 x 8 cells of 1,280 numbers, projected to 512; attention 256, LSTM 512, embedding 300, 4,675 words; batches
of 32 pictures with 5 captions each, 3 to 22 tokens long, about 12 in the mean, as Flickr8k's are. A step is
forward, loss, backward, clipping, AdamW and the moving average of the weights, as in the training loop.
Beside it stand, in one process and in turn, on the same batches:

floor: the matrix products of a step and nothing else, into memory that is already there. Each linear map
    counts with its product and its two gradient products, in the shapes that the step has. Once for each
    picture: cells and keys (the features need no gradient). Once for each caption: the initial state. Once,
    for all words that are not padding: words to gates, the two output layers, the vocabulary. At each step,
    with as many rows as captions still run: query, gate, energies (without the outer product before their
    tanh), context, context to gates, state to gates. The gradient of the cells counts as one product.
plain loop: the same parameters and loss in the way of tutorials: features repeated for each caption, keys
    made anew at every step, ended captions go on as padding, logits of all rows at every step. Its loss is
    compared with ours first, without dropout. Bar: ours makes at least 3 times as many captions a second.
    It gains from `keep_memory` too, which the whole process obeys.

Then the training loop itself runs over a feature cache of generated photos, on the same core as the thread
that makes its batches. Bar: it waits for them at most 3 % of the time. With ``--compile`` steps are compiled
as well.

On a GPU, ``--device cuda --steps 1000`` runs the training loop for at least so many steps in bfloat16, with
and without compiled steps, kills and resumes each run once, and prints pictures a second, utilisation and
memory. ``--config configs/coco_resnet101.yaml --data DATA`` takes the first stage of a recipe and the
pictures at hand, repeated until there are enough.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common

_VOCABULARY = 4675
_CAPTIONS = 5


def main() -> int:
    """Run it; return 0 if the bars hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu (all of the above), cuda (the training loop)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--pictures", type=int, default=256, help="generated photos for the training loop")
    parser.add_argument("--encoder", default="efficientnet_lite2", help="of the training loop, at 256 pixels")
    parser.add_argument("--steps", type=int, help="of the training loop; 24, or 1000 on a GPU, if left out")
    parser.add_argument("--compile", action="store_true", help="compile the steps too; needs a C++ compiler")
    parser.add_argument("--config", type=Path, help="a recipe for the training loop, with --data")
    parser.add_argument("--data", type=Path, help="its data folder")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # one run of the training loop
    options = parser.parse_args()
    if (options.config is None) != (options.data is None):
        parser.error("--config and --data belong together")
    if options.run is not None:
        watched(json.loads(options.run.read_text(encoding="utf-8")))
        return 0
    on_cpu = options.device == "cpu"
    if on_cpu:
        common.take_cores(1)

    import torch

    if on_cpu:
        torch.set_num_threads(1)
    common.print_machine(torch.get_num_threads())
    load = " ".join(f"{n:.1f}" for n in os.getloadavg())
    print(f"load of the machine (1, 5, 15 minutes): {load}", flush=True)
    if on_cpu:
        return 0 if step_speed(options.repeats, options.compile) & loop_waits(options) else 1
    print(f"device: {torch.cuda.get_device_name(options.device)}")
    for compiled in (False, True):
        resumed_run(options, compiled)
    return 0


# --------------------------------------------------------------------------------------------------
# One step


def step_speed(repeats: int, compiled: bool) -> bool:
    """Time training steps, the floor and the plain loop; return whether the bar holds."""
    import torch
    from captioner_training.allocator import keep_memory
    from captioner_training.batches import Batch
    from captioner_training.config import LossConfig, StageConfig
    from captioner_training.loop import compiled as compile_steps
    from captioner_training.loop import objective
    from captioner_training.optimisation import Average, build_optimiser

    from captioner.decoder import DecoderConfig
    from captioner.encoder import Encoder
    from captioner.model import CaptionModel
    from captioner.tokenizer import WordTokenizer

    keep_memory()
    torch.manual_seed(0)
    encoder = Encoder("efficientnet_lite2")
    encoder.freeze(0)
    model = CaptionModel(encoder, DecoderConfig(), WordTokenizer(words()))
    stage = StageConfig(name="captions", sources={"random": 1}, epochs=1, learning_rate=1e-3)
    loss_config = LossConfig()
    batches = random_batches(2, stage, encoder.width)
    experiment: Any = SimpleNamespace(model=model, words={}, config=SimpleNamespace(loss=loss_config))
    loss_of = objective(experiment, stage, (encoder.width, 8, 8))
    optimiser = build_optimiser(model, stage)
    average = Average(model, stage.average)

    def train(loss: Callable[[Batch], torch.Tensor]) -> None:
        for batch in batches:
            optimiser.zero_grad(set_to_none=True)
            loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(average.parameters, stage.clip)
            optimiser.step()
            average.update()

    def ours(batch: Batch) -> torch.Tensor:
        return loss_of(batch, 0.0)[0]

    def plain(batch: Batch) -> torch.Tensor:
        return plain_loss(model, batch, loss_config.label_smoothing)

    model.eval()
    with torch.no_grad():
        pairs = [(float(ours(batch)), float(plain(batch))) for batch in batches]
    print(f"losses of ours and the plain loop: {', '.join(f'{a:.6f} {b:.6f}' for a, b in pairs)}")
    if any(abs(a - b) > 1e-4 * abs(b) for a, b in pairs):
        raise SystemExit("they are not the same: nothing to compare")
    model.train()

    captions = sum(len(batch.lengths) for batch in batches)
    tokens = sum(int(batch.lengths.sum()) for batch in batches)
    longest = max(int(batch.lengths[0]) for batch in batches)
    print(
        f"{len(batches)} batches of 32 pictures and {captions // len(batches)} captions, "
        f"{tokens / captions:.1f} tokens in the mean, {longest} at most"
    )
    floors = [products(model, batch) for batch in batches]
    spent: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> Callable[[], None]:
        def measure() -> None:
            begun = time.process_time()
            work()
            spent.setdefault(name, []).append(time.process_time() - begun)

        return measure

    def compiled_steps() -> None:
        with compile_steps(model, True):
            train(ours)

    work: dict[str, Callable[[], object]] = {
        "ours": lambda: train(ours),
        "floor": lambda: [product() for floor in floors for product in floor],
        "plain loop": lambda: train(plain),
    }
    if compiled:
        compiled_steps()  # compiles
        if "unrolled_step" not in compiled_names(model):
            raise SystemExit("the training loop does not compile unrolled_step: nothing to measure")
        work["ours, compiled"] = compiled_steps
    seconds = common.in_turn({name: timed(name, one) for name, one in work.items()}, repeats)
    cpu = {name: values[1:] for name, values in spent.items()}
    for name, values in seconds.items():
        rate, low, high = (captions / f(values) for f in (statistics.median, max, min))
        own = captions / statistics.median(cpu[name])
        print(f"  {name:<16}{rate:7.1f} captions/s  ({low:.1f} to {high:.1f}; {own:.1f} in CPU time)")
    for name in (n for n in work if n.startswith("ours")):
        wall, own = (common.ratio(s[name], s["floor"]) for s in (seconds, cpu))
        print(f"{name} : floor, time: {wall:.3g} ({own:.3g} in CPU time)")
    if compiled:
        wall, own = (common.ratio(s["ours"], s["ours, compiled"]) for s in (seconds, cpu))
        print(f"compiled : not compiled, captions/s: {wall:.3g} ({own:.3g} in CPU time)")
    own = common.ratio(cpu["plain loop"], cpu["ours"])
    print(f"ours : plain loop, captions per second of CPU time: {own:.3g}")
    return common.verdict(
        "ours : plain loop, captions/s", common.ratio(seconds["plain loop"], seconds["ours"]), at_least=3
    )


def compiled_names(model: Any) -> set[str]:
    """Return which of the decoder's methods the training loop compiles."""
    from captioner_training.loop import compiled

    with compiled(model, True):
        return set(vars(model.decoder))


def words() -> list[str]:
    """Return as many words as the built-in model knows beside the special tokens."""
    from captioner.tokenizer import SPECIAL

    letters = "abcdefghijklmnopqrstuvwxyz"
    numbers = range(_VOCABULARY - len(SPECIAL))
    return ["w" + "".join(letters[n // 26**k % 26] for k in range(3)) for n in numbers]


def caption_length(chance: random.Random) -> int:
    """Draw a caption's tokens, its end included: Flickr8k's mean and spread."""
    return min(22, max(3, round(chance.gauss(11.8, 3.65))))


def random_batches(count: int, stage: Any, width: int) -> list[Any]:
    """Return batches as the training loop makes them, of random features and captions."""
    import torch
    from captioner_training.batches import make_parts

    from captioner.tokenizer import END, SPECIAL

    chance = random.Random(0)
    pictures = count * stage.batch_pictures

    def caption() -> list[int]:
        return [*chance.choices(range(len(SPECIAL), _VOCABULARY), k=caption_length(chance) - 1), END]

    def read(indices: Sequence[int], variants: Sequence[int], **options: Any) -> torch.Tensor:
        return torch.relu(torch.randn(len(indices), 64, width))

    def mask(indices: Sequence[int], variants: Sequence[int] | None = None) -> torch.Tensor:
        return torch.ones(len(indices), 64)

    features: Any = SimpleNamespace(variants=2, read=read, mask=mask)
    targets = {"random": [[caption() for _ in range(_CAPTIONS)] for _ in range(pictures)]}
    places = [("random", i) for i in range(pictures)]
    size = stage.batch_pictures
    return [
        make_parts(
            places[i * size : (i + 1) * size], targets, {"random": features}, stage, str(i), flips=True
        )[0]
        for i in range(count)
    ]


def plain_loss(model: Any, batch: Any, smoothing: float) -> Any:
    """Return the loss of a batch in the way of tutorials."""
    import torch
    import torch.nn.functional as F

    from captioner.decoder import Memory
    from captioner.tokenizer import PAD

    decoder = model.decoder
    features, mask = batch.features[batch.picture], batch.mask[batch.picture]
    cells = decoder.dropout(torch.relu(decoder.project(features)))
    tokens = batch.tokens
    state = decoder.start(Memory(cells, None, mask))
    logits = []
    for t in range(tokens.shape[1] - 1):
        keys = decoder.attention.prepare(cells)
        step = decoder.step(tokens[:, t], state, Memory(cells, keys, mask))
        state = step.state
        logits.append(decoder.logits(step.output))
    return F.cross_entropy(
        torch.stack(logits, 1).flatten(0, 1),
        tokens[:, 1:].flatten(),
        ignore_index=PAD,
        label_smoothing=smoothing,
    )


def products(model: Any, batch: Any) -> list[Callable[[], object]]:
    """Return the floor of a step, as calls of one matrix product each; see above for what counts."""
    import torch

    config = model.decoder.config
    counts = batch.lengths.tolist()
    running = [sum(n > t for n in counts) for t in range(counts[0])]
    pictures, cells, width = batch.features.shape
    gates = 4 * config.hidden
    work: list[Callable[[], object]] = []

    def linear(rows: int, inputs: int, outputs: int, *, to_input: bool = True) -> None:
        x, weight, gradient = (torch.randn(*s) for s in ((rows, inputs), (outputs, inputs), (rows, outputs)))
        y, to_x, to_weight = (torch.empty(*t.shape) for t in (gradient, x, weight))
        work.append(lambda: torch.mm(x, weight.T, out=y))
        if to_input:
            work.append(lambda: torch.mm(gradient, weight, out=to_x))
        work.append(lambda: torch.mm(gradient.T, x, out=to_weight))

    def batched(*shapes: tuple[int, int, int]) -> None:
        a, b = (torch.randn(*shape) for shape in shapes)
        y = torch.empty(a.shape[0], a.shape[1], b.shape[2])
        work.append(lambda: torch.bmm(a, b, out=y))

    linear(pictures * cells, width, config.cells, to_input=False)
    linear(pictures * cells, config.cells, config.attention_width)
    linear(len(counts), config.cells, 2 * config.hidden)
    everything = sum(counts)
    linear(everything, config.embedding, gates)
    linear(everything, config.hidden, config.embedding)
    linear(everything, config.cells, config.embedding)
    linear(everything, config.embedding, _VOCABULARY)
    for rows in running:
        linear(rows, config.hidden, config.attention_width)
        linear(rows, config.hidden, 1)
        linear(rows * cells, config.attention_width, 1, to_input=False)
        batched((rows, 1, cells), (rows, cells, config.cells))
        batched((rows, 1, config.cells), (rows, config.cells, cells))
        linear(rows, config.cells, gates)
        linear(rows, config.hidden, gates)
    batched((len(counts), cells, len(running)), (len(counts), len(running), config.cells))
    return work


# --------------------------------------------------------------------------------------------------
# The training loop


def loop_waits(options: argparse.Namespace) -> bool:
    """Run the training loop on the CPU and print how long it waits; return whether the bar holds."""
    holds = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, data, _ = described(options, folder, options.steps or 24)
        for compiled in (False, True) if options.compile else (False,):
            told = run(folder, config, data, "cpu", compiled=compiled, output=folder / f"run-{compiled}")
            waits, works = told["waits"], told["works"]
            whole = sum(waits) + sum(works)
            print(
                f"training loop{', compiled' if compiled else ''}: {len(works)} steps of "
                f"{told['pictures'] / len(works):.0f} pictures, {told['pictures'] / whole:.1f} pictures/s; "
                f"a step {1000 * statistics.median(works):.0f} ms, its batch is made in "
                f"{1000 * statistics.median(told['preparing']):.0f} ms beside it, it "
                f"waits {1000 * statistics.median(waits):.2f} ms (longest: {1000 * max(waits):.0f} ms)"
            )
            holds &= common.verdict("share of the time spent waiting", sum(waits) / whole, at_most=0.03)
    return holds


def resumed_run(options: argparse.Namespace, compiled: bool) -> None:
    """Train in bfloat16, die in the second of two epochs, go on, and print figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, data, per_epoch = described(options, folder, options.steps or 1000)
        config["mixed_precision"] = "bf16"
        output, device = folder / "run", options.device
        kill_after = max(per_epoch + 1, per_epoch * 3 // 2)
        first = run(folder, config, data, device, compiled=compiled, output=output, kill_after=kill_after)
        second = run(folder, config, data, device, compiled=compiled, output=output)
        lines = (output / "log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [record for record in map(json.loads, lines) if "loss" in record]
    print(f"\nbfloat16{', compiled' if compiled else ''}: killed after {len(first['works'])} steps, resumed")
    for what, told in (("before", first), ("after", second)):
        warm = 20 if len(told["works"]) > 40 else 1  # the first steps compile, or choose kernels
        seconds = sum(told["waits"][warm:]) + sum(told["works"][warm:])
        rate = told["sizes"][warm:]
        parts = [
            f"{len(told['works'])} steps",
            f"{sum(rate) / seconds:.1f} pictures/s",
            f"waiting {100 * sum(told['waits'][warm:]) / seconds:.1f} % of the time",
            f"the first {warm} steps {sum(told['works'][:warm]):.1f} s",
            f"utilisation {statistics.mean(told['utilisation']):.0f} %" if told["utilisation"] else "",
            f"memory {told['memory'] / 2**30:.2f} GiB at most" if told["memory"] else "",
        ]
        print(f"  {what}: {', '.join(p for p in parts if p)}")
    losses = ", ".join(f"{record['epoch']}: {record['loss']:.4f}" for record in log)
    print(f"  losses of the epochs: {losses}", flush=True)


def described(options: argparse.Namespace, folder: Path, steps: int) -> tuple[dict[str, Any], Path, int]:
    """Return a config of two epochs with at least so many steps, its data folder, and the steps of each."""
    if options.config is not None:
        from captioner_training.config import load_config
        from captioner_training.data import load_data_set

        loaded = load_config(options.config)
        stage = loaded.stages[0]
        pictures = sum(
            times * len(load_data_set(name, loaded.data.sources[name], options.data))
            for name, times in stage.sources.items()
        )
        config = loaded.model_dump(mode="json", exclude_defaults=True)
        data = options.data.resolve()
    else:
        pictures, data = options.pictures, folder / "data"
        write_data(data, pictures)
        config = {
            "name": "speed",
            "data": {
                "sources": {"photos": {"annotations": "train.json", "images": ["."]}},
                "validation": {"few": {"annotations": "val.json", "images": ["."]}},
            },
            "encoder": {"name": options.encoder, "size": 256, "pretrained": False},
            "tokenizer": {"min_count": 1},
            "search": {"beam": 1, "max_length": 5},
            "stages": [{"name": "captions", "sources": {"photos": 1}, "epochs": 1, "learning_rate": 1e-3}],
        }
    stage_dict = config["stages"][0]
    batch = stage_dict.get("batch_pictures", 32)
    times = math.ceil(steps / 2 * batch / pictures)
    stage_dict["sources"] = {name: n * times for name, n in stage_dict["sources"].items()}
    stage_dict["epochs"] = 2
    stage_dict["patience"] = 0
    config |= {"stages": [stage_dict], "tensorboard": False, "save_minutes": 60.0}
    return config, data, math.ceil(times * pictures / batch)


def write_data(folder: Path, count: int) -> None:
    """Write photos with captions of random words, and four of them for validation."""
    folder.mkdir()
    paths = common.write_photos(folder, count)
    chance = random.Random(0)
    known = words()
    stream = (word for _ in cycle([0]) for word in chance.sample(known, len(known)))
    images = [{"id": i, "file_name": path.name} for i, path in enumerate(paths)]
    captions = [
        {"image_id": i, "caption": " ".join(next(stream) for _ in range(caption_length(chance) - 1))}
        for i in range(count)
        for _ in range(_CAPTIONS)
    ]
    shutil.copy(paths[0], folder / "held_out.jpg")
    held_out = {
        "images": [{"id": 0, "file_name": "held_out.jpg"}],
        "annotations": [{"image_id": 0, "caption": "one two three"}],
    }
    for name, content in (("train", {"images": images, "annotations": captions}), ("val", held_out)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def run(
    folder: Path,
    config: dict[str, Any],
    data: Path,
    device: str,
    *,
    compiled: bool,
    output: Path,
    kill_after: int | None = None,
) -> dict[str, Any]:
    """Train in a process of its own, which dies after so many steps, and return what it measured."""
    path, told_path = folder / "job.json", folder / "told.json"
    job = {
        "config": config | {"compile": compiled},
        "data": str(data),
        "device": device,
        "output": str(output),
        "cache": str(folder / "cache"),
        "kill_after": kill_after,
        "told": str(told_path),
    }
    path.write_text(json.dumps(job), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, __file__, "--run", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode != (0 if kill_after is None else -signal.SIGKILL):
        raise SystemExit(f"training ended with {done.returncode}:\n{done.stderr[-3000:]}")
    told: dict[str, Any] = json.loads(told_path.read_text(encoding="utf-8"))
    told["pictures"] = sum(told["sizes"])
    return told


def watched(job: dict[str, Any]) -> None:
    """Train, and write down how long each step takes and how long the loop waits for the next batch."""
    import torch
    from captioner_training import loop
    from captioner_training.config import TrainingConfig

    from captioner.parallel import ahead

    told: dict[str, Any] = {k: [] for k in ("waits", "works", "sizes", "preparing", "utilisation")}
    told["memory"] = 0
    cuda = torch.device(job["device"]).type == "cuda"
    busy = threading.Event()
    if not cuda:
        torch.set_num_threads(1)

    def timed(work: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def prepare(item: Any) -> Any:
            begun = time.perf_counter()
            result = work(item)
            told["preparing"].append(time.perf_counter() - begun)
            return result

        return prepare

    def write() -> None:
        if cuda:
            torch.cuda.synchronize()
            told["memory"] = torch.cuda.max_memory_allocated()
        Path(job["told"]).write_text(json.dumps(told), encoding="utf-8")

    def watching(work: Callable[[Any], Any], items: Sequence[Any], **options: Any) -> Iterator[Any]:
        batches = ahead(timed(work), items, **options)
        for item in items:
            begun = time.perf_counter()
            parts = next(batches)
            ready = time.perf_counter()
            busy.set()
            yield parts
            told["waits"].append(ready - begun)
            told["works"].append(time.perf_counter() - ready)
            told["sizes"].append(len(item[1]))
            if len(told["works"]) == job["kill_after"]:
                write()
                os.kill(os.getpid(), signal.SIGKILL)
        busy.clear()

    def look() -> None:
        query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        while True:
            time.sleep(1)
            if busy.is_set():
                done = subprocess.run(query, capture_output=True, text=True, check=False)
                if done.returncode == 0:
                    told["utilisation"].append(float(done.stdout.splitlines()[torch.cuda.current_device()]))

    if cuda and shutil.which("nvidia-smi"):
        threading.Thread(target=look, daemon=True).start()
    vars(loop)["ahead"] = watching
    config = TrainingConfig.model_validate(job["config"])
    loop.train(
        config,
        Path(job["data"]),
        Path(job["output"]),
        cache_folder=Path(job["cache"]),
        device=job["device"],
        processes=1,
    )
    write()


if __name__ == "__main__":
    sys.exit(main())
