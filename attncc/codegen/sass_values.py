"""Dataflow analysis of SASS: the value of each register before each instruction, as far as it is known statically.

Constants are propagated through moves, additions, logic and spills, along all paths. An unknown value is named after
the instruction that produced it, so that a swap by three exclusive ors is recognized; in a loop, the name stands for
the value of any iteration.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from attncc.codegen.sass import Instruction, span

_MASK = 0xFFFFFFFF
#: LOP3's lookup table of an exclusive or
_XOR = 0x3C
#: instructions whose results are followed, and those that spill, reload or clear values
_FOLLOWED = re.compile(r"CALL|STL|LDL|CS2R|U?MOV|R2UR|IMAD|U?IADD3|VIADD|U?P?LOP3")
State = TypeVar("State", bound=dict[Any, Any])


class Value(NamedTuple):
    """The exclusive or of `unknown` values, named after the instructions that produced them, and of constant `bits`."""

    unknown: frozenset[str]
    bits: int


ZERO = Value(frozenset(), 0)
#: the known values of registers and spill slots; any that is missing may hold anything
Known = dict[str, Value]


def known_before(code: list[Instruction]) -> Iterator[tuple[int, Known]]:
    """The known values before each reachable instruction, in the form of `states_before`."""
    # the results of most instructions are not followed: they are the same unknown values at every visit
    named = {i: _named(i, x) for i, x in enumerate(code) if not (x.guard or _FOLLOWED.match(x.name))}

    def learn(i: int, x: Instruction, known: Known) -> None:
        if i in named:
            known.update(named[i])
        else:
            _learn(i, x, known)

    return states_before(code, learn, _agree)


def states_before(
    code: list[Instruction], step: Callable[[int, Instruction, State], None], join: Callable[[State, State], State]
) -> Iterator[tuple[int, State]]:
    """For each reachable instruction, in order: its index, and the state that holds before it on all paths from the
    start, where the state is empty.

    `step` updates a state by an instruction; `join` merges the states of two paths. A yielded state is valid until the
    next is yielded. States are stored only at the starts of runs without jumps: kernels have thousands of instructions,
    but a hundred such runs.
    """
    starts = _starts(code)
    states: dict[int, Any] = {0: {}}
    todo = [0]
    while todo:
        first = todo.pop()
        state = states[first].copy()
        for i in _run(code, first, starts):
            step(i, code[i], state)
        for to in code[i].next:
            merged = join(states[to], state) if to in states else state.copy()
            if to not in states or states[to] != merged:
                states[to] = merged
                todo.append(to)
    for first in sorted(states):
        state = states[first].copy()
        for i in _run(code, first, starts):
            yield i, state
            step(i, code[i], state)


def _starts(code: list[Instruction]) -> set[int]:
    """The indices at which runs of consecutive instructions begin."""
    jumps = (to for i, x in enumerate(code) if x.next != (i + 1,) for to in (*x.next, i + 1))
    return {0, *jumps}


def _run(code: list[Instruction], first: int, starts: set[int]) -> Iterator[int]:
    """The indices from one start up to the next."""
    yield first
    for i in range(first + 1, len(code)):
        if i in starts:
            return
        yield i


def _agree(a: Known, b: Known) -> Known:
    return {name: value for name, value in a.items() if b.get(name) == value}


def _named(i: int, x: Instruction) -> Known:
    """Unknown values for all that an instruction writes, named after the instruction's index."""
    return {name: Value(frozenset({f"{i}.{k}"}), 0) for k, name in enumerate((*x.writes, *_carries(x)))}


def _learn(i: int, x: Instruction, known: Known) -> None:
    if x.name.startswith("CALL"):
        known.clear()
    elif x.name.startswith("STL") and not x.guard:
        # spilled values are stored by their address
        for k, value in enumerate([_value(name, known) for name in span(x.operands[1], x.size)]):
            _set(known, f"{x.operands[0]}+{k}", value)
    elif written := (*x.writes, *_carries(x)):
        result = _result(x, known)
        for k, name in enumerate(written):
            value = result.get(name, Value(frozenset({f"{i}.{k}"}), 0))
            _set(known, name, value if not x.guard or known.get(name) == value else None)


def _set(known: Known, name: str, value: Value | None) -> None:
    if value is None:
        known.pop(name, None)
    else:
        known[name] = value


def _carries(x: Instruction) -> tuple[str, ...]:
    """The predicates that an addition writes."""
    return tuple(p for p in x.operands[1:3] if re.match(r"U?P\d$", p)) if "IADD3" in x.name else ()


