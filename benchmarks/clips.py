"""A segment of a video: what to make of its frames, if nothing was ever trained on video?

Captioned videos are rare; photos with several human captions are not. So clips are made of photos: ten
frames of a slow pan and zoom, of half to all of the photo's area, two of them blurred. A harder kind has two
frames at an end that do not belong: another photo's (a cut that was missed), or nearly black (a fade). The
photo's own captions judge what is said of the clip, as in COCO's evaluation.

Compared: attention over all frames at once (joint), uniform over frames (factorised), to the mean over time;
the first two without frames that look like no others; the middle frame alone, and every frame alone; and
choosing among captions: by how probable all frames find them (agreement), by how well they fit each other
(consensus), or by their confidence. Costs are relative to encoding the frames, which all but the middle frame
need.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

if TYPE_CHECKING:
    from captioner_training.data import DataSet
    from captioner_training.metrics import Scorer, Scores

    from captioner import Caption, Captioner
    from captioner.encoder import GridFeatures

FRAMES = 10
SPOILED = 2
"""Frames of a harder clip that do not belong."""

KINDS = ("pans and zooms", "harder")
N_BEST = 4
FEW = (2, 5, 8)
"""The frames of which the cheap choice hears the captions."""

ODD = 0.5
"""A frame is odd if it is less like the others than this share of what is usual."""

AVERAGE = "each frame alone, average"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; there is no bar."""
    parser = common.arguments(__doc__)
    common.add_sources(parser)
    parser.add_argument("--pictures", type=common.positive, default=300, help="of each data set, at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timed", type=common.positive, default=20, help="clips that costs are taken from")
    parser.add_argument("--no-meteor", action="store_true", help="leave METEOR out, which takes a minute")
    parser.add_argument("--save", type=Path, help="write all captions there, a line of JSON for each clip")
    parser.add_argument("--threads", type=common.positive, default=1)
    options = parser.parse_args(arguments)
    sets = common.load_sources(options)

    import torch

    from captioner import Captioner

    torch.set_num_threads(options.threads)
    common.print_machine(options.threads)
    captioner = Captioner.load(options.model, device="cpu")
    if options.save is not None:
        options.save.write_text("")
    for data in sets:
        chance = random.Random(options.seed)
        chosen = sorted(chance.sample(range(len(data)), min(options.pictures, len(data))))
        data = replace(data, pictures=tuple(data.pictures[i] for i in chosen))
        report(captioner, data, chance, options)
    return 0


def report(captioner: Captioner, data: DataSet, chance: random.Random, options: argparse.Namespace) -> None:
    """Caption the clips of a data set in all ways, and print how good and how dear each is."""
    from captioner_training.metrics import Scorer

    ways = Ways(captioner)
    said: dict[str, list[dict[str, list[str]]]] = {kind: [] for kind in KINDS}
    candidates: dict[str, list[list[str]]] = {kind: [] for kind in KINDS}
    before: list[Image.Image] | None = None
    for number, picture in enumerate(data.pictures):
        with Image.open(BytesIO(data.store.read(picture.file))) as image:
            frames = moving(image.convert("RGB"), chance)
        strange = spoiled(frames, before or frames, chance)
        before = frames
        for kind, clip in zip(KINDS, (frames, strange), strict=True):
            captions, fits = ways.caption(clip, timed=number < options.timed)
            said[kind].append(captions)
            candidates[kind].append([captions["joint"][0], *captions[AVERAGE]])
            if options.save is not None:
                record = {"set": data.name, "id": picture.id, "kind": kind, "said": captions, "fits": fits}
                with open(options.save, "a") as file:
                    file.write(f"{json.dumps(record)}\n")
        if sys.stderr.isatty():
            print(f"\r{data.name}: {number + 1} of {len(data)}", end="", file=sys.stderr)
    costs = ways.costs()
    references = data.references()
    scorer = Scorer(references)
    keys = list(references)
    for kind in KINDS:
        for captions, best in zip(said[kind], by_cider(ways.captioner, candidates[kind]), strict=True):
            captions["consensus, CIDEr-D"] = [best]
        costs["consensus, CIDEr-D"] = costs["consensus, words"]
        print(
            f"\n{data.name}, {len(data)} clips of {FRAMES} frames, {kind}; x 100, 95 % intervals over photos"
        )
        head = f"{'CIDEr':>7}  {'':<16}{'less joint':>11}  {'':<15}{'BLEU-4':>7}{'METEOR':>8}{'cost':>7}"
        print(f"  {'':<32}{head}")
        systems = {way: [row[way] for row in said[kind]] for way in said[kind][0]}
        found = {way: judge(scorer, keys, rows) for way, rows in systems.items()}
        third = {} if options.no_meteor else meteor([references[key] for key in keys], systems)
        for way, scores in found.items():
            print(f"  {way:<32}{line(scores, found['joint'], third.get(way))}{costs[way]:>7.2f}")
        sys.stdout.flush()


