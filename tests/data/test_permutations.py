"""Seeded permutations."""

import collections
import itertools
import math

import numpy as np
import pytest

from dualsm.data import permutations
from dualsm.data.permutations import permutation, permute


def by_index(size: int, *words: int) -> np.ndarray:
    return permute(np.arange(size), size, *words)


@pytest.fixture(params=["tables", "networks"])
def either(request, monkeypatch):
    """Runs a test with permutations in tables, and with networks."""
    if request.param == "networks":
        monkeypatch.setattr(permutations, "_MAX_TABLE", 0)


def test_every_index_has_one_image(either):
    for size in (*range(1, 200), 1000, 65_537):
        assert np.array_equal(np.sort(by_index(size, 3, size)), np.arange(size)), size


@pytest.mark.parametrize("size", [3, 4])
def test_all_permutations_of_few_indices_are_equally_frequent(size):
    trials = 100 * math.factorial(size)
    counts = collections.Counter(tuple(by_index(size, seed, 7).tolist()) for seed in range(trials))
    expected = trials / math.factorial(size)
    chi_squared = sum(
        (counts[order] - expected) ** 2 / expected for order in itertools.permutations(range(size))
    )
    freedom = math.factorial(size) - 1
    assert abs(chi_squared - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [30, 1023])
def test_every_index_has_every_image(either, size):
    image_PxN = np.array([by_index(size, seed) for seed in range(600)])
    for image_P in image_PxN.T:
        counts = np.bincount(image_P * 6 // size, minlength=6)
        assert np.abs(counts - 100).max() < 50, counts


@pytest.mark.parametrize("size", [30, 1023])
def test_images_of_neighbors_are_independent(either, size):
    """The distance between the images of two neighbors is distributed as in a random permutation."""
    distances = np.concatenate([np.diff(by_index(size, seed)) for seed in range(40_000 // size)])
    counts = np.bincount(distances + size, minlength=2 * size + 1)
    possible = np.arange(-size, size + 1)
    expected = len(distances) * np.maximum(size - np.abs(possible), 0) / (size * (size - 1))
    expected[size] = 0
    lower, upper = (np.abs(possible) > 0) & (possible < -size // 3), possible > size // 3
    for part in (lower, upper, ~lower & ~upper):
        assert counts[part].sum() == pytest.approx(expected[part].sum(), rel=0.05)
    assert counts[size] == 0


def test_an_image_does_not_depend_on_the_other_indices(either):
    whole = by_index(5000, 1, 2)
    for indices in ([0], [4999], [7, 7, 3]):
        assert permute(np.array(indices), 5000, 1, 2).tolist() == whole[indices].tolist()


def test_large_sizes_take_no_memory():
    index_B = np.arange(0, 10**12, 10**9)
    image_B = permute(index_B, 10**12 + 7, 0)
    assert len(set(image_B.tolist())) == len(index_B) and image_B.max() < 10**12 + 7
    assert np.abs(np.corrcoef(index_B, image_B)[0, 1]) < 0.1


def test_other_words_give_other_permutations(either):
    words = [(0,), (1,), (0, 0), (0, 1), (1, 0), (2**31 - 1, 5)]
    assert len({tuple(by_index(50, *choice).tolist()) for choice in words}) == len(words)


def test_permutations_do_not_depend_on_the_version_of_numpy():
    """A run that resumes with another version of NumPy must continue in the same order."""
    assert permutation(8, 5, 1, 2).tolist() == [4, 3, 7, 6, 0, 2, 5, 1]
    assert permute(np.arange(8), 10**6, 5, 1, 2).tolist() == [
        763019,
        580105,
        513802,
        951271,
        11545,
        400217,
        599819,
        602388,
    ]