def _result(x: Instruction, known: Known) -> Known:
    """The values that an instruction writes, as far as they are known."""
    name, values, to = x.name, x.values, x.writes[:1]
    inputs = [_value(v, known) for v in values[1:]]
    found: Known = {}
    if not to:
        return found
    if name.startswith("CS2R") and values[1] == "SRZ":
        found = dict.fromkeys(x.writes, ZERO)
    elif name.startswith("LDL"):
        found = {r: known[f"{values[1]}+{k}"] for k, r in enumerate(x.writes) if f"{values[1]}+{k}" in known}
    elif name in ("MOV", "UMOV", "R2UR") and inputs[0] is not None:
        found = {to[0]: inputs[0]}
    elif name in ("IMAD.MOV.U32", "IMAD.U32") and values[1:3] == ("RZ", "RZ") and inputs[2] is not None:
        found = {to[0]: inputs[2]}
    elif name.endswith("IADD3.64"):
        found = _added_pairs(x, known)
    elif name.removesuffix(".X") in ("IADD3", "UIADD3", "VIADD"):
        found = _added(x, inputs, known)
    elif name == "IMAD.X" and values[1:3] == ("RZ", "RZ"):
        found = _added(x, inputs[2:], known)
    elif name.endswith("LOP3.LUT"):
        found = _looked_up(to[0], int(values[4], 16), inputs[:3])
    return found


def _value(text: str, known: Known) -> Value | None:
    """The value of an operand: a number, zero, or the known value of a register; None if unknown."""
    negative = text.startswith("-")
    text = text.removeprefix("-")
    if text in ("RZ", "URZ"):
        return ZERO
    if re.match(r"(0x[0-9a-f]+|\d+)$", text):
        return Value(frozenset(), (-int(text, 0) if negative else int(text, 0)) & _MASK)
    held = known.get(text)
    if held is None or not negative:
        return held
    return None if held.unknown else Value(frozenset(), -held.bits & _MASK)


def _added(x: Instruction, inputs: list[Value | None], known: Known) -> Known:
    """A sum and its carry. With an unknown address the sum is unknown, but not the carry: an address stays within its
    14 bits, so there is a carry only if a negative number is added."""
    carry = ZERO
    if x.name.endswith(".X"):
        carry = known.get([p for p in x.operands if re.match(r"U?P\d$", p)][-1], ZERO)
    numbers = [v for v in inputs if v is not None and not v.unknown]
    if len(numbers) < len(inputs):
        others = [v for v in inputs if v is None or v.unknown]
        back = any(v.bits >> 31 for v in numbers)
        found = dict.fromkeys(_carries(x), Value(frozenset(), int(back)))
        if len(others) == 1 and others[0] is not None and not any(v.bits for v in numbers) and carry == ZERO:
            found[x.writes[0]] = others[0]
        return found
    total = sum(v.bits for v in numbers) + carry.bits
    return {
        x.writes[0]: Value(frozenset(), total & _MASK),
        **dict.fromkeys(_carries(x), Value(frozenset(), total >> 32 & 1)),
    }


def _added_pairs(x: Instruction, known: Known) -> Known:
    """The upper half of a 64-bit sum. The lower half, an address, gives no carry."""
    upper = []
    for text in x.values[1:]:
        register = re.match(r"(U?R)(\d+)$", text)
        upper.append(known.get(f"{register[1]}{int(register[2]) + 1}") if register else ZERO)
    if any(v is None or v.unknown for v in upper):
        return {}
    return {x.writes[1]: Value(frozenset(), sum(v.bits for v in upper if v is not None) & _MASK)}


def _looked_up(to: str, table: int, inputs: list[Value | None]) -> Known:
    """LOP3: a function of three bits, given by its table. An exclusive or is followed for unknown values, too."""
    if None in inputs:
        return {}
    a, b, c = (v for v in inputs if v is not None)
    if table == _XOR and c == ZERO:
        return {to: Value(a.unknown ^ b.unknown, a.bits ^ b.bits)}
    if a.unknown or b.unknown or c.unknown:
        return {}
    found = 0
    for i in range(8):
        if table >> i & 1:
            found |= (a.bits if i & 4 else ~a.bits) & (b.bits if i & 2 else ~b.bits) & (c.bits if i & 1 else ~c.bits)
    return {to: Value(frozenset(), found & _MASK)}
