"""Launches and their replays on a machine without a GPU: the driver is a fake on the CPU's memory."""

import ctypes
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

import attncc as ac
from attncc.runtime import launch, recordings, replay, straight
from attncc.runtime.launch import Launcher
from attncc.runtime.modules import Features
from attncc.runtime.specialize import signature
from attncc.runtime.steps import Direct, Make
from attncc.schedule.cache import Cache

from .delta_launch import H100, META, arguments, delta_kernel


@pytest.fixture(scope="module")
def kernel():
    return delta_kernel()


class FakeFunction:
    """Reads the arguments from memory while the launch lasts, as the driver does."""

    calls: list

    def __init__(self, image, name, warps, shared, device, early):
        self.name = name

    def ready(self, grid, addresses):
        return lambda stream: self.launch(grid, addresses)

    def launch(self, grid, addresses):
        FakeFunction.calls.append((self.name, grid, [ctypes.string_at(a, 8) for a in addresses]))
        out, _, _, delta = (ctypes.cast(a, ctypes.POINTER(ctypes.c_uint64))[0] for a in addresses[:4])
        ctypes.memmove(delta, out, 64)  # the first 32 numbers of out, as 16 of delta


@pytest.fixture
def gpu(monkeypatch):
    """A process that believes in a GPU whose memory is the CPU's."""
    FakeFunction.calls = []
    monkeypatch.setattr(launch, "Function", FakeFunction)
    monkeypatch.setattr(launch, "current_target", lambda device: H100)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    monkeypatch.setattr(
        straight, "_empty", lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype)
    )


def read(call, position, kind):
    return kind.from_buffer_copy(call[2][position]).value


def test_a_launch_lays_its_arguments_out_for_the_driver(kernel, tmp_path, gpu):
    args = arguments()
    Launcher("digest", Cache(tmp_path))(kernel, 6, args, META)
    (call,) = FakeFunction.calls
    assert call[:2] == ("delta_kernel", 6)
    assert [read(call, i, ctypes.c_uint64) for i in range(4)] == [t.data_ptr() for t in args[:4]]
    special = signature(kernel, args, META)
    numbers = [args[i] for i in special.runtime if i >= 4]
    assert [read(call, 4 + i, ctypes.c_int32) for i in range(len(numbers))] == numbers
    assert len(call[2]) == 4 + len(numbers) + 2


def test_an_empty_grid_launches_nothing(kernel, tmp_path, gpu):
    Launcher("digest", Cache(tmp_path))(kernel, 0, arguments(), META)
    assert not FakeFunction.calls


def host(launcher, kernel, out, dout, finish=lambda delta: (delta,)):
    """The host code of a module, in small."""
    delta = torch.empty(2, 3, 48)
    strides = (*out.stride()[:3], *dout.stride()[:3])
    launcher(kernel, 6, (out, dout, delta, delta, *strides, 3, 48), META)
    return finish(delta)


def first(out):
    """What the fake kernel writes."""
    return out.flatten()[:32].view(torch.float32)


def test_a_replay_fills_in_the_tensors_of_its_own_call(kernel, tmp_path, gpu):
    launcher = Launcher("digest", Cache(tmp_path))
    out, dout, *_ = arguments()
    _, recording = replay.record(lambda: host(launcher, kernel, out, dout), [out, dout], [])
    for _ in range(3):
        out, dout, *_ = arguments()
        (delta,) = recording.play([out, dout])
        seen = [read(FakeFunction.calls[-1], i, ctypes.c_uint64) for i in range(4)]
        assert seen == [out.data_ptr(), dout.data_ptr(), delta.data_ptr(), delta.data_ptr()]
        assert torch.equal(delta.flatten()[:16], first(out))
    assert len(FakeFunction.calls) == 4


@pytest.mark.parametrize("at_once", [True, False])
def test_a_kind_is_recorded_once_and_then_replayed(kernel, tmp_path, gpu, monkeypatch, at_once):
    monkeypatch.setattr(recordings, "capturing", lambda: False)
    launcher, kinds, called = Launcher("digest", Cache(tmp_path)), recordings.Recordings(at_once), []
    for kind in ("short", "short", "short", "other"):
        out, dout, *_ = arguments()

        def call(out=out, dout=dout):
            called.append(kind)  # noqa: B023
            return host(launcher, kernel, out, dout)

        (delta,) = kinds.run(kind, call, [out, dout])
        assert torch.equal(delta.flatten()[:16], first(out))
    assert called == (["short", "other"] if at_once else ["short", "short", "other"])
    assert len(kinds) == (2 if at_once else 1)


