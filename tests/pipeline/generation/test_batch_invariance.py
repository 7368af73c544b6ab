"""A text's numbers have the same bits in any batch, in fp32 on a CPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from helpers.model_folders import STACK, save, small_model

from data_prep.common.errors import UserError
from data_prep.text.tokenizer import load_tokenizer
from pipeline.generation.prefixes import PrefixCache
from pipeline.generation.results import Limits, Piece, Request, Sentence
from pipeline.generation.sampling import Sampling
from pipeline.generation.writer import BatchWriter
from pipeline.models.inference import lay_out, load_for_generation
from pipeline.models.products import PACKED, Product

PROMPTS = [
    "",
    "a",
    "One is set.",
    "The list is set by hand, and its value is",
    "It ends. " * 7,
    "他走了。然后",
    "The list is set by hand. Its value, which is one, " * 9,
]
WIDE = {"hidden_size": 48, "heads": 4}
KINDS: dict[str, dict] = {
    "lean": {"vae": WIDE},
    "paper": {"vae": {"layout": "paper"}},
    "context": {"vae": {"context_sentences": 1, "condition": "prefix", "positions": "rotary"}},
    "attention": {"vae": {"fusion": "attention"}},
    "stack": {"stack": {**STACK, "attention_window": 9, "memory": 3}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_do_not_depend_on_the_batch(kind: str, tiny_tokenizer) -> None:
    """Alone, and in batches that texts join and leave; prompts read alone, together, and in part before."""
    tokenizer = load_tokenizer(tiny_tokenizer)
    model = lay_out(small_model("sllm", tokenizer, noise=0.1, **KINDS[kind]), batch_invariant=True)
    requests = [Request(n, PROMPTS[n % 7], n, limits=Limits(6, 4 + n % 29)) for n in range(33)]

    def numbers(
        some: list[Request], rows: int, prefixes: PrefixCache | None = None, late: int = 0
    ) -> dict[int, list]:
        def arriving() -> Iterator[Request | None]:
            for request in some:
                for _ in range(late * (request.number % 3)):
                    yield None
                yield request

        found: dict[int, list] = defaultdict(list)
        writer = BatchWriter(model, tokenizer, Sampling(1.0), Limits(6, 40), rows, prefixes=prefixes)
        for number, event in writer.run(arriving()):
            if isinstance(event, Piece):
                found[number].append((event.token, event.log_probability))
            elif isinstance(event, Sentence):
                found[number].append((event.stop_probability, event.log_probability))
        return found

    alone: dict[int, list] = {}
    for request in requests:
        alone |= numbers([request], 1)
    assert sum(map(len, alone.values())) > 300
    for rows, late in ((2, 0), (3, 1), (5, 0), (8, 2), (33, 0)):
        assert numbers(requests, rows, late=late) == alone, rows
    assert numbers(requests, 5, PrefixCache()) == alone


@pytest.mark.parametrize("outputs", [1, 2, 6, 64, 2048])
@pytest.mark.parametrize("inputs", [24, 128, 1536])
def test_a_row_of_a_product_has_the_same_bits_beside_any_others(inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    product = Product(torch.randn(outputs, inputs), torch.randn(outputs))
    assert (product.least < 4) == (inputs * outputs >= PACKED)
    x = torch.randn(70, inputs)
    with torch.inference_mode():
        whole = product(x)
        for rows in (1, 2, 3, 4, 5, 8, 17, 33, 69):
            for first in (0, 1, 70 - rows):
                assert torch.equal(product(x[first : first + rows]), whole[first : first + rows])
        assert product(x[:0]).shape == (0, outputs) and product(x[:6].view(2, 3, -1)).shape[:2] == (2, 3)


def test_it_is_refused_where_it_does_not_hold(tiny_tokenizer, tmp_path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer)
    folder = save(small_model("sllm", tokenizer), tmp_path / "sllm", tokenizer)
    assert load_for_generation(folder, device="cpu", batch_invariant=True)[0].batch_invariant
    for other in ({"int8": True}, {"device": "cpu", "dtype": "bf16"}):
        with pytest.raises(UserError, match="--batch-invariant is for fp32 on a CPU"):
            load_for_generation(folder, **other, batch_invariant=True)
