"""Parameters of codes on CPU, kept in the order in which PyTorch's fast products of a few rows read them.

Those products read weights several times faster than what PyTorch offers for plain rows. So that the weights are not in memory
twice, a packed parameter gives its own memory up; whatever reads it as a tensor, to save it for example, finds it unpacked, for
good, and the next product packs it again. Only a table that rows are taken of, too, stays plain beside its packed form.
"""

from __future__ import annotations

import concurrent.futures
import functools
import threading
from collections.abc import Iterable
from typing import Any

import keras
import torch

from keras_gemma2.backend import torch_tapes
from keras_gemma2.backend.torch_int8 import ROWS_A_PIECE, PackedInt8

MIN_ELEMENTS = 1 << 13  # smaller matrices are left alone
_LOCK = threading.Lock()


class PackedCodes(torch.nn.Parameter):
    """A parameter whose memory is its `packed` form only; it turns back into a plain one when it is read as a tensor."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func not in _about_no_values():
            for tensor in (*args, *(kwargs or {}).values()):
                for each in tensor if isinstance(tensor, (list, tuple)) else (tensor,):
                    plain(each)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict) -> torch.nn.Parameter:
        return plain(self).__deepcopy__(memo)

    def __reduce_ex__(self, protocol: int) -> Any:
        return plain(self).__reduce_ex__(protocol)


def packed_codes(codes: torch.Tensor, scales: torch.Tensor, mode: str) -> Any:
    """The packed form of a parameter, made at its first product; None if it has none."""
    if type(codes) is PackedCodes:
        return codes.__dict__.get("packed")
    if type(codes) is not torch.nn.Parameter:
        return None
    found = codes.__dict__.get("packed")
    if found is not None and codes.__dict__.get("packed_from") == _state(codes):
        return found
    if mode != "int8" or not _can_pack(codes) or not _is_ordinary(scales):
        return None
    _pack(codes)
    return codes.__dict__.get("packed")


def pack_ahead(variables: Iterable[keras.Variable]) -> None:
    """Packs the int8 matrices among some variables, as many at a time as there are threads: packing is slow.

    Those with many rows are left for their first product, where their pieces are packed at the same time; by then it is known
    whether rows are taken of them, too.
    """
    parameters = [variable.value for variable in variables if variable.dtype == "int8"]
    unpacked = [codes for codes in parameters if type(codes) is torch.nn.Parameter and _can_pack(codes)]
    unpacked = [codes for codes in unpacked if len(codes) <= ROWS_A_PIECE and "packed" not in codes.__dict__]
    if unpacked:
        with concurrent.futures.ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(_pack, unpacked))


def _can_pack(codes: torch.Tensor) -> bool:
    return codes.numel() >= MIN_ELEMENTS and _is_ordinary(codes) and PackedInt8.takes(codes)


def _is_ordinary(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_inference()


def _pack(codes: torch.nn.Parameter) -> None:
    with torch.inference_mode(False), torch.no_grad():
        with _LOCK:
            if type(codes) is not torch.nn.Parameter:
                return
            state, values = _state(codes), codes.detach()
        packed = PackedInt8(values)
        with _LOCK:
            if type(codes) is torch.nn.Parameter and _state(codes) == state:  # nobody was sooner, or changed it
                _take(codes, packed)


def _take(codes: torch.nn.Parameter, packed: PackedInt8) -> None:
    if codes.__dict__.get("is_kept_plain"):
        codes.packed_from, codes.packed = _state(codes), packed
        return
    codes.packed = packed  # not found by others before the class changes: nothing says yet what it was made of
    without_memory = torch.empty(codes.shape, dtype=codes.dtype)
    without_memory.untyped_storage().resize_(0)  # reading it past `PackedCodes` raises
    codes.__class__ = PackedCodes  # from here on, other threads that read it wait for the lock
    with torch._C.DisableTorchFunctionSubclass():
        codes.data = without_memory


def plain(codes: Any) -> Any:
    """Its argument; a packed parameter is unpacked first, and stays so."""
    if type(codes) is not PackedCodes:
        return codes
    with _LOCK, torch.inference_mode(False), torch.no_grad():
        if type(codes) is PackedCodes:
            unpacked = codes.__dict__["packed"].unpacked()
            with torch._C.DisableTorchFunctionSubclass():
                codes.data = unpacked
            codes.__class__ = torch.nn.Parameter
            del codes.__dict__["packed"]
            torch_tapes.drop_all()
    return codes


def keep_plain(codes: torch.Tensor) -> None:
    """Notes that rows are taken of a parameter of codes, as of an embedding table: it stays in memory when it is packed."""
    if isinstance(codes, torch.nn.Parameter) and codes.dtype == torch.int8:
        codes.is_kept_plain = True


def _state(codes: torch.Tensor) -> tuple[int, int]:
    """What changes when a parameter's values do."""
    return codes.data_ptr(), codes._version


@functools.cache
def _about_no_values() -> frozenset:
    """Functions of tensors that do not look at values."""
    getters = ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "is_meta", "is_cpu", "is_cuda", "grad")
    methods = ("dim", "size", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "is_contiguous", "stride")
    functions = {getattr(torch.Tensor, name).__get__ for name in getters} | {getattr(torch.Tensor, name) for name in methods}
    return frozenset(functions | {torch.Tensor.requires_grad.__set__, torch.Tensor.__hash__, torch.Tensor.__len__})
