"""Answers to requests don't depend on the way: prefixes reused, texts side by side, or each text by itself."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fptq.evaluate.fidelity import ScoredEngine, ScoredModel
from fptq.evaluate.packing import cut_batches, pack
from fptq.evaluate.requests import Request, answer
from fptq.integrations.transformers import load, new_cache
from fptq.models.loading import FloatModel
from fptq.runtime.engine import Engine
from scored import Counting, open_float, quantize_model, save_model
from tiny import VARIANTS, save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def checkpoint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_model(model, tmp_path_factory.mktemp("checkpoint") / "q")


def requests_with_shared_prefixes(vocabulary: int = 160) -> list[Request]:
    generator = torch.Generator().manual_seed(5)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, vocabulary, (count,), generator=generator).tolist())

    examples, found = draw(40), []
    for length in (3, 20, 20, 31):
        context = examples[: length % 30 + 5] + draw(length)
        found += [Request(context, draw(n)) for n in (1, 1, 1, 4, 9)]
    found += [Request(examples[:10], examples[10:20]), Request(examples[:15], examples[15:20]), found[0]]
    return found


def test_reuse_of_prefixes_changes_no_bit_in_the_engine(checkpoint: Path) -> None:
    requests = requests_with_shared_prefixes()
    with Engine.open(checkpoint) as engine:
        plain = dict(answer(ScoredEngine(engine, reuses_prefixes=False), requests))
        reusing = ScoredEngine(engine)
        assert dict(answer(reusing, requests)) == plain
        assert dict(answer(reusing, reversed(requests))) == plain
        for request in requests:
            tokens = request.context + request.continuation
            logs = torch.log_softmax(torch.from_numpy(engine_logits(engine, reusing, tokens)), -1)
            rows = logs[len(request.context) - 1 : -1]
            wanted = torch.tensor(request.continuation)
            expected = float(rows.gather(1, wanted[:, None]).double().sum())
            assert plain[request].log_probability == pytest.approx(expected, abs=1e-9)
            assert plain[request].greedy == rows.argmax(1).equal(wanted)


def engine_logits(engine: Engine, scored: ScoredEngine, tokens: tuple[int, ...]) -> Any:
    scored._forget()  # the cache has room for one text
    return engine.logits(tokens)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_reuse_of_prefixes_in_transformers(variant: str, tmp_path: Path) -> None:
    """Every architecture, also where a sliding window of 8 has forgotten the prefix; float32 sums differ by 1e-6."""
    model = FloatModel.open(str(save_tiny(tmp_path, variant, spread=0.5))).load_all(torch.float32)
    requests = requests_with_shared_prefixes()
    plain, reusing = Counting(model, reuses_prefixes=False), Counting(model)
    expected, found = dict(answer(plain, requests)), dict(answer(reusing, requests))
    assert found.keys() == expected.keys() == set(requests)
    for request, likelihood in found.items():
        assert likelihood.log_probability == pytest.approx(expected[request].log_probability, abs=1e-4)
        assert likelihood.greedy == expected[request].greedy
    texts = {(request.context + request.continuation)[:-1] for request in requests}
    assert (plain.texts, plain.tokens) == (len(texts), sum(map(len, texts)))
    slides = getattr(model.config, "sliding_window", None) and variant != "phi3"
    assert reusing.tokens == plain.tokens if slides else reusing.tokens < 0.6 * plain.tokens


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_texts_side_by_side(variant: str, tmp_path: Path) -> None:
    """Every architecture; those whose masks or positions can't be given run one text after the other."""
    model = FloatModel.open(str(save_tiny(tmp_path, variant, spread=0.5))).load_all(torch.float32)
    requests = requests_with_shared_prefixes()
    plain, packing = Counting(model, reuses_prefixes=False), Counting(model, tokens_at_once=90)
    expected, found = dict(answer(plain, requests)), dict(answer(packing, requests))
    assert found.keys() == set(requests)
    for request, likelihood in found.items():
        assert likelihood.log_probability == pytest.approx(expected[request].log_probability, abs=1e-4)
        assert likelihood.greedy == expected[request].greedy
    packs = variant not in ("bloom", "falcon-rw", "mistral-sliding", "gemma2", "gemma3")
    assert (packing.texts < 0.6 * plain.texts) == packs
    assert packing.tokens < 0.8 * plain.tokens or not packs


def test_rows_of_texts_that_begin_alike() -> None:
    prompt = tuple(range(1, 31))
    answers = [(*prompt, 40, 41), (*prompt, 50), prompt]
    other = (7, *prompt[1:])
    batches = cut_batches([*answers, other], 100)
    assert [[(set(row.texts), row.length) for row in batch] for batch in batches] == [
        [(set(answers), 33), ({other}, 30)]
    ]
    assert [len(batch) for batch in cut_batches([*answers, other], 60)] == [1, 1]
    packed = pack(batches[0])
    for text, row, places in packed.texts:
        assert tuple(packed.tokens[row, places].tolist()) == text
        assert packed.positions[row, places].tolist() == list(range(len(text)))
        seen = packed.visible[row, 0, places]
        assert torch.equal(seen[:, places], torch.ones(len(text), len(text), dtype=torch.bool).tril())
        assert seen.sum() == len(text) * (len(text) + 1) // 2


def test_reuse_of_prefixes_with_the_int8_cache(checkpoint: Path) -> None:
    model, _ = load(checkpoint)
    requests = requests_with_shared_prefixes()
    whole = ScoredModel(model, lambda: new_cache(model), reuses_prefixes=False)
    expected = dict(answer(whole, requests))
    for request, likelihood in answer(ScoredModel(model, lambda: new_cache(model)), requests):
        assert likelihood.log_probability == pytest.approx(expected[request].log_probability, abs=1e-3)


def test_a_failed_text_leaves_no_prefix_behind(model: Path) -> None:
    scored = Counting(open_float(model)[0].model)
    before, failing, after = (Request((5, 6, *rest), (8,)) for rest in ((7, 9, 10, 11), (12, 13), (7, 9, 10, 11, 14)))
    expected = dict(answer(Counting(scored.model), [after]))
    dict(answer(scored, [before]))
    scored.fails_after = 1
    with pytest.raises(KeyboardInterrupt):
        dict(answer(scored, [failing]))
    scored.fails_after = None
    assert dict(answer(scored, [after]))[after].log_probability == pytest.approx(
        expected[after].log_probability, abs=1e-5
    )
