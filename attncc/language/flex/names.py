"""PyTorch's functions by how tracing treats them, by PyTorch's names."""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: what a tensor answers without its data
FACTS = _names("""
    dim size numel nelement ndimension element_size is_floating_point is_complex is_signed is_contiguous stride
    get_device is_tensor __hash__ __len__
""")
ATTRIBUTES = _names("""
    shape dtype device ndim layout requires_grad is_cuda is_cpu is_leaf is_sparse itemsize nbytes is_meta is_quantized
    grad_fn
""")
#: what asks for the data itself
VALUES = _names("""
    __bool__ __int__ __float__ __index__ __complex__ __array__ __contains__ item tolist numpy is_nonzero equal allclose
    nonzero argwhere masked_select unique
""")
RANDOM = _names("""
    rand randn randint randperm rand_like randn_like randint_like bernoulli multinomial normal poisson binomial
    dropout alpha_dropout feature_dropout feature_alpha_dropout dropout1d dropout2d dropout3d native_dropout
    gumbel_softmax rrelu
""")
IN_PLACE_OPERATORS = _names("""
    __setitem__ __delitem__ __iadd__ __isub__ __imul__ __idiv__ __itruediv__ __ifloordiv__ __imod__ __ipow__
    __iand__ __ior__ __ixor__ __ilshift__ __irshift__
""")
#: constant tensors shaped like another, and what they hold; None: an argument says it
NEW = {
    "zeros_like": 0,
    "ones_like": 1,
    "new_zeros": 0,
    "new_ones": 1,
    "full_like": None,
    "new_full": None,
    "new_tensor": None,
}
#: what gives its argument back
SAME = _names("clone contiguous alias pin_memory cpu cuda resolve_conj resolve_neg")
CASTS = _names("to type type_as float double half bfloat16 int long short char byte bool _to_copy convert_element_type")
#: what only moves elements: what it does to numbers it does to cells
MOVES = _names("""
    reshape reshape_as view view_as flatten unflatten ravel squeeze unsqueeze expand expand_as broadcast_to
    broadcast_tensors permute transpose swapaxes swapdims movedim moveaxis t T mT cat concat concatenate stack hstack
    vstack unbind chunk split tensor_split select narrow flip roll repeat tile repeat_interleave diagonal
""")
#: operators of these libraries mean what PyTorch's functions of the same name do; `approx` is attention-gym's tanh
NAMESPACES = ("aten", "prims", "approx")


def in_place(name: str) -> bool:
    """Whether a function of this name modifies its argument."""
    if name.startswith("__"):
        return name in IN_PLACE_OPERATORS
    return name.endswith("_")
