import numpy as np

Array = np.ndarray

def targets() -> list[tuple[str, str]]: ...
def cpu_name() -> str: ...

class Session:
    def __init__(self, target: str, threads: int, /) -> None: ...
    def pack(self, codes: Array, scales: Array, bits: int, packed: Array, /) -> None: ...
    def pack_words(self, words: Array, scales: Array, packed: Array, /) -> None: ...
    def pack_floats(self, weights: Array, bits: int, packed: Array, /) -> None: ...
    def multiply_floats(self, packed: Array, bits: int, x: Array, bias: Array | None, y: Array, /) -> None: ...
    def activate(self, activation: int, x: Array, up: Array | None, out: Array, /) -> None: ...
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
    def round_in_turn(
        self, values: Array, steps: Array, factor: Array, bits: int, codes: Array, errors: Array, /
    ) -> None: ...
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

_Norm = tuple[Array, Array | None, float, bool] | None
_Matrix = tuple[Array, int, int, int, int, Array | None, float | None, int]

class Decoder:
    def __init__(
        self,
        session: Session,
        *,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        inner: int,
        activation: int,
        softmax_scale: float,
        attention_softcap: float,
        logit_softcap: float,
        alibi_slopes: Array | None,
        residual_from_norm: bool,
    ) -> None: ...
    def set_embedding(
        self,
        *,
        data: Array | None,
        file: int,
        offset: int,
        n: int,
        k: int,
        group_size: int,
        bits: int,
        scale: float,
        positions: Array | None,
        norm: _Norm,
    ) -> None: ...
    def add_block(
        self,
        *,
        norms: list[_Norm],
        projections: list[list[_Matrix]],
        columns: list[int],
        key_column: int,
        value_column: int,
        up_column: int,
        rotation: tuple[Array, Array] | None,
        window: int,
        key_scale: float,
        value_scale: float,
    ) -> None: ...
    def set_head(self, *, norm: _Norm, head: list[_Matrix], columns: int) -> None: ...
    def forward(
        self,
        tokens: Array,
        runs: list[tuple[int, int, Array]],
        keys: Array,
        values: Array,
        wanted: Array,
        logits: Array,
        /,
    ) -> int: ...
    def take_times(self) -> list[tuple[str, float]]: ...
