"""`AttentionOp`: a variant over all pairs as a PyTorch operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attncc.codegen.plan import Plan
from attncc.errors import UnsupportedError
from attncc.ir.graph import VariantGraph
from attncc.passes.phases import phases
from attncc.passes.running import running_sums, without_running_sums
from attncc.runtime import library
from attncc.runtime.engine import Engine
from attncc.runtime.kinds import Kind, Kinds
from attncc.runtime.made import Maker
from attncc.runtime.refusals import no_statistic
from attncc.runtime.remade import Remade
from attncc.runtime.running import with_running_sums
from attncc.runtime.shapes import (
    auxiliary_names,
    bind,
    output_names,
    read_inputs,
    refuse_gradient,
    value_of,
    with_captured,
    without_captured,
)
from attncc.schedule.cache import Cache
from attncc.schedule.problem import Backend, Dtype, Precision, Schedule

if TYPE_CHECKING:
    from attncc.runtime.outputs_call import OutputsCall


class AttentionOp(Remade):
    """A compiled variant. Call it with q (B, Hq, M, Dqk), k (B, Hkv, N, Dqk), v (B, Hkv, N, Dv) and the variant's
    inputs.

    Gradients flow to q, k, v and every input declared with grad, also through `lse`. CUDA tensors run the generated
    Triton kernels; CPU tensors run the same kernels through Triton's interpreter, which is for checking, not for
    speed.
    """

    def __init__(
        self,
        graph: VariantGraph,
        schedule: Schedule | None = None,
        precision: Precision | None = None,
        backend: Backend | None = None,
        deterministic: bool = False,
    ):
        self.graph = graph
        found = phases(graph)
        self._makers = tuple(
            Maker(made, lambda g: AttentionOp(g, precision=precision, backend=backend, deterministic=deterministic))
            for made in found.made
        )
        self._captured = tuple(d for d in graph.inputs if d.captured)
        self._constant = tuple(d for d in graph.inputs if not d.grad)
        self._main = found.main
        self._sums = running_sums(found.main)
        self._plain = without_running_sums(without_captured(found.main))
        # a normalizer that does not stream is refused here, not at the first call
        self.engine = Engine(self._plain.core, schedule, precision, backend, deterministic=deterministic)
        self._schedule, self._backend = schedule, backend
        self.plan = self.engine.plan
        asked = (schedule, precision, backend, deterministic)
        self._made_of = (graph, *asked)
        self._token = "" if asked == (None, None, None, False) else f":{asked}"
        self.kinds = Kinds(self.engine)
        self._key = library.register(f"{self.engine.graph.digest}{self._token}", self.kinds)
        self._stored = self.plan.facts.stored
        self._calls: dict[tuple[str, ...], OutputsCall] = {}

    def __repr__(self) -> str:
        return f"<AttentionOp {self.graph.name} {self.graph.digest}>"

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        *,
        scale: float | None = None,
        outputs: str | Sequence[str] = "out",
        **inputs: Any,
    ) -> Any:
        """out (B, Hq, M, Dv) in q's dtype; with `outputs=("out", "lse")` also lse (B, Hq, M), float32, natural log.

        `outputs` may also name the variant's auxiliary outputs: float32, or int64 where they count or point. What is
        not asked for is not computed, and inputs that it alone reads need not be given.

        `scale` is 1/sqrt(Dqk) unless given. Under autocast q, k, v are cast as PyTorch's own attention does.
        Raises InputError where tensors do not match the variant, UnsupportedError for a device or output that it has
        not.
        """
        if v is None or self.graph.value is not None:
            v = value_of(self.graph, k, v).detach()  # its gradient is part of that of k
        q, k, v = autocast(q, k, v)
        inputs = self.kernel_inputs(q, k, scale, inputs)
        traced = is_traced(q, k, v)
        if not traced and transformed():
            refuse_transforms(q, k, v, *inputs.values())
        graph = self.engine.graph
        if self.graph.outputs:
            auxiliary, inputs = self._auxiliary(outputs, inputs)
            if auxiliary is not None:
                return auxiliary(q, k, v, scale, inputs, outputs, traced, _wants_gradient(q, k, v, inputs))
        results: Any
        if traced:
            bound = bind(graph, q, k, v, scale, inputs)
            scalars = [float(x) for x in bound.scalars.values()]
            results = library.forward_op(q, k, v, list(bound.tensors.values()), scalars, bound.scale, self._key)
            return results[0] if outputs == "out" else self._pick(results, outputs)
        tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)} if inputs else inputs
        key, kind = self.kinds.known(q, k, v, scale, inputs) if q.is_cuda else (None, None)
        only_out = outputs == "out"
        if _wants_gradient(q, k, v, tensors):
            if kind is not None:
                results = library.attend(kind, only_out, q, k, v, *tensors.values())
            else:
                for decl in self._constant:
                    refuse_gradient(decl, inputs.get(decl.name))
                kind = Kind(self.kinds, key, bind(graph, q, k, v, scale, inputs), tuple(tensors))
                results = library.EagerAttention.apply(kind, only_out, q, k, v, *tensors.values())
            return results if only_out else self._pick(results, outputs)
        if kind is None:
            kind = Kind(self.kinds, key, bind(graph, q, k, v, scale, inputs), tuple(tensors))
        results = self.kinds.forward(kind, (q, k, v, *tensors.values()))
        return results[0] if only_out else self._pick(results, outputs)

    def kernel_inputs(self, q: Tensor, k: Tensor, scale: float | None, inputs: dict[str, Any]) -> dict[str, Any]:
        """A call's inputs, and those that kernels need besides: captured ones, outputs of auxiliary ops, running
        sums."""
        if self._captured:
            inputs = with_captured(self._captured, q, k, inputs)
        for maker in self._makers:
            inputs = {**inputs, maker.made.name: maker(q, k, scale, inputs)}
        if self._sums:
            inputs = with_running_sums(self._sums, self._main, self._plain, inputs, q, k)
        return inputs

    def _auxiliary(
        self, outputs: str | Sequence[str], inputs: dict[str, Any]
    ) -> tuple[OutputsCall | None, dict[str, Any]]:
        """The call object for the auxiliary outputs that a call asks for, or None, and the inputs that the call
        needs."""
        names = auxiliary_names(self.graph, outputs)
        if not names:
            return None, read_inputs(self.graph, self.engine.graph, inputs)
        if names not in self._calls:
            from attncc.runtime.outputs_call import OutputsCall

            self._calls[names] = OutputsCall(self._plain, names, self.kinds, self._token)
        call = self._calls[names]
        return call, read_inputs(self.graph, call.graph, inputs)

    def _pick(self, results: Any, outputs: str | Sequence[str]) -> Any:
        picked = []
        for name in output_names(outputs, self.graph):
            if name == "out":
                picked.append(results[0])
            elif self.graph.branches > 1:
                from attncc.runtime.reference import no_lse_of_branches

                raise no_lse_of_branches(self.graph)
            elif name in self._stored:
                picked.append(results[1 + self._stored.index(name)])
            else:
                raise no_statistic(self.graph, name)
        return picked[0] if len(picked) == 1 else tuple(picked)

    def free_sums(self) -> frozenset[str]:
        """The gradients that backwards so far summed in no fixed order, so that a repeated call may differ in its last
        bits: "dq", and inputs with an entry per distance; empty if there were none."""
        return self.engine.free_sums()

    def source(self, d_qk: int = 128, d_v: int | None = None) -> str:
        """The source of the generated module for head dimensions d_qk (of one branch) and d_v (default: d_qk), in 16
        bits and the requested backend, as it runs on this machine's GPU.

        Without a GPU: the portable form, which runs on any other.
        """
        from attncc.runtime.explain import sizes_of  # what only explains is imported where it is asked to

        sizes = sizes_of(d_qk=d_qk, d_v=d_v, graph=self.graph)
        return self.engine.source_here(sizes["d_qk"], sizes["d_v"])

    def explain(
        self,
        q_len: int = 8192,
        kv_len: int | None = None,
        batch: int = 1,
        heads: int = 16,
        kv_heads: int | None = None,
        d_qk: int = 128,
        d_v: int | None = None,
        dtype: Dtype = "bf16",
        target: str | None = None,
        **scalars: float,
    ) -> str:
        """The text of `attncc explain`: the derivation, and the schedule of a call of these sizes with the candidates
        beside it.

        `target` is a device or architecture ("h100", "sm_90"); None means this machine's GPU, else the H100. `scalars`
        are the variant's own; others have their defaults. Raises UnsupportedError for an unknown target."""
        from attncc.runtime.explain import explain, explained_device, sizes_of

        sizes = sizes_of(q_len, kv_len, batch, heads, kv_heads, d_qk, d_v, self.graph)
        device, precision = explained_device(target), self.engine.precision()
        cache, schedule, backend = Cache(), self._schedule, self._backend
        plan = Plan(self.graph) if self.graph is not self.engine.graph else self.plan
        asked: dict[str, Any] = {"schedule": schedule, "backend": backend, "ordered": self.engine.ordered()}
        return explain(plan, sizes, dtype, device, scalars, precision, cache, **asked)

    def torch_op(self, outputs: str | Sequence[str] = "out") -> Any:
        """The registered operator of a call that asks for these outputs, for `torch.library.opcheck`."""
        call, _ = self._auxiliary(outputs, {})
        return torch.ops.attncc.forward.default if call is None else torch.ops.attncc.forward_outputs.default

    def torch_args(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        outputs: str | Sequence[str] = "out",
        **inputs: Any,
    ) -> tuple[Any, ...]:
        """The arguments with which a call reaches the registered operator."""
        inputs = self.kernel_inputs(q, k, scale, inputs)
        call, inputs = self._auxiliary(outputs, inputs)
        if call is not None:
            return call.torch_args(q, k, v, scale, inputs)
        bound = bind(self.engine.graph, q, k, v, scale, inputs)
        scalars = [float(x) for x in bound.scalars.values()]
        return (q, k, v, list(bound.tensors.values()), scalars, bound.scale, self._key)


