"""How a kernel is tiled for a device: device models, shared-memory accounting, candidates, cost model, cache."""
