"""The op on CPU tensors: the generated kernels in Triton's interpreter, and its manners inside PyTorch."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attncc as ac
from attncc.codegen.crosscompile import cross_compile
from attncc.errors import InputError, SpecError, UnsupportedError
from attncc.runtime.modules import Features
from attncc.runtime.samples import Shape, sample_inputs
from attncc.runtime.verify import verify_variant
from attncc.schedule import KernelSchedule, Schedule, device_for

TINY = Shape(1, 2, 1, 19, 23, 16, 16, strided=True)


def tensors(batch=1, heads=2, q_len=9, kv_len=9, d_qk=16, d_v=16, kv_heads=None, dtype=torch.float32, grad=False):
    generator = torch.Generator().manual_seed(0)
    kv_heads = kv_heads or heads
    shapes = ((batch, heads, q_len, d_qk), (batch, kv_heads, kv_len, d_qk), (batch, kv_heads, kv_len, d_v))
    return tuple(torch.randn(s, generator=generator).to(dtype).requires_grad_(grad) for s in shapes)


def failures(rows):
    return [f"{r.shape} {r.check} repeatable={r.repeatable}" for r in rows if not r.ok]


@pytest.mark.parametrize("name", ac.variants.names())
def test_shipped_variants_in_float32(name):
    assert failures(verify_variant(ac.variants.get(name), shapes=[TINY])) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["sink", "taylor"])
def test_16_bits(name, dtype):
    assert failures(verify_variant(ac.variants.get(name), dtype=dtype, shapes=[TINY])) == []


def unit_length(score, row):
    p = ac.exp(score - row.max(score))
    return p / ac.sqrt(row.sum(p * p))


IN_PYTHON = ac.Variant(
    score=lambda score, h, q_idx, kv_idx, gain: score * gain[h] - ac.abs(q_idx - kv_idx) / 8,
    mask=ac.causal & ac.window(5, 0) | ac.prefix(2),
    normalizer=unit_length,
    inputs={"gain": ac.Input("h", grad=True)},
)
IN_TOML = """
[stages]
score = "score * gain[h] - abs(q_idx - kv_idx) / 8"
mask = "causal & window(5, 0) | prefix(2)"
normalizer = '''
p = exp(score - row.max(score))
p / sqrt(row.sum(p * p))'''
[inputs]
gain = { index = ["h"], grad = true }
"""


def test_what_nobody_shipped_is_right_in_both_forms_to_the_bit():
    assert failures(verify_variant(IN_PYTHON, shapes=[TINY])) == []
    found = []
    for variant in (IN_PYTHON, ac.loads_toml(IN_TOML)):
        sample = sample_inputs(variant.graph, TINY, torch.float32)
        leaves = [x.requires_grad_() for x in (sample.q, sample.k, sample.v, sample.inputs["gain"])]
        out, lse = ac.compile(variant)(*leaves[:3], gain=leaves[3], outputs=("out", "lse"))
        found.append((out, lse, *torch.autograd.grad((out.sum(), lse.sum()), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


UNUSUAL = (
    ac.window(1, 1) | ac.prefix(2) | ac.block_diagonal(4) | ac.dilated(5) | (lambda kv_idx: kv_idx == 11),
    ac.causal & ac.document("doc") | ac.prefix(3),
    ~ac.window(3, 2),
    (lambda q_idx, kv_idx: (kv_idx >= 2) & (kv_idx < 40) & (q_idx < 45)),
)


@pytest.mark.parametrize("mask", UNUSUAL, ids=["five terms", "scanned", "two ranges", "constants"])
def test_unusual_masks(mask):
    small = KernelSchedule(16, 16, 1, 1)
    op = ac.compile(ac.Variant(mask=mask), schedule=Schedule(small, small, small))
    rows = verify_variant(ac.Variant(mask=mask), shapes=[Shape(1, 2, 2, 50, 66, 16, 16)], op=op)
    assert failures(rows) == []


def test_a_factor_of_each_query_head_among_heads_that_share_keys():
    variant = ac.Variant(score=lambda score, h: score / (1 + h), mask=ac.causal)
    assert failures(verify_variant(variant, shapes=[Shape(1, 4, 2, 19, 23, 16, 16)])) == []


def test_a_constant_denominator_has_an_lse():
    variant = ac.Variant(normalizer=lambda score: ac.exp(-(score**2)), mask=ac.causal)
    assert failures(verify_variant(variant, shapes=[Shape(1, 2, 1, 19, 7, 16, 16)])) == []


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_agrees():
    q, k, v = tensors(2, 4, 17, 17)
    slopes = torch.tensor(ac.alibi_slopes(4))

    def score_mod(score, b, h, q_idx, kv_idx):
        return 20 * torch.tanh((score + slopes[h] * (kv_idx - q_idx)) / 20)

    block_mask = create_block_mask(lambda b, h, i, j: (j <= i) & (i - j < 6), None, None, 17, 17, device="cpu")
    theirs = flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask)
    variant = ac.Variant(score=ac.alibi() >> ac.softcap(20.0), mask=ac.causal & ac.sliding_window(6))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    ours = ac.compile(variant)(q, k, v)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    # flex_attention refuses a backward on the CPU: here its formula is plain PyTorch
    i, j = torch.arange(17)[:, None], torch.arange(17)
    score = score_mod(q @ k.mT / 4, None, torch.arange(4)[:, None, None], i, j)
    plain = score.masked_fill((j > i) | (i - j >= 6), -torch.inf).softmax(-1) @ v
    found, expected = (torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (ours, plain))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["causal", "alibi", "softcap"])
def test_opcheck(name):
    op = ac.compile(name)
    inputs = {"slopes": torch.tensor([0.5, 0.25], requires_grad=True)} if name == "alibi" else {}
    q, k, v = tensors(grad=True)
    found = torch.library.opcheck(op.torch_op(), op.torch_args(q, k, v, **inputs))
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("transposed", [False, True])
def test_fake_tensors_have_the_layout_of_real_ones(transposed):
    op = ac.compile("sink")

    def call():
        q = torch.randn((2, 9, 4, 16) if transposed else (2, 4, 9, 16), dtype=torch.bfloat16)
        k, v = torch.randn(2, 2, 11, 16, dtype=torch.bfloat16), torch.randn(2, 2, 11, 8, dtype=torch.bfloat16)
        q = (q.transpose(1, 2) if transposed else q).requires_grad_()
        sink = torch.zeros(4, requires_grad=True)
        out, lse = op(q, k, v, sink=sink, outputs=("out", "lse"))
        return out, lse, *torch.autograd.grad(out.sum() + lse.sum(), (q, sink))

    with FakeTensorMode():
        fake = call()
    for a, b in zip(fake, call(), strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
    assert [x.dtype for x in fake] == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]


class Block(nn.Module):
    """Attention with a learned input and a loss on lse."""

    def __init__(self, op, dim=32, heads=2):
        super().__init__()
        self.op, self.heads = op, heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.slopes = nn.Parameter(torch.rand(heads))

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        out, lse = self.op(q, k, v, slopes=self.slopes, outputs=("out", "lse"))
        return self.out(out.transpose(1, 2).reshape(b, n, d)) + 0.1 * lse.mean()


def test_fullgraph_compile_has_the_gradients_of_eager():
    torch.manual_seed(0)
    block, x = Block(ac.compile("alibi")), torch.randn(1, 9, 32)
    found = []
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        block.zero_grad()
        out = run(x)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in block.parameters())])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


def test_autocast_casts_as_pytorchs_attention_does():
    q, k, v = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = ac.compile("causal")(q, k, v, outputs=("out", "lse"))
        assert nn.functional.scaled_dot_product_attention(q, k, v).dtype == out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert torch.equal(out, ac.compile("causal")(*(x.bfloat16() for x in (q, k, v))))


def test_outputs_come_in_the_order_asked_for():
    op, qkv = ac.compile("causal"), tensors()
    out, lse = op(*qkv, outputs=("out", "lse"))
    assert (out.shape, lse.shape, lse.dtype) == ((1, 2, 9, 16), (1, 2, 9), torch.float32)
    again, first = op(*qkv, outputs=("lse", "out"))
    assert torch.equal(out, first)
    assert torch.equal(lse, again)
    assert torch.equal(lse, op(*qkv, outputs="lse"))
    assert torch.equal(out, op(*qkv, outputs=("out",)))


def test_outputs_that_there_are_not():
    with pytest.raises(InputError, match="weights"):
        ac.compile("causal")(*tensors(), outputs=("out", "weights"))
    with pytest.raises(UnsupportedError, match="'sigmoid' has no row statistic, so there is no output 'lse'"):
        ac.compile("sigmoid")(*tensors(), outputs=("out", "lse"))


@pytest.mark.parametrize("name", ["causal", "alibi", "taylor", "sigmoid"])
@pytest.mark.parametrize(("b", "m", "n"), [(0, 3, 4), (1, 0, 4), (1, 3, 0)])
def test_empty_sizes(name, b, m, n):
    q, k, v = tensors(b, 2, m, n, grad=True)
    inputs = {"slopes": torch.ones(2, requires_grad=True)} if name == "alibi" else {}
    out = ac.compile(name)(q, k, v, **inputs)
    assert out.shape == (b, 2, m, 16)
    assert not out.any()
    found = torch.autograd.grad(out.sum(), (q, k, v, *inputs.values()))
    assert all(g.shape == x.shape and not g.any() for g, x in zip(found, (q, k, v, *inputs.values()), strict=True))


def test_a_row_without_keys_is_zero_and_its_lse_minus_infinity():
    q, k, v = tensors(q_len=9, kv_len=4, grad=True)
    out, lse = ac.compile("causal")(q, k, v, outputs=("out", "lse"))
    assert not out[:, :, :5].any()
    assert (lse[:, :, :5] == -torch.inf).all()
    assert lse[:, :, 5:].isfinite().all()
    (dq,) = torch.autograd.grad(out.sum() + lse[:, :, 5:].sum(), q)
    assert not dq[:, :, :5].any()
    assert dq.isfinite().all()


def test_views_give_the_bits_of_copies():
    base = torch.randn(2, 11, 3, 2, 24)  # batch, length, (q, k, v), head, and more than the head dim
    q, k, v = (base[:, :, i, :, 4:20].transpose(1, 2) for i in range(3))
    assert not q.is_contiguous()
    op = ac.compile("full")
    assert torch.equal(op(q, k, v), op(q.contiguous(), k.contiguous(), v.contiguous()))
    expanded = k[:, :1].expand(-1, 2, -1, -1)
    assert torch.equal(op(q, expanded, v), op(q, expanded.contiguous(), v))


def test_findings_about_inputs_reach_the_caller():
    q, k, v = tensors()
    with pytest.raises(InputError, match="no input 'slope'(.|\n)*did you mean 'slopes'"):
        ac.compile("alibi")(q, k, v, slope=torch.ones(2))
    with pytest.raises(InputError, match="'document' needs the input 'doc'"):
        ac.compile("document")(q, k, v)
    with pytest.raises(InputError, match="multiple of"):
        ac.compile("causal")(q, *tensors(heads=3)[1:])
    with pytest.raises(InputError, match=r"float64(.|\n)*ac.reference\(variant, q, k, v\) is in float64"):
        ac.compile("causal")(*(x.double() for x in (q, k, v)))
    with pytest.raises(InputError, match="precision"):
        ac.compile("causal", precision="fp8")
    with pytest.raises(InputError, match="KernelSchedule, not Schedule(.|\n)*forward, dkdv, dq"):
        ac.compile("causal", schedule=KernelSchedule(16, 16, 4, 1))
    with pytest.raises(UnsupportedError, match="no backend 'cuda'"):
        ac.compile("causal", backend="cuda")


@pytest.mark.parametrize("name", ["causal", "retention", "delta_net"])
def test_what_is_no_tensor_of_attention_is_said(name):
    op = ac.compile(name)
    q, k, v = tensors()
    beta = {"beta": torch.rand(1, 2, 9)} if name == "delta_net" else {}
    with pytest.raises(InputError, match="q is of type ndarray, not a tensor"):
        op(q.numpy(), k, v, **beta)
    with pytest.raises(InputError, match="v is of type ndarray, not a tensor"):
        op(q, k, v.numpy(), **beta)
    with pytest.raises(InputError, match="q has shape .*, expected 4 dimensions"):
        op(q[0], k, v, **beta)


def test_an_option_that_is_none_of_a_call_is_sent_where_it_belongs():
    q, k, v = tensors()
    op = ac.compile("causal")
    with pytest.raises(InputError, match="did you mean 'outputs'"):
        op(q, k, v, output="lse")
    with pytest.raises(InputError, match=r"ac\.Variant\(mask=ac\.causal\)"):
        op(q, k, v, is_causal=True)
    for option, remedy in {
        "softmax_scale": "write scale=",
        "return_lse": r'outputs=\("out", "lse"\)',
        "need_weights": r"ac\.outputs\.weights",
        "key_padding_mask": r"ac\.padding\(\)",
        "window_size": r"ac\.window\(left, right\)",
    }.items():
        with pytest.raises(InputError, match=f"no input '{option}'(.|\n)*{remedy}"):
            op(q, k, v, **{option: None})
    with pytest.raises(InputError, match=r"'slopes' is float64(.|\n)*pass slopes.float\(\)"):
        ac.compile("alibi")(q, k, v, slopes=torch.rand(2).double())
    with pytest.raises(SpecError, match="compile takes a Variant(.|\n)*ac.from_flex"):
        ac.compile(lambda score: score)


def test_a_normalizer_that_does_not_stream_is_refused_before_the_first_call():
    with pytest.raises(UnsupportedError, match="is not the weight times a factor"):
        ac.compile(ac.Variant(reduction=lambda weight, v_vec, row: row.sum(weight**2 * v_vec)))


def test_without_a_backward_there_is_still_a_forward(monkeypatch):
    def refuse(*_):
        raise UnsupportedError("nobody knows its derivative")

    monkeypatch.setattr("attncc.codegen.plan.differentiate", refuse)
    variant = ac.Variant(normalizer=lambda score, row: ac.exp(score - row.max(score)))
    q, k, v = tensors(grad=True)
    out = ac.compile(variant)(q, k, v)
    torch.testing.assert_close(out, ac.reference(variant, q, k, v).float(), rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedError, match="nobody knows its derivative"):
        out.sum().backward()


def test_only_wanted_gradients_are_computed():
    op = ac.compile("alibi")
    q, k, v = tensors()
    slopes = torch.rand(2, requires_grad=True)
    op(q, k, v, slopes=slopes).sum().backward()
    assert (q.grad, k.grad, v.grad) == (None, None, None)
    wanted = slopes.grad.clone()
    q.requires_grad_()
    op(q, k, v, slopes=slopes.detach()).sum().backward()
    assert torch.equal(slopes.grad, wanted)
    assert q.grad is not None
    with torch.no_grad():
        assert not op(q, k, v, slopes=slopes).requires_grad


def test_threads_interpret_in_turn():
    op = ac.compile("softcap")
    calls = [tensors(q_len=5 + i, kv_len=7) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda qkv: op(*qkv), calls))
    assert all(torch.equal(out, op(*qkv)) for out, qkv in zip(found, calls, strict=True))


def test_compiled_and_interpreted_kernels_take_turns():
    op, qkv = ac.compile("causal"), tensors()
    small = KernelSchedule(16, 16, 4, 1)

    def compiled():
        module = op.engine.modules.load(Features(16, 16))
        schedule = Schedule(small, small, small)
        found = cross_compile(module, op.graph, schedule, device_for("sm_90"), "fp16", only=("forward_kernel",))
        return found["forward_kernel"].ptx

    before = op(*qkv)
    text = compiled()
    assert ".version" in text
    assert torch.equal(op(*qkv), before)
    assert compiled() == text


@pytest.mark.parametrize("outputs", [("out",), ("out", "lse")], ids="+".join)
def test_the_gradient_of_a_slope_does_not_suffer_from_the_rounding_of_out(outputs):
    # a small sum of large terms: with delta taken from the rounded output alone its error is a few 1e-3
    q, k, v = tensors(q_len=48, kv_len=48, dtype=torch.float16)
    v = v + 1
    drawn = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(v.shape, generator=drawn).half(), torch.randn(v.shape[:3], generator=drawn)]
    cotangents = cotangents[: len(outputs)]

    def gradient(f, *tensors, dtype):
        slopes = torch.tensor([0.05, 0.01], dtype=dtype, requires_grad=True)
        found = f(*tensors, slopes=slopes, outputs=outputs)
        wanted = [c.to(x.dtype) for c, x in zip(cotangents, found, strict=True)]
        return torch.autograd.grad(found, slopes, wanted)[0].double()

    got = gradient(ac.compile("alibi"), q, k, v, dtype=torch.float32)
    exact = gradient(
        lambda *a, **kw: ac.reference("alibi", *a, **kw), q.double(), k.double(), v.double(), dtype=torch.float64
    )
    assert float((got - exact).norm() / exact.norm()) < 2e-5


def test_nor_does_that_of_a_slope_in_one_of_two_scores():
    # each score has a delta of its own, the first what the other's rounded part of out leaves of it
    both = ac.Variant(
        branches=2,
        score=lambda score, slopes, h, q_idx, kv_idx, branch: score + (1 + branch) * slopes[h] * (kv_idx - q_idx),
        mask=ac.causal,
        reduction=lambda weight, row, v_vec: row.sum((weight[0] - 0.6 * weight[1]) * v_vec),
        inputs={"slopes": ac.Input("h", grad=True)},
    )
    q, k, v = tensors(q_len=48, kv_len=48, dtype=torch.float16)
    direction = torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).half()

    def gradient(f, *tensors, dtype):
        slopes = torch.tensor([0.05, 0.01], dtype=dtype, requires_grad=True)
        return torch.autograd.grad(f(*tensors, slopes=slopes), slopes, direction.to(tensors[2].dtype))[0].double()

    v = v + 1
    got = gradient(ac.compile(both), q, k, v, dtype=torch.float32)
    exact = gradient(
        lambda *a, **kw: ac.reference(both, *a, **kw), q.double(), k.double(), v.double(), dtype=torch.float64
    )
    assert float((got - exact).norm() / exact.norm()) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_gates_summed_along_the_tokens_does_not_suffer_either(dtype):
    # each gate's is a sum over all tokens behind it, of what its key and its query each had a rounded delta in
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 2, 70, 64, dtype=dtype) for _ in range(3))
    f = torch.nn.functional.logsigmoid(torch.randn(1, 2, 70) + 2).requires_grad_()
    direction = torch.randn(1, 2, 70, 64, dtype=dtype)
    (got,) = torch.autograd.grad(ac.compile("forgetting", plan="parallel")(q, k, v, f=f), f, direction)
    g = f.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(ac.reference("forgetting", q, k, v, f=g), g, direction.double())
    assert float((got - exact).norm() / exact.norm()) < 2e-5


@pytest.mark.parametrize("outputs", ["out", ("out", "entropy")])
def test_a_gradient_of_a_gradient_is_refused_and_not_left_out(outputs):
    """The gradient that comes in is constant: what is differentiated twice is what the op has saved."""
    op = ac.compile(ac.Variant(mask=ac.causal, outputs={"entropy": ac.outputs.entropy}))
    q, k, v = (torch.randn(1, 1, 8, 16, requires_grad=True) for _ in range(3))
    result = op(q, k, v, outputs=outputs)
    loss = result.sum() if outputs == "out" else sum(x.sum() for x in result)
    (dq,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="no gradients of gradients"):
        torch.autograd.grad(dq.sum(), q, allow_unused=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="no gradients of gradients"):
        dq.square().sum().backward()


@pytest.mark.parametrize("base", [2**31 - 2, 2**33, -(2**40)])
def test_documents_with_numbers_of_64_bits(base):
    """What tiles are skipped by has the type of the numbers: cut to 32 bits, all documents were one or none."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 150, 16, generator=generator) for _ in range(3))
    doc = base + 2**32 * torch.randint(0, 5, (1, 150), generator=generator).sort(-1).values
    exact = ac.reference("document", q.double(), k.double(), v.double(), doc=doc)
    torch.testing.assert_close(ac.compile("document")(q, k, v, doc=doc).double(), exact, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", ["causal", "watched", "simple_gla", "delta_net"])
def test_transforms_of_torch_func_are_refused_where_they_reach_a_tensor(name):
    """A tangent that no result has would be a derivative of 0."""
    q, k, v = tensors()
    inputs = {"simple_gla": {"g": -torch.rand(1, 2, 9)}, "delta_net": {"beta": torch.rand(1, 2, 9)}}.get(name, {})
    watched = ac.Variant(outputs={"entropy": ac.outputs.entropy})
    made = ac.compile(watched) if name == "watched" else ac.compile(name)
    op = functools.partial(made, **inputs, **({"outputs": "entropy"} if name == "watched" else {}))
    with pytest.raises(UnsupportedError, match="vmap, grad, jvp(.|\n)*part of the batch"):
        torch.vmap(lambda x: op(x, k, v))(q[None])
    with pytest.raises(UnsupportedError, match=r"torch\.autograd"):
        torch.func.grad(lambda x: op(q, k, x).sum())(v)
    with pytest.raises(UnsupportedError, match="vmap, grad, jvp"):
        torch.func.jvp(lambda x: op(q, x, v), (k,), (k,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, q)
        with pytest.raises(UnsupportedError, match="derivatives in forward mode"):
            op(dual, k, v)
        assert torch.equal(op(q, k, v), op(forward_ad.unpack_dual(dual).primal, k, v))
    found = torch.vmap(lambda x: x + op(q, k, v).sum())(torch.zeros(2))
    assert torch.equal(found, op(q, k, v).sum().expand(2))


@pytest.mark.parametrize("name", ["causal", "simple_gla", "delta_net"])
def test_on_meta_there_are_shapes(name):
    q, k, v = tensors()
    inputs = {"simple_gla": {"g": -torch.rand(1, 2, 9)}, "delta_net": {"beta": torch.rand(1, 2, 9)}}.get(name, {})
    op = ac.compile(name)
    shaped = [x.to("meta").requires_grad_() for x in (q, k, v)]
    found, want = op(*shaped, **{n: x.to("meta") for n, x in inputs.items()}), op(q, k, v, **inputs)
    assert found.is_meta
    assert (found.shape, found.stride(), found.dtype) == (want.shape, want.stride(), want.dtype)
    assert [x.shape for x in torch.autograd.grad(found.sum(), shaped)] == [x.shape for x in (q, k, v)]


def test_torch_jit_trace_records_the_operator():
    op, gated = ac.compile("alibi"), ac.compile("simple_gla", plan="chunk")
    traced = torch.jit.trace(lambda q, k, v: op(q, k, v), tensors())
    longer = tensors(q_len=14, kv_len=14)
    assert torch.equal(traced(*longer), op(*longer))
    with pytest.raises(UnsupportedError, match=r"torch\.jit\.trace(.|\n)*use torch\.export"):
        torch.jit.trace(lambda q, k, v: gated(q, k, v, g=torch.zeros(1, 2, 9)), tensors())
