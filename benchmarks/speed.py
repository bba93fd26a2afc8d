"""Speed: captioning a folder of photos, from the files to the words, against the encoder alone.

The peer is the bare encoder's forward pass over the same pictures, decoded and normalised in memory
beforehand, with the same batch size and number of threads: its BatchNorm folded, channels-last, called in the
plain way, batch after batch. A second line has it as it is trained (nothing folded), a third in the library's
own way, small batches in a thread for each core. Bars: greedy search reaches 0.75 of the plain way's pictures
a second, a beam of 3 reaches 0.5.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common


def main() -> int:
    """Run it; return 0 if the bars hold."""
    parser = common.arguments(__doc__)
    parser.add_argument("--pictures", type=int, default=256, help="photos of 224 to 500 pixels")
    parser.add_argument("--phone", type=int, default=32, help="photos of 12 megapixels; 0 leaves them out")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--threads", type=int, default=2, help="threads, and cores where the system allows it"
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    common.take_cores(options.threads)

    import torch

    from captioner import Captioner
    from captioner.batch import caption_files

    torch.set_num_threads(options.threads)
    common.print_machine(options.threads)
    captioner = Captioner.load(options.model, device="cpu")

    def captions(files: list[Path], beam: int) -> Callable[[], None]:
        def work() -> None:
            for result in caption_files(captioner, files, batch_size=options.batch_size, beam=beam):
                assert result.error is None, result.error

        return work

    with tempfile.TemporaryDirectory() as folder:
        files = common.write_photos(Path(folder), options.pictures)
        measures = encoders(captioner, options.model, files, options.batch_size)
        measures["captions, greedy"] = captions(files, 1)
        measures["captions, beam 3"] = captions(files, 3)
        seconds = common.in_turn(measures, options.repeats)
        print(f"\n{len(files)} photos of 224 to 500 pixels, batches of {options.batch_size}, float32")
        rates(seconds, len(files))
        plain = seconds["encoder, plain"]
        print("\nend to end against the encoder's plain way, pictures a second:")
        holds = common.verdict("greedy", common.ratio(plain, seconds["captions, greedy"]), at_least=0.75)
        holds &= common.verdict("beam 3", common.ratio(plain, seconds["captions, beam 3"]), at_least=0.5)

        if options.phone:
            phones = common.write_phone_photos(Path(folder), options.phone)
            measures = encoders(captioner, options.model, phones, options.batch_size)
            measures = {"encoder, plain": measures["encoder, plain"]}
            measures["captions, greedy"] = captions(phones, 1)
            measures["captions, beam 3"] = captions(phones, 3)
            seconds = common.in_turn(measures, options.repeats)
            print(f"\n{len(phones)} photos of 12 megapixels (mostly decoding; no bar)")
            rates(seconds, len(phones))
            share = common.ratio(seconds["encoder, plain"], seconds["captions, greedy"])
            print(f"greedy against the encoder's plain way: {share:.3g}")
    return 0 if holds else 1


def encoders(
    captioner: Any, model: Path | None, files: list[Path], batch_size: int
) -> dict[str, Callable[[], None]]:
    """Return ways to run the bare encoder over the pictures, already in memory."""
    import torch

    from captioner import checkpoint
    from captioner.encoder import compute
    from captioner.identity import BUILT_IN
    from captioner.images import load, normalise
    from captioner.parallel import ahead

    preprocess = captioner.model.encoder.preprocess
    raw = [torch.from_numpy(load(file, preprocess)[0]) for file in files]
    batches = [torch.stack(raw[i : i + batch_size]) for i in range(0, len(raw), batch_size)]
    inputs = [normalise(batch, preprocess) for batch in batches]
    laid_out = [batch.contiguous(memory_format=torch.channels_last) for batch in inputs]
    folded = copy.deepcopy(captioner.model.encoder.network)
    unfolded = checkpoint.load(model or BUILT_IN).model.encoder.network.eval().requires_grad_(False)
    threads = torch.get_num_threads()

    @torch.inference_mode()
    def plain() -> None:
        for batch in laid_out:
            folded(batch)

    @torch.inference_mode()
    def as_trained() -> None:
        for batch in inputs:
            unfolded(batch)

    def one(batch: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return compute(folded, batch, preprocess)

    def own_way() -> None:
        try:
            for _ in ahead(one, batches, threads, lambda: torch.set_num_threads(1)):
                pass
        finally:
            torch.set_num_threads(threads)

    return {"encoder, plain": plain, "encoder, not folded": as_trained, "encoder, library's way": own_way}


def rates(seconds: dict[str, list[float]], count: int) -> None:
    """Print the median pictures a second of every measure, and the range."""
    for name, values in seconds.items():
        low, high = count / max(values), count / min(values)
        middle = count / statistics.median(values)
        print(f"  {name:<24}{middle:7.1f} pictures/s   ({low:.1f} to {high:.1f})")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
