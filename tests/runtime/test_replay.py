"""Recordings of calls, as far as they need no GPU."""

from __future__ import annotations

import torch

from attncc.runtime.replay import Recorder


def test_a_counter_of_a_launch_begins_at_zero_each_time():
    recorder = Recorder()

    def call():
        out, scratch = torch.empty(3), torch.empty(2)
        counter = recorder.zeros(torch.device("cpu"))
        recorder.launches.append((None, 1, (q, scratch, counter, out)))
        return (out,)

    q = torch.ones(1)
    _, recording = recorder.record(call, [q], [])
    assert [shape for shape, _, _ in recording.made] == [(3,), (2,), (1,)]
    assert recording.zeroed == (2,)
    assert recorder.zeros(torch.device("cpu")).item() == 0
    assert recorder.zeroed == []
