"""Parse shapes and durations of the command line: "B4 H32/8 M1 N65536 D128", "60s"."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from attncc.errors import InputError

_SHAPE = "B4 H32/8 M1 N65536 D128/64: sequences, heads/key heads, queries, keys, head dimensions of q and of v"
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def shapes(texts: Sequence[str], defaults: dict[str, int]) -> list[dict[str, int]]:
    """The sizes in each text, by their names in a formula. A text may hold several shapes, separated by commas.

    A shape takes what it omits from `defaults`, except that one with M but no N has N = M, and "H" and "D" with a
    single number set both of their sizes. InputError: a text of another form."""
    return [_sizes(part, defaults) for text in texts for part in text.split(",") if part.strip()]


def text_of(sizes: Mapping[str, int]) -> str:
    """The inverse of `shapes`, for one shape."""

    def pair(one: str, other: str) -> str:
        return f"{sizes[one]}" if sizes[one] == sizes[other] else f"{sizes[one]}/{sizes[other]}"

    heads, dims = pair("h", "h_kv"), pair("d_qk", "d_v")
    return f"B{sizes['b']} H{heads} M{sizes['q_idx']} N{sizes['kv_idx']} D{dims}"


def _sizes(text: str, defaults: dict[str, int]) -> dict[str, int]:
    sizes = dict(defaults)
    for word in text.split():
        found = re.fullmatch(r"([BHMND])(\d+)(?:/(\d+))?", word, re.IGNORECASE)
        letter = found[1].upper() if found else ""
        if found is None or (found[3] and letter not in "HD") or "0" in (found[2], found[3]):
            raise InputError(f"'{word}' in the shape '{text.strip()}' is no size", remedy=f"write {_SHAPE}")
        first, second = int(found[2]), int(found[3] or found[2])
        if letter == "H":
            sizes |= {"h": first, "h_kv": second}
        elif letter == "D":
            sizes |= {"d_qk": first, "d_v": second}
        elif letter == "M":
            sizes |= {"q_idx": first} | ({} if re.search(r"\bN\d", text, re.IGNORECASE) else {"kv_idx": first})
        else:
            sizes |= {{"B": "b", "N": "kv_idx"}[letter]: first}
    return sizes


def seconds(text: str) -> float:
    """A duration: "90", "90s", "1.5m", "2h". InputError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", text)
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise InputError(f"'{text}' is no duration", remedy="write 60s, 5m or 1h")
    return float(found[1]) * _UNITS[found[2]]