def test_a_kind_that_depends_on_values_is_called_each_time(gpu, monkeypatch):
    monkeypatch.setattr(recordings, "capturing", lambda: False)
    kinds = recordings.Recordings(at_once=True)
    for count in (3, 5):
        x = torch.arange(8.0)
        assert kinds.run("kind", lambda x=x, n=count: (x[x < n].clone(),), [x])[0].numel() == count
    assert len(kinds) == 0


FINISHES = {
    "sum": lambda delta: (delta[0, 0, :16].sum(), None),
    "permuted": lambda delta: (delta.permute(2, 0, 1)[:16, 0, 0].clone(), delta),
    "in place": lambda delta: (torch.zeros(16).add_(delta.flatten()[:16]).mul_(2.0),),
    "indexed": lambda delta: (
        torch.zeros(4).index_put_((torch.arange(16) % 4,), delta.flatten()[:16], accumulate=True),
        delta[0, 0, :16] + torch.tensor(1.0),
    ),
    "several": lambda delta: (*delta[0, 0, :16].split(8), torch.cat([delta[0, 0, :16], torch.ones(2)])),
}


@pytest.mark.parametrize("finish", FINISHES)
def test_operators_after_a_launch_are_replayed_with_it(kernel, tmp_path, gpu, finish):
    launcher, finish = Launcher("digest", Cache(tmp_path)), FINISHES[finish]
    out, dout, *_ = arguments()
    _, recording = replay.record(lambda: host(launcher, kernel, out, dout, finish), [out, dout], [])
    assert recording is not None
    for _ in range(2):
        out, dout, *_ = arguments()
        found = recording.play([out, dout])
        expected = host(launcher, kernel, out, dout, finish)
        for a, b in zip(found, expected, strict=True):
            if b is None:
                assert a is None
            elif a.numel() <= 18:  # the rest of delta is not written
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            else:
                assert a.shape == b.shape


def test_a_counter_of_a_launch_begins_at_zero_each_time(kernel, tmp_path, gpu):
    launcher = Launcher("digest", Cache(tmp_path))
    out, dout, *_ = arguments()

    def call():
        counter = torch.zeros(2, 3, 48)  # which the launch writes
        strides = (*out.stride()[:3], *dout.stride()[:3])
        launcher(kernel, 6, (out, dout, counter, counter, *strides, 3, 48), META)
        return (counter,)

    _, recording = replay.record(call, [out, dout], [])
    for _ in range(2):
        (counter,) = recording.play([out, dout])
        assert torch.equal(counter.flatten()[:16], first(out))
        assert not counter.flatten()[16:].any()


def test_an_operator_before_a_launch_is_replayed_too(kernel, tmp_path, gpu):
    launcher = Launcher("digest", Cache(tmp_path))
    out, dout, *_ = arguments()

    def call():
        copied = out.transpose(1, 2).contiguous().transpose(1, 2)
        return host(launcher, kernel, copied, dout)

    (_,), recording = replay.record(call, [out, dout], [])
    out, dout, *_ = arguments()
    (delta,) = recording.play([out, dout])
    assert torch.equal(delta.flatten()[:16], first(out.transpose(1, 2).contiguous()))


def test_a_fresh_tensor_seen_through_one_view_is_made_as_it(kernel, tmp_path, gpu):
    launcher = Launcher("digest", Cache(tmp_path))
    out, dout, *_ = arguments()

    def call():
        delta = torch.empty(2, 48, 3).transpose(1, 2)
        strides = (*out.stride()[:3], *dout.stride()[:3])
        launcher(kernel, 6, (out, dout, delta, delta, *strides, 3, 48), META)
        torch.empty(5)  # of no use
        return (delta,)

    (made,), recording = replay.record(call, [out, dout], [])
    assert [type(step) for step in recording.steps] == [Make, Direct]
    (delta,) = recording.play([out, dout])
    assert delta.shape == made.shape
    assert delta.stride() == made.stride()


@pytest.mark.parametrize(
    "finish",
    [lambda delta: (delta * delta[0, 0, 0].item(),), lambda delta: (delta[delta > 0],)],
    ids=["item", "mask"],
)
def test_what_depends_on_values_is_not_recorded(kernel, tmp_path, gpu, finish):
    launcher = Launcher("digest", Cache(tmp_path))
    out, dout, *_ = arguments()
    results, recording = replay.record(lambda: host(launcher, kernel, out, dout, finish), [out, dout], [])
    assert recording is None
    assert len(results) == 1


def test_a_tensor_that_comes_from_elsewhere_is_not_recorded(kernel, tmp_path, gpu):
    launcher = Launcher("digest", Cache(tmp_path))
    out, dout, *_ = arguments()
    _, recording = replay.record(lambda: host(launcher, kernel, out, dout), [out], [])
    assert recording is None


