"""The shapes of the parameters of networks that people train, and of what only a benchmark has."""

from __future__ import annotations

Shape = tuple[int, ...]


def resnet50() -> list[Shape]:
    """Return the 161 shapes of torchvision's ResNet-50: 25,557,032 parameters."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for shape in ((width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, shape[:1], shape[:1]]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def vit_b() -> list[Shape]:
    """Return the 152 shapes of ViT-B/16 on 224 × 224 pixels, as in torchvision and timm: 86,567,656 parameters."""
    width, hidden = 768, 3072
    norm: list[Shape] = [(width,), (width,)]
    attention: list[Shape] = [(3 * width, width), (3 * width,), (width, width), (width,)]
    perceptron: list[Shape] = [(hidden, width), (hidden,), (width, hidden), (width,)]
    patches: list[Shape] = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    return [*patches, *12 * [*norm, *attention, *norm, *perceptron], *norm, (1000, width), (1000,)]


def vit_l() -> list[Shape]:
    """Return the 296 shapes of ViT-L/16 on 224 × 224 pixels: 304,326,632 parameters."""
    width, hidden = 1024, 4096
    norm: list[Shape] = [(width,), (width,)]
    attention: list[Shape] = [(3 * width, width), (3 * width,), (width, width), (width,)]
    perceptron: list[Shape] = [(hidden, width), (hidden,), (width, hidden), (width,)]
    patches: list[Shape] = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    return [*patches, *24 * [*norm, *attention, *norm, *perceptron], *norm, (1000, width), (1000,)]


def language_model() -> list[Shape]:
    """Return the 201 shapes of TinyLlama, a transformer of 22 layers: 1,100,048,384 parameters."""
    words, width, hidden, shared = 32_000, 2048, 5632, 256
    attention: list[Shape] = [(width, width), (shared, width), (shared, width), (width, width)]
    perceptron: list[Shape] = [(hidden, width), (hidden, width), (width, hidden)]
    return [(words, width), *22 * [*attention, *perceptron, (width,), (width,)], (width,), (words, width)]


def alexnet() -> list[Shape]:
    """Return the 16 shapes of torchvision's AlexNet: 61,100,840 parameters, 37,748,736 of them in one matrix."""
    kernels = [(64, 3, 11, 11), (192, 64, 5, 5), (384, 192, 3, 3), (256, 384, 3, 3), (256, 256, 3, 3)]
    weights: list[Shape] = [*kernels, (4096, 9216), (4096, 4096), (1000, 4096)]
    return [shape for weight in weights for shape in (weight, weight[:1])]


def tiny() -> list[Shape]:
    """Return 10,000 shapes of 100 elements: 1,000,000 parameters."""
    return [(10, 10)] * 10_000


def flat(size: int) -> list[Shape]:
    """Return one shape of `size` elements, a multiple of 1000.

    Parameters
    ----------
    size : int
        1,000,000 to 1,000,000,000 here.

    Returns
    -------
    list of tuple of int
        A matrix, since pytorch-optimizer leaves vectors to SGD.
    """
    return [(size // 1000, 1000)]
