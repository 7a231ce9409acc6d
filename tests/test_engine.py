"""The engine beside the transformers path, and beside itself: alone and batched, in chunks and whole."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fptq.integrations.transformers import load, new_cache
from fptq.quantize import CalibrationSpec, Options, quantize
from fptq.recipe import get_recipe
from fptq.runtime import decoder as decoders
from fptq.runtime.engine import Engine
from fptq.runtime.kernels import REFERENCE, Kernels
from tiny import VARIANTS, save_tiny, token_ids
from tokens import save_tokenizer

RANDOM = CalibrationSpec("random", samples=4, length=24)
REFUSED = ("opt-post-norm", "gpt_neox", "gpt_neox-sequential-relu", "falcon-7b", "falcon-40b", "falcon-rw")
RUN = [name for name in VARIANTS if name not in REFUSED]


def checkpoint_of(folder: Path, variant: str, recipe: str = "fptq", **changes: object) -> Path:
    model = save_tiny(folder / "model", variant, spread=0.5, **changes)
    save_tokenizer(model, chat=True)
    return quantize(str(model), folder / "q", get_recipe(recipe, group_size=32), RANDOM, Options(progress=False))


@pytest.fixture(scope="module", params=RUN)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp(request.param), request.param)


def transformers_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    model, _ = load(folder)
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None], past_key_values=new_cache(model), use_cache=True).logits[0].numpy()


def near(got: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether logits differ by no more than what a code that falls on the other side of a rounding boundary makes.

    Both paths round float32 sums differently. That moves a value across a boundary of the next layer's codes now and
    then: one step, 1/127 of the layer's range. Nearly all values are equal to float32 precision.
    """
    scale = np.abs(wanted).max()
    difference = np.abs(got - wanted)
    return bool(np.median(difference) <= 1e-5 * scale and difference.max() <= 0.05 * scale)


def test_logits_are_those_of_the_transformers_path(folder: Path) -> None:
    ids = token_ids(1, 40)[0].numpy()
    with Engine.open(folder, threads=2) as engine:
        assert near(engine.logits(ids), transformers_logits(folder, ids))
