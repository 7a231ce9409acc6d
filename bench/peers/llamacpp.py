"""Products with ggml's shared libraries, driven through ctypes."""

import ctypes
import sys
from ctypes import CFUNCTYPE, POINTER, byref, c_bool, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from itertools import count, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

# From ggml.h and ggml-backend.h.
TYPE_F32, TYPE_Q4_0 = 0, 2
DEVICE_TYPE_CPU = 0

CONTEXT_BYTES = 1 << 14  # a product's tensors and its graph; data lies elsewhere
GRAPH_NODES = 8
POLL = 1  # threads wait actively for 2 ms: ample between products. By default it is 0.1 s, at the next peer's cost.


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _ThreadpoolParams(ctypes.Structure):
    _fields_ = (
        ("cpumask", c_bool * 512),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    )


class _Feature(ctypes.Structure):
    _fields_ = (("name", c_char_p), ("value", c_char_p))


_LogCallback = CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_silence = _LogCallback(lambda level, text, data: None)

# Functions of libggml-base: result, then arguments.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_buft_name": (c_char_p, c_void_p),
    "ggml_backend_dev_backend_reg": (c_void_p, c_void_p),
    "ggml_backend_dev_buffer_type": (c_void_p, c_void_p),
    "ggml_backend_dev_init": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_tensor_get": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_commit": (c_char_p,),
    "ggml_free": (None, c_void_p),
    "ggml_init": (c_void_p, _InitParams),
    "ggml_log_set": (None, _LogCallback, c_void_p),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_threadpool_params_init": (None, POINTER(_ThreadpoolParams), c_int),
    "ggml_version": (c_char_p,),
}
# Functions of the CPU backend, which are asked for by name: each kind of CPU has its library.
BACKEND_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ggml_backend_cpu_set_threadpool": (None, c_void_p, c_void_p),
    "ggml_backend_dev_get_extra_bufts": (POINTER(c_void_p), c_void_p),
    "ggml_backend_get_features": (POINTER(_Feature), c_void_p),
    "ggml_backend_set_n_threads": (None, c_void_p, c_int),
    "ggml_threadpool_new": (c_void_p, POINTER(_ThreadpoolParams)),
}


def _typed(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function


class Ggml:
    """ggml's CPU backend with a pool of threads, from <environment>/llamacpp.

    Attributes:
        c: the functions of the libraries.
        backend: for computing.
        memory: of activations.
        repacked_memory: of weights, laid out for this CPU.
        version: of the libraries, with the instructions that are used.

    Raises:
        ImportError: the libraries aren't there, or have no repacked layouts.
    """

    def __init__(self, threads: int):
        folder = Path(sys.prefix) / "llamacpp"
        registries = [path for path in folder.glob("libggml.*so*") if path.is_file()]
        if not registries:
            raise ImportError(f"no libggml in {folder}: see bench/peers.txt")
        base = ctypes.CDLL(str(folder / "libggml-base.so"))
        self.c = SimpleNamespace(**{name: _typed(base, name, *types) for name, types in SIGNATURES.items()})
        self.c.ggml_log_set(_silence, None)

        # Loads the library that suits this CPU best.
        registry = ctypes.CDLL(str(registries[0]))
        _typed(registry, "ggml_backend_load_all_from_path", None, c_char_p)(str(folder).encode())
        device = _typed(registry, "ggml_backend_dev_by_type", c_void_p, c_int)(DEVICE_TYPE_CPU)
        loaded = self.c.ggml_backend_dev_backend_reg(device)
        for name, types in BACKEND_SIGNATURES.items():
            address = self.c.ggml_backend_reg_get_proc_address(loaded, name.encode())
            setattr(self.c, name, CFUNCTYPE(*types)(address))

        self.backend = self.c.ggml_backend_dev_init(device, None)
        self.memory = self.c.ggml_backend_dev_buffer_type(device)
        kinds = self.c.ggml_backend_dev_get_extra_bufts(device)
        some = takewhile(bool, (kinds[i] for i in count()))
        repacked = [kind for kind in some if self.c.ggml_backend_buft_name(kind) == b"CPU_REPACK"]
        if not repacked:
            raise ImportError(f"the libggml in {folder} has no repacked layouts")
        self.repacked_memory = repacked[0]

        params = _ThreadpoolParams()
        self.c.ggml_threadpool_params_init(byref(params), threads)
        params.poll = POLL
        self.c.ggml_backend_set_n_threads(self.backend, threads)
        self.c.ggml_backend_cpu_set_threadpool(self.backend, self.c.ggml_threadpool_new(byref(params)))

        features = self.c.ggml_backend_get_features(loaded)
        names = b" ".join(takewhile(bool, (features[i].name for i in count())))
        self.version = b" ".join([self.c.ggml_version(), self.c.ggml_commit(), names]).decode()


class _Tensors:
    """Tensors with their data, which give their memory back at the end."""

    def __init__(self, ggml: Ggml):
        self._ggml, self._c, self._buffer = ggml, ggml.c, None
        self._context = self._c.ggml_init(_InitParams(CONTEXT_BYTES, None, True))

    def _new_matrix(self, kind: int, rows: int, columns: int) -> int:
        return self._c.ggml_new_tensor_2d(self._context, kind, columns, rows)

    def _allocate(self, memory: int) -> None:
        self._buffer = self._c.ggml_backend_alloc_ctx_tensors_from_buft(self._context, memory)
        if not self._buffer:
            raise MemoryError("ggml couldn't allocate its tensors")

    def __del__(self) -> None:
        self._c.ggml_backend_buffer_free(self._buffer)
        self._c.ggml_free(self._context)


class Weights(_Tensors):
    """A matrix [n, k] in Q4_0, laid out for this CPU, from Q4_0's blocks: uint8 [n, k/32, 18]."""

    def __init__(self, ggml: Ggml, blocks: np.ndarray):
        super().__init__(ggml)
        self.n = blocks.shape[0]
        self.tensor = self._new_matrix(TYPE_Q4_0, self.n, blocks.shape[1] * 32)
        self._allocate(ggml.repacked_memory)
        self._c.ggml_backend_tensor_set(self.tensor, blocks.ctypes.data, 0, blocks.nbytes)


class Product(_Tensors):
    """x·Wᵀ for one float32 x [m, k]."""

    def __init__(self, ggml: Ggml, weights: Weights, x: np.ndarray):
        super().__init__(ggml)
        self._weights, self._shape = weights, (len(x), weights.n)
        given = self._new_matrix(TYPE_F32, *x.shape)
        self._y = self._c.ggml_mul_mat(self._context, weights.tensor, given)
        self._graph = self._c.ggml_new_graph_custom(self._context, GRAPH_NODES, False)
        self._c.ggml_build_forward_expand(self._graph, self._y)
        self._allocate(ggml.memory)
        self._c.ggml_backend_tensor_set(given, x.ctypes.data, 0, x.nbytes)

    def run(self) -> None:
        """Compute it."""
        status = self._c.ggml_backend_graph_compute(self._ggml.backend, self._graph)
        if status:
            raise RuntimeError(f"ggml's status {status}")

    def fetch(self) -> np.ndarray:
        """Return float32 [m, n]."""
        y = np.empty(self._shape, np.float32)
        self._c.ggml_backend_tensor_get(self._y, y.ctypes.data, 0, y.nbytes)
        return y