# --------------------------------------------------------------------------------------------------
# Clips


def moving(photo: Image.Image, chance: random.Random, count: int = FRAMES) -> list[Image.Image]:
    """Return frames of the photo's size: a slow pan and zoom, half to all of its area; two are blurred."""
    shares = [chance.uniform(0.5, 1.0) for _ in range(2)]
    places = [(chance.random(), chance.random()) for _ in range(2)]
    blurred = chance.sample(range(count), min(2, count))
    frames = []
    for number in range(count):
        at = number / max(1, count - 1)
        at = at * at * (3 - 2 * at)  # begins and ends gently
        ends = zip((shares[0], *places[0]), (shares[1], *places[1]), strict=True)
        share, x, y = ((1 - at) * a + at * b for a, b in ends)
        width, height = photo.width * share**0.5, photo.height * share**0.5
        left, top = x * (photo.width - width), y * (photo.height - height)
        box = (left, top, left + width, top + height)
        frame = photo.resize(photo.size, Image.Resampling.BICUBIC, box=box)
        if number in blurred:
            frame = frame.filter(ImageFilter.GaussianBlur(chance.uniform(0.005, 0.02) * min(photo.size)))
        frames.append(frame)
    return frames


def spoiled(
    frames: Sequence[Image.Image], others: Sequence[Image.Image], chance: random.Random
) -> list[Image.Image]:
    """Return the frames with the first or the last `SPOILED` from another clip, or fading to black."""
    result = list(frames)
    first = chance.random() < 0.5
    outward = list(range(SPOILED))[::-1] if first else list(range(len(result) - SPOILED, len(result)))
    cut = chance.random() < 0.5
    for step, place in enumerate(outward):
        if cut:
            result[place] = others[place].resize(frames[0].size)
        else:
            result[place] = ImageEnhance.Brightness(frames[place]).enhance((0.1, 0.03)[min(step, 1)])
    return result


# --------------------------------------------------------------------------------------------------
# Ways to caption them


