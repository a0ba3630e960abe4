"""The data: scikit-learn's handwritten digits, split once into a training, a validation and a test set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lars_array.demo.network import Array, Labels


@dataclass(frozen=True)
class Part:
    """One part of the data.

    Attributes
    ----------
    x : ndarray of float32, shape (rows, 64)
        Images of 8 x 8 pixels, scaled from 0 ... 16 to 0 ... 1 by a fixed factor, which is not fitted to the data.
    y : ndarray of int, shape (rows,)
        Digits 0 to 9.
    index : ndarray of int, shape (rows,)
        The rows' indices in the full data set.
    """

    x: Array
    y: Labels
    index: Labels


@dataclass(frozen=True)
class Digits:
    """The three parts, which are disjoint."""

    train: Part
    validation: Part
    test: Part


def load(seed: int) -> Digits:
    """Split the 1797 digits into 60 % training, 20 % validation and 20 % test, stratified by class.

    Parameters
    ----------
    seed : int
        Seed of the split.

    Returns
    -------
    Digits
        The three parts.
    """
    # Imported here because worker processes receive the data and do not need scikit-learn.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, classes = load_digits(return_X_y=True)
    # scikit-learn accepts seeds of at most 32 bits, so the seed is hashed.
    split = int(np.random.SeedSequence(seed).generate_state(1)[0])
    rest, test = train_test_split(np.arange(len(classes)), test_size=0.2, stratify=classes, random_state=split)
    train, validation = train_test_split(rest, test_size=0.25, stratify=classes[rest], random_state=split)

    x = (images / 16).astype(np.float32)
    y = classes.astype(np.intp)
    return Digits(*(Part(x[index], y[index], index) for index in (train, validation, test)))
