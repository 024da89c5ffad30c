"""What stands between flash-linear-attention's tuning and ours: Triton's tuner, without a kernel or a GPU."""

import triton
from triton.runtime.autotuner import Autotuner

from bench.fla import compiled_ahead, tuning_briefly


class Kernel:
    """What a tuner needs of a kernel: a function, and `run`, whose calls are kept."""

    def __init__(self):
        self.calls = []
        self.fn = lambda x, BLOCK: None

    def run(self, *args, **kwargs):
        self.calls.append((args, kwargs))


def tuner_of(blocks):
    kernel = Kernel()
    configs = [triton.Config({"BLOCK": block}, num_warps=4) for block in blocks]
    return kernel, Autotuner(kernel, ["x", "BLOCK"], configs, ["x"], None, None)


def test_the_shares_are_all_configurations_and_none_is_launched():
    compiled = []
    for share in range(3):
        kernels = [tuner_of(blocks) for blocks in ((16, 32, 64, 128), (16,), (32, 64, 128))]
        with compiled_ahead(share, 3):
            for _, tuner in kernels:
                tuner[(1,)](1)
        compiled.append([(i, kw["BLOCK"]) for i, (kernel, _) in enumerate(kernels) for _, kw in kernel.calls])
        assert all(kw["warmup"] for kernel, _ in kernels for _, kw in kernel.calls)
    assert max(map(len, compiled)) - min(map(len, compiled)) <= 1
    assert sorted(each for share in compiled for each in share) == [
        *((0, block) for block in (16, 32, 64, 128)),
        (1, 16),
        *((2, block) for block in (32, 64, 128)),
    ]


def test_what_was_tuned_before_is_compiled_alone(monkeypatch):
    kernel, tuner = tuner_of((16, 32, 64))

    def known(self, key, configs, measure):
        self.cache[key] = configs[1]
        return True

    monkeypatch.setattr(Autotuner, "check_disk_cache", known)
    tuner.cache_results = True
    with compiled_ahead(0, 1):
        tuner.run(1, warmup=False)
    assert kernel.calls == [((1,), {"warmup": True, **tuner.configs[1].all_kwargs()})]
    assert tuner.fn is kernel


def test_a_tuner_measures_as_before_when_the_block_ends():
    plain = dict(Autotuner.__dict__)
    with compiled_ahead(0, 1), tuning_briefly():
        _, tuner = tuner_of((16, 32))
        assert tuner.do_bench.keywords["rep"] < 100
    assert dict(Autotuner.__dict__) == plain
