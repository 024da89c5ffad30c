"""Mechanisms that are a few calls of compiled ops: short programs, differentiable as their ops are.

Each says what it computes, from which paper, and what it keeps in memory beside its tensors.
"""

from attncc.recipes.agents import agents
from attncc.recipes.lamemo import lamemo
from attncc.recipes.merge import merge
from attncc.recipes.pine import pine
from attncc.recipes.shared_heads import shared_heads
from attncc.recipes.sinkhorn import sinkhorn

__all__ = ["agents", "lamemo", "merge", "pine", "shared_heads", "sinkhorn"]
