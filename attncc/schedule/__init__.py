"""Scheduling: device models, shared-memory accounting, candidate tilings, cost model, cache."""

from attncc.passes.work import LiveTiles, PairCosts
from attncc.schedule.cache import Cache, cache_key
from attncc.schedule.candidates import candidates
from attncc.schedule.choose import choose, first_choice, schedule_key
from attncc.schedule.cost import Prediction, predict, ranked
from attncc.schedule.device import Device, device_for, device_names, device_of, load_device, targets
from attncc.schedule.memory import Buffer, buffers, shared_memory
from attncc.schedule.problem import (
    KERNELS,
    Kernel,
    KernelCosts,
    KernelSchedule,
    Problem,
    Schedule,
    head_chunks,
)

__all__ = [
    "KERNELS",
    "Buffer",
    "Cache",
    "Device",
    "Kernel",
    "KernelCosts",
    "KernelSchedule",
    "LiveTiles",
    "PairCosts",
    "Prediction",
    "Problem",
    "Schedule",
    "buffers",
    "cache_key",
    "candidates",
    "choose",
    "device_for",
    "device_names",
    "device_of",
    "first_choice",
    "head_chunks",
    "load_device",
    "predict",
    "ranked",
    "schedule_key",
    "shared_memory",
    "targets",
]
