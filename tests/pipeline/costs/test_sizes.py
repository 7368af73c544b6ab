"""Parameter counts of every size of the paper, from the recipes that make them.

The published layout (arXiv 2408.00655 and its code) is counted by formula and must match the published
table; `layout: paper` must be that layout but for the start vector. The default layout must differ from it by
exactly the parts listed in `vae_minus_paper` and `sllm_minus_paper`, each with its reason: nothing missing,
nothing extra. docs/sizes.md shows all of it; after a change, rewrite it with

    PYTHONPATH=tests:. python tests/pipeline/costs/test_sizes.py
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.paths import REPOSITORY

from pipeline.config.schema import load_recipe
from pipeline.models.backbone import backbone_config
from pipeline.models.folders import parameter_count
from pipeline.models.sentence_vae import SentenceVAE, SentenceVAEConfig
from pipeline.models.sllm import SLLM, SLLMConfig

RECIPES = REPOSITORY / "pipeline" / "recipes"
PAGE = REPOSITORY / "docs" / "sizes.md"
V = 50272
POSITIONS = 2050  # OPT's table: 2,048 and an offset of 2

# Millions, as printed in the paper's main table.
PUBLISHED = {
    "125m-h1": 214.3,
    "125m-h2": 226.1,
    "125m-h4": 249.8,
    "350m-h1": 429.5,
    "350m-h2": 450.5,
    "350m-h4": 492.5,
    "1.3b-h1": 1606,
    "1.3b-h2": 1690,
}


def paper_vae(d: int, e: int, layers: int) -> int:
    """Three vocabulary matrices (encoder, decoder, head), sinusoidal positions, torch's post-norm layers,
    ffn 2d."""
    projections = 2 * e * d if e != d else 0
    vocabulary = 2 * V * e + projections + V * d + V
    encoder_layer = 8 * d * d + 11 * d
    decoder_layer = 12 * d * d + 17 * d
    return vocabulary + layers * (encoder_layer + decoder_layer) + 2 * d


def paper_sllm(d: int, e: int, layers: int, backbone_layers: int) -> int:
    """The SentenceVAE, OPT's position table and layers (no final norm, no projections), a two-way stop
    head."""
    return paper_vae(d, e, layers) + POSITIONS * d + backbone_layers * (12 * d * d + 13 * d) + 2 * d + 2


def vae_minus_paper(d: int, layers: int) -> int:
    return (
        # Cross-attention over one vector is an affine map: one matrix instead of four, and no norm of the
        # query.
        -layers * (3 * (d * d + d) + 2 * d)
        # Learned positions for 64 tokens (and BOS in the decoder) instead of sinusoidal ones.
        + (64 + 65) * d
        # Pre-norm layers end in a norm (decoder); the encoder's is the fusion norm, which the paper has too.
        + 2 * d
    )


def sllm_minus_paper(d: int, e: int, layers: int) -> int:
    return (
        vae_minus_paper(d, layers)
        # The start vector, so that the first sentence is predicted and scored.
        + d
        # One stop logit instead of two; it reads the backbone's output, e wide for OPT-350M.
        + (e + 1)
        - (2 * d + 2)
        # The backbone as the model defines it: a final norm, or (OPT-350M) its own projections, and the maps
        # from and to the wider SentenceVAE.
        + (4 * e * d if e != d else 2 * d)
    )


def vae_config(name: str, layout: str = "lean") -> SentenceVAEConfig:
    settings = {"vocab_size": V, **load_recipe(RECIPES / f"svae-{name}.yaml").model.vae, "layout": layout}
    return SentenceVAEConfig(**{key: value for key, value in settings.items() if value is not None})


def sllm(size: str, layout: str = "lean") -> SLLM:
    """The model of a size's recipes, without memory for its weights."""
    recipe = load_recipe(RECIPES / f"sllm-{size}.yaml")
    vae = vae_config(Path(recipe.model.vae["path"]).name.removeprefix("svae-"), layout)
    with torch.device("meta"):
        return SLLM(SLLMConfig(vae, backbone_config(recipe.model.backbone)))


def sizes() -> list[str]:
    return sorted(path.stem.removeprefix("sllm-") for path in RECIPES.glob("sllm-*-h*.yaml"))


def test_every_published_size_has_recipes():
    assert set(PUBLISHED) | {"1.3b-h4"} == set(sizes())
    vaes = {path.stem for path in RECIPES.glob("svae-*.yaml")}
    assert vaes == {f"svae-{d}-h{h}" for d in (768, 1024, 2048) for h in (1, 2, 4)}


@pytest.mark.parametrize("size", sizes())
def test_parameter_count(size):
    model = sllm(size)
    vae, backbone = model.config.vae, model.config.backbone
    d, e, layers = vae.hidden_size, vae.embedding_size, vae.layers
    assert layers == int(re.search(r"h(\d)$", size).group(1))
    paper = paper_sllm(d, e, layers, backbone.num_hidden_layers)
    if size in PUBLISHED:
        assert paper / 1e6 == pytest.approx(PUBLISHED[size], abs=0.05 if PUBLISHED[size] < 1000 else 0.5)
    assert parameter_count(model) == paper + sllm_minus_paper(d, e, layers)
    published = sllm(size, "paper")
    # The start vector, without which no first sentence is predicted, is all that `layout: paper` adds.
    assert parameter_count(published) == paper + d
    if size in PUBLISHED:
        assert parameter_count(published) / 1e6 == pytest.approx(PUBLISHED[size], rel=0.0005)