_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def is_traced(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether operators or shapes are being traced instead of values. Tensor subclasses, such as fake tensors, must
    never reach a kernel."""
    return (
        torch.compiler.is_compiling()
        or not (type(q) in _PLAIN and type(k) in _PLAIN and type(v) in _PLAIN)
        or q.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def transformed() -> bool:
    """Whether tensors may be wrapped by a transform that adds meaning to their values: a batch dimension, or
    tangents."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_transforms(*values: Any) -> None:
    """Raise UnsupportedError for a tensor that torch.func has wrapped, which no kernel can read, and for one with a
    tangent, which the results would lack."""
    tensors = [x for x in values if isinstance(x, Tensor)]
    dual = forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    if dual or any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors):
        raise UnsupportedError(
            "torch.func's transforms (vmap, grad, jvp, ...), and derivatives in forward mode, do not go through an "
            "attncc op",
            remedy="make what vmap goes over a part of the batch; take gradients by torch.autograd",
        )


def _wants_gradient(q: Tensor, k: Tensor, v: Tensor, inputs: Mapping[str, Any]) -> bool:
    if not torch.is_grad_enabled():
        return False
    if q.requires_grad or k.requires_grad or v.requires_grad:
        return True
    return any(isinstance(x, Tensor) and x.requires_grad for x in inputs.values())


def autocast(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
    """The tensors in the dtype that PyTorch's own attention casts them to under autocast; elsewhere as they are."""
    try:
        if not torch.is_autocast_enabled("cuda" if q.is_cuda else q.device.type):
            return q, k, v
    except (AttributeError, RuntimeError):
        return q, k, v  # no tensor, or on a device that has no autocast: what checks the call says so
    dtype = torch.get_autocast_dtype(q.device.type)
    return [t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (q, k, v)]
