"""Launches through the driver: descriptors, threads without a context, streams, profilers, errors."""

import threading

import pytest
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

import attncc as ac
from attncc.codegen.module import load_source
from attncc.runtime import launch, replay
from attncc.runtime.launch import Launcher
from attncc.runtime.steps import Direct, Foreign, Make
from attncc.schedule.cache import Cache

COPY = '''"""Copies a matrix by tiles."""
import triton
import triton.language as tl


@triton.jit
def copy_kernel(X_DESC, OUT_PTR, stride, scale, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = tl.program_id(0) * ROWS
    x = X_DESC.load([row, 0])
    at = (row + tl.arange(0, ROWS))[:, None] * stride + tl.arange(0, COLS)[None, :]
    tl.store(OUT_PTR + at, x * scale)
'''


def test_descriptors_move_to_the_tensors_of_a_replayed_call(own_cache):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no tensor memory accelerator")
    kernel = load_source(COPY, "copy").copy_kernel
    launcher = Launcher("copy", Cache())

    def call(x):
        out = torch.empty(128, 64, device="cuda")
        box = TensorDescriptor(x, list(x.shape), list(x.stride()), [32, 64])
        launcher(kernel, 4, (box, out, out.stride(0), 2.0), {"ROWS": 32, "COLS": 64, "num_warps": 4})
        return (out,)

    x = torch.randn(128, 64, device="cuda")
    (out,), recording = replay.record(lambda: call(x), [x], [])
    assert torch.equal(out, 2 * x)
    assert [type(step) for step in recording.steps] == [Make, Direct]
    for _ in range(3):
        y = torch.randn(128, 64, device="cuda")
        assert torch.equal(recording.play([y])[0], 2 * y)
    # and the same through Triton's own launcher
    (out,), recording = replay.record(lambda: _watched(lambda: call(x)), [x], [])
    assert torch.equal(out, 2 * x)
    assert [type(step) for step in recording.steps] == [Make, Foreign]
    assert torch.equal(recording.play([y])[0], 2 * y)


def _watched(run):
    """Run with a profiler's hook on launches."""
    seen = []
    hooks = triton.knobs.runtime.launch_enter_hook
    hook = seen.append
    hooks.add(hook)
    try:
        assert launch.watched()
        return run()
    finally:
        hooks.remove(hook)
        assert seen


def test_a_profiler_sees_every_launch_and_the_same_result():
    op = ac.compile("causal")
    q, k, v = (torch.randn(1, 2, 100, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    expected = op(q, k, v)
    assert torch.equal(_watched(lambda: op(q, k, v)), expected)
    assert torch.equal(op(q, k, v), expected)


def test_a_thread_that_never_used_the_gpu_can_launch():
    op = ac.compile("causal")
    q, k, v = (torch.randn(1, 2, 100, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    expected = op(q, k, v)
    found = []
    thread = threading.Thread(target=lambda: found.append(op(q, k, v)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)


def test_launches_follow_the_current_stream():
    op = ac.compile("causal")
    q, k, v = (torch.randn(4, 16, 2048, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    expected = op(q, k, v)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        zeros = [torch.zeros_like(q) for _ in range(3)]
        for t, source in zip(zeros, (q, k, v), strict=True):
            t.copy_(source)
        out = op(*zeros)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_a_schedule_that_takes_too_much_says_what_and_how_much():
    large = ac.KernelSchedule(128, 128, 8, 4)
    op = ac.compile("causal", schedule=ac.Schedule(large, large, large))
    q, k, v = (torch.randn(1, 1, 256, 256, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    with torch.no_grad(), pytest.raises(triton.OutOfResources, match="shared memory"):
        op(q, k, v)


def test_bf16_and_fp32_scalars_and_misaligned_tensors_reach_the_kernel():
    op = ac.compile("softcap")
    storage = torch.randn(3, 1 + 2 * 70 * 40, device="cuda")
    q, k, v = (row[1:].view(1, 2, 70, 40) for row in storage)
    for cap in (5.0, 50.0):
        exact = ac.reference(ac.variants.get("softcap"), q, k, v, cap=cap)
        for _ in range(2):
            assert (op(q, k, v, cap=cap) - exact).abs().max() < 1e-4
