"""Running ops: checking tensors, launching generated kernels, and the float64 reference that verifies them."""