@pytest.mark.parametrize("width", [768, 1024, 2048])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_parameter_count_of_the_sentence_vae(width, layers):
    config = vae_config(f"{width}-h{layers}")
    with torch.device("meta"):
        model, published = SentenceVAE(config), SentenceVAE(vae_config(f"{width}-h{layers}", "paper"))
    assert parameter_count(published) == paper_vae(width, config.embedding_size, layers)
    assert (config.hidden_size, config.layers, config.ffn_size) == (width, layers, 2 * width)
    assert parameter_count(model) == paper_vae(width, config.embedding_size, layers) + vae_minus_paper(
        width, layers
    )


def test_the_page_of_sizes_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page()


# --- docs/sizes.md --------------------------------------------------------------------------------

# Parts in the order of the page: (name, pattern of parameter names, why the default layout differs).
PARTS = [
    ("token embeddings", r"embedding\.(token|project)", ""),
    (
        "sentence positions",
        r"vae\..*embedding\.position",
        "learned, for 64 tokens (65 symbols in the decoder), instead of sinusoids without weights",
    ),
    (
        "cross-attention",
        r"\.condition",
        "over ONE vector the softmax is 1 whatever the query: the attention is an affine map of that vector, "
        "and one matrix is as expressive as the product of two. Query and key weights never get a gradient; "
        "the query's norm goes with them",
    ),
    ("other layers of encoder and decoder", r"vae\..*\.layers\.", ""),
    (
        "last norms",
        r"(fusion|final)_norm",
        "pre-norm layers end in a norm (decoder); the encoder's is the norm after fusion, which both have",
    ),
    ("vocabulary head", r"vae\.head", ""),
    ("backbone: positions and layers", r"backbone\..*(embed_positions|layers\.)", ""),
    (
        "backbone: final norm or projections",
        r"backbone\..*(final_layer_norm|project_)",
        "OPT as the model defines itself and was trained: a final norm, or (350M) maps from and to 512 "
        "channels; the published code runs the layers alone",
    ),
    (
        "maps to and from the backbone",
        r"(to|from)_backbone",
        "350M only: between the SentenceVAE's 1024 channels and OPT-350M's 512",
    ),
    ("start vector", r"^start\.", ""),
    ("stop head", r"stop_head", "one logit instead of two, of which only the difference counts"),
]


def by_part(model: torch.nn.Module) -> dict[str, int]:
    """Parameters of each of `PARTS`; every parameter belongs to the first part whose pattern it fits."""
    counts = dict.fromkeys((name for name, *_ in PARTS), 0)
    for key, parameter in model.named_parameters():
        counts[next(name for name, pattern, _ in PARTS if re.search(pattern, key))] += parameter.numel()
    return counts


def page() -> str:
    """docs/sizes.md."""
    order = sorted(sizes(), key=lambda size: ("125m", "350m", "1.3b").index(size.split("-")[0]))
    lean = {size: by_part(sllm(size)) for size in order}
    paper = {size: by_part(sllm(size, "paper")) for size in order}
    lines = [
        "# Sizes",
        "",
        "Parameters of every published size in three columns: the paper's figure, `layout: paper` (the",
        "published layers) and the smaller default layout. `sllm inspect --all` prints them too. The page",
        "is written by `PYTHONPATH=tests:. python tests/pipeline/costs/test_sizes.py`, and a test checks it.",
        "These sizes are built and counted here, not trained.",
        "",
        "| SLLM | published | `layout: paper` | off by | default | default − paper |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for size in order:
        ours, theirs = sum(lean[size].values()), sum(paper[size].values())
        printed = PUBLISHED.get(size)
        off = "" if printed is None else f"{100 * (theirs / 1e6 / printed - 1):+.3f} %"
        name = size.replace("m-", "M-").replace("b-", "B-").replace("-h", "-H")
        published = "not printed" if printed is None else f"{printed:g}M"
        lean_off = f"{100 * (ours / theirs - 1):+.2f} %"
        lines.append(f"| {name} | {published} | {theirs:,} | {off} | {ours:,} | {lean_off} |")
    lines += [
        "",
        "| SentenceVAE | `layout: paper` | default | default − paper |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name in (f"{width}-h{layers}" for width in (768, 1024, 2048) for layers in (1, 2, 4)):
        with torch.device("meta"):
            theirs, ours = (parameter_count(SentenceVAE(vae_config(name, x))) for x in ("paper", "lean"))
        lean_off = f"{100 * (ours / theirs - 1):+.2f} %"
        lines.append(f"| SVAE-{name.upper()} | {theirs:,} | {ours:,} | {lean_off} |")
    lines += [
        "",
        "`layout: paper` adds only the start vector (as many parameters as channels) to the published model.",
        "Without it the first sentence of a document can be neither predicted nor scored.",
        "",
        "## Difference by part (SLLM, default − paper)",
        "",
        "| part | " + " | ".join(size.upper() for size in order) + " |",
        "| --- |" + " ---: |" * len(order),
    ]
    for part, *_ in PARTS:
        row = [lean[size][part] - paper[size][part] for size in order]
        lines.append(f"| {part} | " + " | ".join(f"{x:+,}" if x else "0" for x in row) + " |")
    lines += ["", "Why:", ""]
    lines += [f"- **{part}**: {reason}." for part, _, reason in PARTS if reason]
    lines += [
        "",
        "`layout: paper` has post-norm layers with ReLU (a test compares them with torch's own), the default",
        "pre-norm layers with GELU.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
