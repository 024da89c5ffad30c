import pytest
import torch

from bench import area

LENGTHS = [(1, 1), (7, 7), (64, 64), (5, 9), (1, 33), (9, 5), (33, 1), (12, 40)]


def count(m, n, visible):
    """Pairs where `visible(position, key)` holds; the last query stands at the last key."""
    position = torch.arange(n - m, n)[:, None]
    return int(visible(position, torch.arange(n)).expand(m, n).sum())


@pytest.mark.parametrize(("m", "n"), LENGTHS)
def test_full(m, n):
    assert area.full(m, n) == m * n


@pytest.mark.parametrize(("m", "n"), LENGTHS)
def test_causal(m, n):
    assert area.causal(m, n) == count(m, n, lambda i, j: j <= i)


@pytest.mark.parametrize(("m", "n"), LENGTHS)
@pytest.mark.parametrize("size", [1, 4, 1000])
def test_window(m, n, size):
    assert area.window(m, n, size) == count(m, n, lambda i, j: (j <= i) & (i - j < size))


@pytest.mark.parametrize(("m", "n"), LENGTHS)
@pytest.mark.parametrize("length", [0, 3, 1000])
def test_prefix(m, n, length):
    assert area.prefix(m, n, length) == count(m, n, lambda i, j: (j <= i) | (j < length))


@pytest.mark.parametrize("lengths", [[1], [4, 4, 4], [5, 1, 9]])
def test_documents(lengths):
    doc = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    n = len(doc)
    assert area.documents(lengths) == count(n, n, lambda i, j: (j <= i) & (doc[i] == doc[j]))


@pytest.mark.parametrize("offset", [-50, -3, 0, 2, 50])
def test_below(offset):
    assert area.below(11, 20, offset) == count(11, 20, lambda i, j: j <= i - 9 + offset)
