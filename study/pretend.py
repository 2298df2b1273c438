"""lander.py on a device that is not the CPU, where there is none: a tensor in the wrong place ends the run.

    python study/pretend.py --pair en-de --weights W --data D       # any option of lander.py

Tensors on "pretend:0" wrap CPU tensors and compute on the CPU, but an operation that mixes them with
tensors on the CPU raises, as it would on CUDA. What this does not show: speed, memory, kernels, and
--checkpointing, whose backward pass runs in a thread that no dispatch mode reaches.
"""

import sys
from pathlib import Path

import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

aten = torch.ops.aten
# Operations that may read tensors of both kinds: moves between devices, and indices from the CPU.
MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
INDEXING |= {aten._index_put_impl_.default}


class Pretend(torch.Tensor):
    """A tensor on pretend:0, whose numbers are in .numbers, on the CPU."""

    @staticmethod
    def __new__(cls, numbers):
        options = {"dtype": numbers.dtype, "device": "pretend:0"}
        layout = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset()}
        self = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, **layout, **options)
        self.numbers = numbers
        return self

    def __repr__(self):
        return f"Pretend({self.numbers})"

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


def is_pretend(device):
    return device is not None and torch.device(device).type in ("pretend", "privateuseone")


def check_places(operation, args, kwargs):
    """RuntimeError for a CPU tensor beside one on the device; numbers without dimensions may be."""
    if operation in INDEXING:
        args = (args[0], *args[2:])  # all but the indices
    for tensor in tree_flatten((args, kwargs))[0]:
        if not isinstance(tensor, torch.Tensor) or isinstance(tensor, Pretend):
            continue
        if tensor.dim() > 0 and tensor.device.type == "cpu":
            raise RuntimeError(f"{operation}: a tensor {list(tensor.shape)} is on the CPU")


def compute(operation, args, kwargs):
    """Do on the CPU what was asked for on either device, and wrap what belongs on pretend:0."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Pretend)]
    made_there = is_pretend(kwargs.get("device"))
    if not tensors and not made_there:
        return operation(*args, **kwargs)
    if tensors and operation not in MOVES:
        check_places(operation, args, kwargs)
    if made_there:
        kwargs = kwargs | {"device": torch.device("cpu")}
    unwrapped = tree_map_only(Pretend, lambda x: x.numbers, (args, kwargs))
    result = operation(*unwrapped[0], **unwrapped[1])
    if operation is aten.copy_.default:
        return args[0]
    moved_here = operation is aten._to_copy.default and kwargs.get("device") is not None
    if moved_here and not made_there:
        return result
    known = {id(x.numbers): x for x in tensors}  # an operation in place returns its argument
    wrap = lambda x: known[id(x)] if id(x) in known else Pretend(x)
    return tree_map_only(torch.Tensor, wrap, result)


def register():
    """Give PyTorch the device, and replace what passes every dispatch mode by."""
    _setup_privateuseone_for_python_backend("pretend")
    torch.inference_mode = torch.no_grad  # wrapped tensors know no inference mode

    def empty_strided(size, stride, *, dtype=None, **options):
        return Pretend(torch.empty_strided(size, stride, dtype=dtype))

    def empty(size, *, dtype=None, **options):
        return Pretend(torch.empty(size, dtype=dtype))

    def copy_from(source, target, non_blocking=False):
        numbers = [x.numbers if isinstance(x, Pretend) else x for x in (source, target)]
        numbers[1].copy_(numbers[0])
        return target

    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    from_data = torch.tensor

    def tensor(data, *, device=None, **options):
        made = from_data(data, **options)
        return made if device is None else made.to(device)

    torch.tensor = tensor
    save_file = safetensors.torch.save_file

    def save_from_cpu(tensors, *args, **options):
        save_file({name: x.to("cpu") for name, x in tensors.items()}, *args, **options)

    safetensors.torch.save_file = save_from_cpu  # a wrapped tensor has no memory to write from
    return library  # to be kept: with it goes what it registered


def main(argv):
    library = register()
    import lander  # which imports what was replaced

    with OnPretend():
        status = lander.main(["--device", "pretend", *argv])
    del library
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
