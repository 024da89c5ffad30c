"""Calls: checked tensors, the launch of generated kernels, and the float64 reference that they are verified against."""
