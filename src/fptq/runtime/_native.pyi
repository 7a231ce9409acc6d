import numpy as np

Array = np.ndarray

def targets() -> list[tuple[str, str]]: ...
def cpu_name() -> str: ...

class Session:
    def __init__(self, target: str, threads: int, /) -> None: ...
    def pack(self, codes: Array, scales: Array, bits: int, packed: Array, /) -> None: ...
    def multiply(
        self,
        packed: Array,
        group_size: int,
        bits: int,
        activations: Array,
        scales: Array,
        bias: Array | None,
        y: Array,
        /,
    ) -> None: ...
    def linear(
        self, packed: Array, group_size: int, bits: int, x: Array, scale: float | None, bias: Array | None, y: Array, /
    ) -> None: ...
    def quantize(self, x: Array, scale: float | None, codes: Array, scales: Array, /) -> None: ...
    def normalize(
        self, x: Array, weight: Array, bias: Array | None, eps: float, center: bool, out: Array, /
    ) -> None: ...
    def normalize_quantize(
        self,
        x: Array,
        weight: Array,
        bias: Array | None,
        eps: float,
        center: bool,
        scale: float | None,
        codes: Array,
        scales: Array,
        /,
    ) -> None: ...
    def attend(
        self,
        queries: Array,
        keys: Array,
        values: Array,
        pages: Array,
        key_scale: float,
        value_scale: float,
        softmax_scale: float,
        softcap: float,
        first_position: int,
        window: int,
        alibi_slopes: Array | None,
        out: Array,
        /,
    ) -> None: ...
    def read(self, data: Array, /) -> None: ...
    def dot(self, steps: int, /) -> int: ...
