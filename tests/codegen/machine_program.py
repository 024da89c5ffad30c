"""One program of a launch on the model of `machine`: its partitions, of which one runs at a time, what is under way."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tests.codegen.machine_tensors import Block, MachineError, Pointer

_PATIENCE, _LOOKS = 20_000, 0.1  # looks of a program at what others change, and more; and how often they come first


class Partition:
    """A thread, the matmuls and the stores that it has under way; of those, what was read is `landing`. `acquired`: was
    it told of what others had stored, with no fence since that the asynchronous units heed?"""

    def __init__(self, thread: threading.Thread):
        self.thread = thread
        self.matmuls: list[Callable[[], None]] = []
        self.stores: list[Callable[[], None]] = []
        self.landing: list[Callable[[], None]] = []  # stores that have read their tile
        self.acquired = False
        self.until: Callable[[], bool] | None = None
        self.done = False
        self.looks = False
        self.rank = 0.0
        self.go = threading.Semaphore(0)


class Program:
    """One program of a launch: its partitions, and what is under way."""

    def __init__(self, number: int, count: int, seed: int):
        self.number, self.count = number, count
        self.random = random.Random(seed)
        self.copies: list[Callable[[], None]] = []
        self.memories: list[Any] = []
        self.barriers: list[Any] = []
        self.partitions: list[Partition] = []
        self.error: BaseException | None = None
        self.asked = self.looked = 0
        self.change()

    def change(self) -> None:
        """Each program has a temper, and another with each block that it is dealt: what is early or late in it, and
        which partitions come first."""
        self.early = {kind: self.random.choice((0.0, 0.3, 0.9)) for kind in ("copies", "matmuls", "stores")}
        self.partial = self.random.random() < 0.6
        self.overtaking = self.random.random() < 0.6  # is the last copy there first, when all wait?
        for p in self.partitions:
            p.rank = self.random.random()

    @property
    def own(self) -> Partition:
        return next(p for p in self.partitions if p.thread is threading.current_thread())

    def run(self, function: Callable[..., Any], args: Sequence[Any]) -> None:
        """Run a kernel's own body, and what it specializes warps for."""
        (first,) = self._add([(function, args)])
        first.go.release()
        for p in self.partitions:  # it grows meanwhile
            p.thread.join()
        if self.error is not None:
            raise self.error
        if any(p.matmuls or p.stores for p in self.partitions):
            raise MachineError("a matmul or a store of a tile is never waited for")
        if not all(barrier.retired for barrier in self.barriers):
            raise MachineError("the memory of a barrier may be a tile's before the kernel ends")
        for p in self.partitions:
            land(p)

    def specialize(self, functions: Sequence[tuple[Callable[..., Any], Sequence[Any]]]) -> None:
        """Start partitions, and wait for their end."""
        started = self._add(functions)
        self.wait(lambda: all(p.done for p in started))

    def _add(self, functions: Sequence[tuple[Callable[..., Any], Sequence[Any]]]) -> list[Partition]:
        started = []
        for function, args in functions:
            started.append(Partition(threading.Thread(target=self._body, args=(function, args), daemon=True)))
            started[-1].rank = self.random.random()
        self.partitions += started
        for p in started:
            p.thread.start()
        return started

    def _body(self, function: Callable[..., Any], args: Sequence[Any]) -> None:
        me = self.own
        me.go.acquire()
        try:
            if self.error is None:
                function(*args)
        except BaseException as error:
            self.error = self.error or error
        me.done = True
        chosen = self._choose()
        if chosen is not None:
            chosen.go.release()

    def let_others(self) -> None:
        """A partition asks for what others do, and they come first for a while, for ever where nobody does it."""
        self.looked += 1
        if self.looked > _PATIENCE:
            raise MachineError("somebody waits for what nobody does")
        self.own.looks = True
        self.wait(lambda: True)
        self.own.looks = False

    def wait(self, until: Callable[[], bool]) -> None:
        """Let others run until the condition holds."""
        me = self.own
        me.until = until
        chosen = self._choose()
        if chosen is not me:
            if chosen is not None:
                chosen.go.release()
            me.go.acquire()
        me.until = None
        if self.error is not None:
            raise MachineError("another partition failed")

    def _choose(self) -> Partition | None:
        """Let what is under way happen, as chance has it, and say whose turn it is; nobody's, and everybody goes on,
        where something failed."""
        while self.error is None:
            self._happen()
            ready = [p for p in self.partitions if not p.done and (p.until is None or p.until())]
            looking = [p for p in ready if p.looks]
            if looking and self.random.random() < _LOOKS:
                return self.random.choice(looking)
            ready = [p for p in ready if not p.looks]
            if ready:
                return max(ready, key=lambda p: p.rank) if self.partial else self.random.choice(ready)
            if all(p.done for p in self.partitions):
                return None
            if self.copies:
                self.copies.pop(-1 if self.overtaking else self.random.randrange(len(self.copies)))()
            elif looking:
                return self.random.choice(looking)
            else:
                self.error = MachineError("every partition waits, and nothing is under way")
        for p in self.partitions:
            p.go.release()
        return None

    def _happen(self) -> None:
        """Some of what is under way happens, a partition's matmuls and its stores in their order."""
        queues = [("copies", self.copies)]
        queues += [
            (kind, queue)
            for p in self.partitions
            for kind, queue in (("matmuls", p.matmuls), ("stores", p.stores), ("stores", p.landing))
        ]
        for kind, queue in queues:
            while queue and self.random.random() < self.early[kind]:
                queue.pop(self.random.randrange(len(queue)) if queue is self.copies else 0)()


def land(partition: Partition) -> None:
    """Its stores that have read their tile are in memory now."""
    while partition.landing:
        partition.landing.pop(0)()


_program: Program | None = None


def current() -> Program:
    """The program that runs."""
    assert _program is not None
    return _program


class Kernel:
    """What `gluon.jit` makes."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.__name__ = function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def launch(self, grid: int, args: Sequence[Any], meta: dict[str, Any], seed: int) -> None:
        """Run all programs, one after the other in a random order; in that of their numbers where they take turns."""
        global _program
        names = self.function.__code__.co_varnames[: self.function.__code__.co_argcount]
        constants = {name: value for name, value in meta.items() if name in names}
        given = [
            Pointer.to(a) if isinstance(a, Tensor) else Block(a) if isinstance(a, int | float) else a for a in args
        ]
        bound = [*given, *(constants[name] for name in names[len(given) :])]
        order = list(range(grid))
        if not meta.get("ORDERED") and meta.get("SPLITS", 1) == 1:
            random.Random(seed).shuffle(order)
        for number in order:
            _program = Program(number, grid, seed * 1009 + number)
            _program.run(self.function, bound)