@dataclass(eq=False)
class Ways:
    """Captions clips in all ways, and keeps the seconds of what they are made of.

    Frames that the clip before had, too, are not looked at again.
    """

    captioner: Captioner
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _known: list[tuple[Image.Image, GridFeatures, Caption]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.mean = over_frames(self.captioner, "mean")
        self.factorised = over_frames(self.captioner, "factorised")

    def caption(
        self, clip: Sequence[Image.Image], *, timed: bool
    ) -> tuple[dict[str, list[str]], dict[str, list[float]]]:
        """Return what each way says, one caption or one of each frame, and how well each fits the frames."""
        from captioner.encoder import concatenate, join_frames

        captioner = self.captioner
        if timed:
            self._known = []
        old = [next((row for row in self._known if row[0] is image), None) for image in clip]
        new = [image for image, row in zip(clip, old, strict=True) if row is None]
        looked = self._take("encode", timed, lambda: captioner.encode_batch(new))
        heard = self._take("frames", timed, lambda: captioner.caption_batch(looked))
        fresh = iter([(image, looked[i], heard[i]) for i, image in enumerate(new)])
        self._known = [row or next(fresh) for row in old]
        frames = concatenate([row[1] for row in self._known])
        alone = [row[2] for row in self._known]
        whole = join_frames([frames[i] for i in range(len(frames))], range(len(frames)))
        joint = self._take("joint", timed, lambda: captioner.caption(whole)).text
        best = self._take("n-best", timed, lambda: captioner.caption(whole, n_best=N_BEST))
        if timed:
            few = [frames[i] for i in FEW]
            self._take("few", timed, lambda: [captioner.caption(frame) for frame in few])
            self._take("middle", timed, lambda: captioner.caption(frames[len(frames) // 2]))
        own = [caption.text for caption in alone]
        n_best = [caption.text for caption in best.n_best]
        candidates = distinct([joint, *n_best, *own])
        fits = self._take("score", timed, lambda: probabilities(captioner, frames, candidates))
        cheap = distinct([joint, *n_best, *(own[i] for i in FEW)])
        if timed:
            self._take("score few", timed, lambda: probabilities(captioner, frames, cheap))
            self._take("score n-best", timed, lambda: probabilities(captioner, frames, distinct(n_best)))
        means = dict(zip(candidates, fits.mean(1), strict=True))
        medians = dict(zip(candidates, np.median(fits, 1), strict=True))
        surest = max(alone, key=lambda caption: caption.confidence)
        votes = [joint, *own]
        mean = self._take("mean", timed, lambda: self.mean.caption(whole)).text
        factorised = self._take("factorised", timed, lambda: self.factorised.caption(whole)).text
        tidy = [joint, factorised]
        kept = self._take("typical", timed, lambda: typical(frames))
        if len(kept) < len(frames):
            part = join_frames([frames[i] for i in kept], kept)
            tidy = [way.caption(part).text for way in (captioner, self.factorised)]
        said = {
            "joint": joint,
            "joint, odd frames left out": tidy[0],
            "mean over time": mean,
            "factorised, uniform over frames": factorised,
            "factorised, odd frames left out": tidy[1],
            "middle frame alone": own[len(own) // 2],
            "surest frame": surest.text,
            "agreement": max(candidates, key=means.__getitem__),
            "agreement, median": max(candidates, key=medians.__getitem__),
            "agreement, n-best and 3 frames": max(cheap, key=means.__getitem__),
            "agreement, n-best": max(distinct(n_best), key=means.__getitem__),
            "consensus, words": max(votes, key=lambda text: sum(overlap(text, other) for other in votes)),
        }
        rounded = {
            text: [round(float(fit), 4) for fit in row] for text, row in zip(candidates, fits, strict=True)
        }
        return {**{way: [text] for way, text in said.items()}, AVERAGE: own}, rounded

    def costs(self) -> dict[str, float]:
        """Return what follows the encoding, relative to it."""
        parts = {
            "joint": ["joint"],
            "joint, odd frames left out": ["joint", "typical"],
            "factorised, odd frames left out": ["factorised", "typical"],
            "mean over time": ["mean"],
            "factorised, uniform over frames": ["factorised"],
            "middle frame alone": ["middle"],
            "surest frame": ["frames"],
            "agreement": ["n-best", "frames", "score"],
            "agreement, median": ["n-best", "frames", "score"],
            "agreement, n-best and 3 frames": ["n-best", "few", "score few"],
            "agreement, n-best": ["n-best", "score n-best"],
            "consensus, words": ["joint", "frames"],
            AVERAGE: ["frames"],
        }
        whole = self.seconds["encode"]
        return {way: sum(self.seconds[part] for part in some) / whole for way, some in parts.items()}

    def _take(self, part: str, timed: bool, work: Callable[[], Any]) -> Any:
        begun = time.thread_time()
        result = work()
        if timed:
            self.seconds[part] += time.thread_time() - begun
        return result


def over_frames(captioner: Captioner, frames: str) -> Captioner:
    """Return the captioner with another way to look at several frames, and the same weights."""
    from captioner.model import CaptionModel

    model = captioner.model
    config = replace(model.decoder.config, frames=frames)
    changed = copy.copy(captioner)
    changed.model = CaptionModel(model.encoder, config, model.tokenizer)
    missing, unexpected = changed.model.decoder.load_state_dict(model.decoder.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("frame_attention.") for name in missing), missing
    changed.model.eval().requires_grad_(False)
    return changed


def typical(frames: GridFeatures) -> list[int]:
    """Return which of F frames ``(F, 1, R, D)`` look like most others: half as much as is usual, at least.

    How much is the median cosine, to the other frames, of the mean of a frame's cells.
    """
    from captioner.captioner import pool

    means = pool(frames)
    means = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-9)
    cosines = means @ means.T
    alike = np.array([np.median(np.delete(row, place)) for place, row in enumerate(cosines)])
    return [int(place) for place in np.flatnonzero(alike >= ODD * np.median(alike))]


def distinct(texts: Sequence[str]) -> list[str]:
    """Return the texts without repetition, in their order."""
    return list(dict.fromkeys(texts))


def probabilities(captioner: Captioner, frames: GridFeatures, captions: Sequence[str]) -> np.ndarray:
    """Return how probable F frames find K captions ``(K, F)``: in nats, as the search ranks them."""
    import torch

    from captioner.tokenizer import END, PAD, START

    model = captioner.model
    normal = model.decoder.copy is not None  # the model gives log-probabilities
    with torch.inference_mode():
        tokens = [[START, *model.tokenizer.encode(text), END] for text in captions]
        order = sorted(range(len(captions)), key=lambda k: -len(tokens[k]))
        lengths = torch.tensor([len(tokens[k]) - 1 for k in order]).repeat_interleave(len(frames))
        padded = torch.full((len(captions), max(map(len, tokens))), PAD)
        for row, k in enumerate(order):
            padded[row, : len(tokens[k])] = torch.tensor(tokens[k])
        padded = padded.repeat_interleave(len(frames), 0)
        memory = model.memory(frames).select(torch.arange(len(frames)).repeat(len(captions)))
        passed = model(memory, padded, lengths)
        wanted = padded[:, 1 : 1 + int(lengths[0])].flatten()[passed.positions]
        logits = passed.logits.float()
        each = (logits if normal else torch.log_softmax(logits, -1)).gather(1, wanted[:, None])[:, 0]
        rows = passed.positions // int(lengths[0])
        total = torch.zeros(len(padded)).index_add_(0, rows, each)
        total = total / lengths**captioner.defaults.length_penalty
        result = torch.empty(len(captions), len(frames))
        result[order] = total.view(len(captions), len(frames))
    return result.numpy()


def overlap(one: str, other: str) -> float:
    """Return the F measure, 0 to 1, of the words and pairs of words that two captions share."""

    def grams(text: str) -> Counter[tuple[str, ...]]:
        words = text.split()
        return Counter([*((word,) for word in words), *itertools.pairwise(words)])

    a, b = grams(one), grams(other)
    return 2 * (a & b).total() / max(1, a.total() + b.total())


def by_cider(captioner: Captioner, candidates: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield of each clip's candidates the one that agrees best with the others by CIDEr-D.

    How rare words are is counted in the candidates of all clips.
    """
    from captioner_training.cider import CiderD

    encode = captioner.model.tokenizer.encode
    tokens = [[encode(text) for text in texts] for texts in candidates]
    # each candidate is a picture of its own, with the other candidates as its references
    seen: Counter[tuple[int, ...]] = Counter()
    for texts in tokens:
        seen.update({tuple(t[i : i + n]) for t in texts for n in range(1, 5) for i in range(len(t) - n + 1)})
    pairs = [(clip, i) for clip, texts in enumerate(tokens) for i in range(len(texts))]
    others = [[t for k, t in enumerate(tokens[clip]) if k != i] for clip, i in pairs]
    judge = CiderD(others, document_frequencies=dict(seen), documents=len(tokens))
    rewards = iter(judge.rewards(range(len(pairs)), [tokens[clip][i] for clip, i in pairs]))
    for choice in candidates:
        fits = [next(rewards) for _ in choice]
        yield choice[int(np.argmax(fits))]


# --------------------------------------------------------------------------------------------------
# Scores


def judge(scorer: Scorer, keys: Sequence[Any], rows: Sequence[Sequence[str]]) -> list[Scores]:
    """Score the captions of each clip: of a way that says several things of it, each apart."""
    return [
        scorer.score(dict(zip(keys, captions, strict=True)), metrics=("BLEU", "CIDEr"), intervals=False)
        for captions in zip(*rows, strict=True)
    ]


def meteor(references: Sequence[Sequence[str]], systems: dict[str, list[list[str]]]) -> dict[str, float]:
    """Return the METEOR of each way. Its program starts once for all of them, as that takes long."""
    from captioner_training.metrics import meteor, meteor_of_sums, tokenize

    numbered = (pair for rows in systems.values() for pair in enumerate(rows))
    wanted = sorted({(i, text) for i, texts in numbered for text in texts})
    plain = iter(tokenize([text for texts in references for text in texts]))
    tokenized = [[next(plain) for _ in texts] for texts in references]
    captions = tokenize([text for _, text in wanted])
    _, _, statistics = meteor(captions, [tokenized[i] for i, _ in wanted])
    row = {pair: number for number, pair in enumerate(wanted)}
    return {
        way: float(
            np.mean(
                [
                    meteor_of_sums(statistics[[row[pair] for pair in enumerate(captions)]].sum(0))
                    for captions in zip(*rows, strict=True)
                ]
            )
        )
        for way, rows in systems.items()
    }


def line(scores: Sequence[Scores], joint: Sequence[Scores], meteor: float | None) -> str:
    """Return the scores of a way and how far it is from joint attention, photo by photo."""
    from captioner_training.metrics import bootstrap

    ours, theirs = (
        np.mean([list(s.per_image["CIDEr"].values()) for s in some], axis=0) for some in (scores, joint)
    )
    bleu = float(np.mean([s.corpus["BLEU-4"] for s in scores]))

    def interval(values: np.ndarray) -> str:
        low, high = bootstrap(values)
        return f"({100 * low:.1f} to {100 * high:.1f})"

    less = ours - theirs
    difference = " " * 28 if scores is joint else f"{100 * less.mean():>+11.1f}  {interval(less):<15}"
    third = f"{'-':>8}" if meteor is None else f"{100 * meteor:8.2f}"
    return f"{100 * ours.mean():>7.1f}  {interval(ours):<16}{difference}{100 * bleu:>7.2f}{third}"


if __name__ == "__main__":
    sys.exit(main())