def test_default_inputs_stay_what_they_were(kernel, tmp_path, gpu):
    launcher = Launcher("digest", Cache(tmp_path))
    out, dout, *_ = arguments()
    _, recording = replay.record(lambda: host(launcher, kernel, out, dout), [dout], [out])
    (delta,) = recording.play([torch.randn_like(dout)])
    assert torch.equal(delta.flatten()[:16], first(out))


def test_host_code_that_runs_for_its_launches_alone_leaves_no_step(kernel, tmp_path, gpu):
    launcher = Launcher("digest", Cache(tmp_path))
    out, dout, *_ = arguments()

    def call():
        ghosts = launch.ghost(out), launch.ghost(dout)
        launch.collect(lambda: host(launcher, kernel, *ghosts), 0)
        return host(launcher, kernel, out, dout)

    _, recording = replay.record(call, [out, dout], [])
    assert [type(step) for step in recording.steps] == [Make, Direct]


def test_the_kernel_with_the_longest_text_is_compiled_first():
    class Begins:
        def begin(self, kernel, *call):
            return Future()

    module = ac.compile("causal").engine.modules.load(Features(16, 16))
    kernels = [module.delta_kernel, module.forward_kernel, module.delta_kernel, module.dkdv_kernel]
    found = launch.collect(lambda: launch.trace.jobs.extend(launch.Job(Begins(), k, (), {}) for k in kernels), 0)
    assert [name for name, _ in found] == ["dkdv_kernel", "forward_kernel", "delta_kernel", "delta_kernel"]


def test_a_kernel_is_as_long_as_what_it_calls():
    """The forward waits for prepare, whose equations are solved by a function of its module."""

    def effort(kernel):
        return launch._effort(launch.Job(None, kernel, (), {}))

    module = ac.compile("gated_delta_net").engine.module(128, 128, False)
    assert len(module.prepare_kernel.src) < len(module.carry_back_kernel.src)
    kernels = [module.carry_back_kernel, module.carry_kernel, module.gradients_kernel, module.prepare_kernel]
    names = [kernel.__name__ for kernel in sorted(kernels, key=effort, reverse=True)]
    assert names == ["gradients_kernel", "prepare_kernel", "carry_back_kernel", "carry_kernel"]


@pytest.mark.parametrize("change", ["shape", "stride", "dtype", "alignment", "which is misaligned", "same", "scalar"])
def test_calls_of_another_kind_have_another_key(change):
    def misaligned(x):
        return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)

    q, k, v = torch.empty(3, 1, 2, 8, 16)
    before, after = (q, k, v, 0.5), (q, k, v, 0.5)
    inputs = [{"a": 1.0}, {"a": 1.0}]
    if change == "shape":
        after = (q[:, :, :4], k, v, 0.5)
    elif change == "stride":
        after = (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, 0.5)
    elif change == "dtype":
        after = (q.half(), k, v, 0.5)
    elif change == "alignment":
        after = (misaligned(q), k, v, 0.5)
    elif change == "which is misaligned":
        before, after = (misaligned(q), k, v, 0.5), (q, misaligned(k), v, 0.5)
    elif change == "same":
        after = (q, q, v, 0.5)
    else:
        inputs[1] = {"a": 2.0}
    assert replay.key_of(*before, inputs[0]) == replay.key_of(*before, dict(inputs[0]))
    assert replay.key_of(*before, inputs[0]) != replay.key_of(*after, inputs[1])


def test_threads_that_replay_one_recording_keep_their_tensors_apart(kernel, tmp_path, gpu, monkeypatch):
    launcher = Launcher("digest", Cache(tmp_path))
    out, dout, *_ = arguments()
    _, recording = replay.record(lambda: host(launcher, kernel, out, dout), [out, dout], [])
    seen = []

    def slow(self, grid, addresses):
        before = ctypes.string_at(addresses[0], 8)
        time.sleep(0.002)
        seen.append((before, ctypes.string_at(addresses[0], 8)))

    monkeypatch.setattr(FakeFunction, "launch", slow)
    outs = [torch.randn_like(out) for _ in range(16)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda t: recording.play([t, dout]), outs))
    assert sorted(ctypes.c_uint64.from_buffer_copy(a).value for a, _ in seen) == sorted(t.data_ptr() for t in outs)
    assert all(a == b for a, b in seen)


def test_a_tape_needs_nothing_of_dynamo():
    """PyTorch wraps a mode's dispatch in a guard that imports all of Dynamo when it is first called, or lets it be."""
    assert not hasattr(replay._Tape.__torch_dispatch__, "__wrapped__")
