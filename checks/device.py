"""A device that is not the CPU, where there is none: a tensor in the wrong place ends the run.

What it is for: a tensor that is left on the CPU is no mistake there, and the first to find it would
be someone with a GPU. Tensors on "pretend:0" wrap CPU tensors and compute on the CPU, but what
mixes them with tensors on the CPU raises, as on CUDA. register() comes before lander is imported:

    library = device.register()
    import lander
    with device.OnPretend():
        lander.main(["--device", "pretend", ...])

What it does not show: speed, memory, kernels, and --checkpointing, whose backward pass runs in a
thread that no dispatch mode reaches.
"""

import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
# Operations that may read tensors of both kinds: moves between devices, and indices from the CPU.
MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default}
INDEXING |= {aten.index_put_.default, aten._index_put_impl_.default}


class Pretend(torch.Tensor):
    """A tensor on pretend:0, whose numbers are in .numbers, on the CPU."""

    @staticmethod
    def __new__(cls, numbers):
        options = {"dtype": numbers.dtype, "device": "pretend:0"}
        layout = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset()}
        self = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, **layout, **options)
        self.numbers = numbers
        return self

    def tolist(self):
        return self.numbers.tolist()

    def __bool__(self):
        return bool(self.numbers)

    def __int__(self):
        return int(self.numbers)

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


class OnPretend(TorchDispatchMode):
    """While open, what is made for the device pretend is a Pretend."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def check_places(operation, args, kwargs):
    """RuntimeError for a CPU tensor beside one on the device; numbers without dimensions may be."""
    if operation in INDEXING:
        args = (args[0], *args[2:])  # all but the indices
    for x in tree_leaves((args, kwargs)):
        on_cpu = isinstance(x, torch.Tensor) and not isinstance(x, Pretend)
        if on_cpu and x.dim() > 0 and x.device.type == "cpu":
            raise RuntimeError(f"{operation}: a tensor {list(x.shape)} is on the CPU")


def compute(operation, args, kwargs):
    """Do on the CPU what was asked for on either device, and wrap what belongs on pretend:0."""
    known = {id(x.numbers): x for x in tree_leaves((args, kwargs)) if isinstance(x, Pretend)}
    device = kwargs.get("device")
    made_there = device is not None and torch.device(device).type in ("pretend", "privateuseone")
    if not known and not made_there:
        return operation(*args, **kwargs)
    if known and operation not in MOVES:
        check_places(operation, args, kwargs)
    if made_there:
        kwargs = kwargs | {"device": torch.device("cpu")}
    unwrapped = tree_map_only(Pretend, lambda x: x.numbers, (args, kwargs))
    result = operation(*unwrapped[0], **unwrapped[1])
    if operation is aten.copy_.default:
        return args[0]
    if operation is aten._to_copy.default and device is not None and not made_there:
        return result  # it was moved here
    # An operation in place returns its argument.
    wrap = lambda x: known[id(x)] if id(x) in known else Pretend(x)
    return tree_map_only(torch.Tensor, wrap, result)


def register():
    """Give PyTorch the device, and replace what passes every dispatch mode by.

    -> what must be kept: with it goes what it registered
    """
    _setup_privateuseone_for_python_backend("pretend")
    torch.inference_mode = torch.no_grad  # wrapped tensors know no inference mode
    from_data, save_file = torch.tensor, safetensors.torch.save_file

    def empty_strided(size, stride, *, dtype=None, **options):
        return Pretend(torch.empty_strided(size, stride, dtype=dtype))

    def empty(size, *, dtype=None, **options):
        return Pretend(torch.empty(size, dtype=dtype))

    def copy_from(source, target, non_blocking=False):
        numbers = [x.numbers if isinstance(x, Pretend) else x for x in (source, target)]
        numbers[1].copy_(numbers[0])
        return target

    def tensor(data, *, device=None, **options):
        return from_data(data, **options).to(device)

    def save_from_cpu(tensors, *args, **options):
        save_file({name: x.to("cpu") for name, x in tensors.items()}, *args, **options)

    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    torch.tensor = tensor
    safetensors.torch.save_file = save_from_cpu  # a wrapped tensor has no memory to write from
    return library
