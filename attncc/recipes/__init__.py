"""Mechanisms that are a few calls of compiled ops: short programs, differentiable as their ops are.

Each says what it computes, from which paper, and what it keeps in memory beside its tensors. A new one has a row in
attncc/catalogue; then `python -m attncc.gallery`.
"""

from attncc.recipes.agents import agents
from attncc.recipes.attention_flow import attention_flow
from attncc.recipes.collinear import collinear
from attncc.recipes.diff_transformer import diff_transformer
from attncc.recipes.dynamic_convolution import dynamic_convolution
from attncc.recipes.fastformer import fastformer
from attncc.recipes.feature_maps import dpfp, fast_weights, fastmax, lln, lln_diag, mala
from attncc.recipes.gates import gaussian_gate
from attncc.recipes.hymba import hymba
from attncc.recipes.infini import infini
from attncc.recipes.interactive import interactive
from attncc.recipes.lamemo import lamemo
from attncc.recipes.lightnet import lightnet
from attncc.recipes.lizard import lizard
from attncc.recipes.merge import merge
from attncc.recipes.monotonic import expected_alignment, monotonic
from attncc.recipes.moving_average import moving_average
from attncc.recipes.multi_token import multi_token
from attncc.recipes.neural import neural
from attncc.recipes.neural_memory import neural_memory
from attncc.recipes.pairwise import additive, network, pairwise
from attncc.recipes.pine import pine
from attncc.recipes.prefix_softmax import prefix_softmax, rwkv4
from attncc.recipes.rela import rela_block
from attncc.recipes.relational import relational
from attncc.recipes.rescaled import refresh, rescaled
from attncc.recipes.selective import selective
from attncc.recipes.shared_heads import shared_heads
from attncc.recipes.sinkhorn import sinkhorn
from attncc.recipes.superglue import assignment, potentials, transported
from attncc.recipes.token_mixing import keys_alone, left_multiplied, mixed_with_mean, one_query
from attncc.recipes.weighted_groups import weighted_groups

__all__ = [
    "additive",
    "agents",
    "assignment",
    "attention_flow",
    "collinear",
    "diff_transformer",
    "dpfp",
    "dynamic_convolution",
    "expected_alignment",
    "fast_weights",
    "fastformer",
    "fastmax",
    "gaussian_gate",
    "hymba",
    "infini",
    "interactive",
    "keys_alone",
    "lamemo",
    "left_multiplied",
    "lightnet",
    "lizard",
    "lln",
    "lln_diag",
    "mala",
    "merge",
    "mixed_with_mean",
    "monotonic",
    "moving_average",
    "multi_token",
    "network",
    "neural",
    "neural_memory",
    "one_query",
    "pairwise",
    "pine",
    "potentials",
    "prefix_softmax",
    "refresh",
    "rela_block",
    "relational",
    "rescaled",
    "rwkv4",
    "selective",
    "shared_heads",
    "sinkhorn",
    "transported",
    "weighted_groups",
]
