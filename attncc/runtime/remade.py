"""Copy and pickle an op as the arguments it was made from, so that modules that hold one can be copied and saved."""

from __future__ import annotations

import copy
from typing import Any

from attncc.ir.graph import VariantGraph


class Remade:
    """An op of which a copy is made as the op was: `_made_of` has the arguments of its class.

    What an op gathers from call to call (loaded kernels, locks, recordings) is of this process and is not copied.
    """

    graph: VariantGraph
    _made_of: tuple[Any, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_of

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Itself, since no call changes what an op computes; another where it is bound to tensors of the user's, such
        as parameters of the module that holds it, for these are copied with it."""
        if any(decl.captured for decl in self.graph.inputs):
            return type(self)(*copy.deepcopy(self._made_of, memo))
        return self
