"""The op inside PyTorch on a GPU: compile, dispatcher, autocast, CUDA graphs, threads, devices, standalone files."""

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import attncc as ac
from attncc.codegen.standalone import standalone
from attncc.schedule.choose import choose
from attncc.schedule.device import device_of


def tensors(*shape, dtype=torch.bfloat16, grad=False):
    return tuple(torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=grad) for _ in range(3))


class Block(nn.Module):
    """A small transformer block whose attention is an attncc op with a learned input and a loss on lse."""

    def __init__(self, op, dim=128, heads=4):
        super().__init__()
        self.op, self.heads = op, heads
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.slopes = nn.Parameter(torch.rand(heads))

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        out, lse = self.op(q, k, v, slopes=self.slopes, outputs=("out", "lse"))
        x = x + self.out(out.transpose(1, 2).reshape(b, n, d)) + 0.01 * lse.mean()
        return x + self.mlp(x)


def test_fullgraph_compile_of_a_block_agrees_with_eager():
    block = Block(ac.compile("alibi")).cuda()
    x = torch.randn(2, 100, 128, device="cuda")
    eager = block(x)
    eager.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in block.named_parameters()}
    block.zero_grad()
    compiled = torch.compile(block, fullgraph=True)(x)
    compiled.square().sum().backward()
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    for name, p in block.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-3 * float(expected[name].abs().max()))


@pytest.mark.parametrize("name", ["causal", "alibi", "softcap", "taylor"])
def test_opcheck(name):
    op = ac.compile(name, plan="parallel")
    inputs = {"slopes": torch.randn(2, device="cuda", requires_grad=True)} if name == "alibi" else {}
    q, k, v = tensors(1, 2, 64, 32, dtype=torch.float16, grad=True)
    torch.library.opcheck(op.torch_op(), op.torch_args(q, k, v, **inputs))


def test_autocast_casts_as_pytorch_does():
    q, k, v = tensors(1, 2, 64, 32, dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        assert ac.compile("causal")(q, k, v).dtype == torch.bfloat16


def test_cuda_graph_replays_on_new_values():
    op = ac.compile("document")
    q, k, v = tensors(1, 2, 256, 64)
    doc = (torch.arange(256, device="cuda") // 50)[None].int()
    for _ in range(2):
        op(q, k, v, doc=doc)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op(q, k, v, doc=doc)
    q.copy_(torch.randn_like(q))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, op(q, k, v, doc=doc))


def test_threads_share_an_op():
    op = ac.compile("softcap")
    inputs = [tensors(1, 2, 100 + i, 64) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda qkv: op(*qkv), inputs))
    assert all(torch.equal(out, op(*qkv)) for out, qkv in zip(found, inputs, strict=True))


def test_a_replayed_call_tells_its_tensors_apart():
    op = ac.compile("causal")
    q, k, v = tensors(1, 2, 64, 64)
    with torch.no_grad():
        op(q, q, q)  # one tensor three times, then three tensors of the same kind
        for _ in range(2):
            out = op(q, k, v)
    exact = ac.reference(ac.variants.get("causal"), q, k, v)
    assert (out - exact).abs().max() < 2e-2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_two_devices_in_one_process():
    op = ac.compile("alibi")
    q, k, v = tensors(1, 2, 100, 64)
    here = op(q, k, v)
    there = op(*(t.to("cuda:1") for t in (q, k, v)))
    assert there.device.index == 1
    assert torch.equal(here.cpu(), there.cpu())


def test_tensors_on_two_devices_are_an_error():
    q, k, v = tensors(1, 2, 64, 32)
    with pytest.raises(ac.InputError):
        ac.compile("causal")(q, k.cpu(), v)


def test_a_standalone_file_runs_without_attncc(tmp_path):
    op = ac.compile("sink")
    sizes = {"b": 1, "h": 4, "h_kv": 2, "q_idx": 300, "kv_idx": 300, "d_qk": 64, "d_v": 64}
    device = device_of("cuda")
    schedule = choose(op.engine.problem(sizes, torch.bfloat16, {}), device)
    path = tmp_path / "kernel.py"
    path.write_text(standalone(op.plan, 64, 64, schedule, "bf16", device))
    probe = (
        "import sys; sys.path.insert(0, '.'); import kernel; "
        "assert not any(m.startswith('attncc.') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, check=True)
    spec = importlib.util.spec_from_file_location("kernel", path)
    kernel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
    q = torch.randn(1, 4, 300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(1, 2, 300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    sink = torch.randn(4, device="cuda", requires_grad=True)
    ours = kernel.attention(q, k, v, sink=sink)
    theirs = op(q, k, v, sink=sink)
    assert torch.equal(ours, theirs)
    grads = [torch.autograd.grad(out, (q, k, v, sink), torch.ones_like(out)) for out in (ours, theirs)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
