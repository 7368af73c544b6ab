"""Tables of the docs that are made for one result each: one function a table, named as its marker names it.

In and out as in `docs_figures.py`, whose helpers these use; `docs_tables.py` calls them by `TABLES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.common.text import NOTHING, duration
from tools.docs.figures import Results, grouped_matches, share, table

KINDS = ("vae", "sllm", "lm")


def _english_8k(results: Results) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """By kind: what `sllm evaluate` said, how the run went, parameters."""
    runs = results.read("english-8k/runs.json")
    parameters = results.read("log/2026-11-23-english-8k.json")["parameters_millions"]
    return (
        {kind: results.read(f"english-8k/evaluate-{kind}.json") for kind in KINDS},
        runs,
        {kind: f"{parameters[kind]:.1f}M" for kind in KINDS},
    )


def english_8k_summary(results: Results) -> list[str]:
    measured, runs, parameters = _english_8k(results)
    minutes = {kind: f"{runs[kind]['wall_seconds'] / 60:.0f}" for kind in KINDS}
    tokens = {kind: f"{runs[kind]['tokens'] / 1e6:.1f}M" for kind in KINDS}
    bits = {kind: f"{measured[kind]['bits_per_byte']:.3f}" for kind in KINDS}
    vae = measured["vae"]
    [(_, short)] = grouped_matches(vae["exact_match_by_length"], [(1, 8)])
    exact = f"{vae['exact_match']:.0%} of unseen clauses back exactly; {short:.0%} up to 8 tokens"
    return table(
        ("", "trained for", "tokens", "bits per byte", "ppl", ""),
        [
            (
                f"SLLM ({parameters['sllm']} parameters)",
                f"{minutes['sllm']} min, after a SentenceVAE's {minutes['vae']}",
                f"{tokens['sllm']} + {tokens['vae']}",
                f"**{bits['sllm']}**",
                f"{measured['sllm']['ppl']:.0f}",
                f"vector gain {measured['sllm']['vector_gain']:.3f}",
            ),
            (
                f"token model ({parameters['lm']})",
                f"{minutes['lm']} min",
                tokens["lm"],
                f"**{bits['lm']}**",
                f"{measured['lm']['ppl']:.0f}",
                "not swept: a baseline, not the best one",
            ),
            (
                f"SentenceVAE ({parameters['vae']})",
                f"{minutes['vae']} min",
                tokens["vae"],
                f"{bits['vae']} (reconstruction)",
                f"{vae['ppl']:.1f}",
                exact.replace("%", " %"),
            ),
        ],
        left=(0, 5),
    )


def english_8k(results: Results) -> list[str]:
    measured, runs, parameters = _english_8k(results)

    def row(label: str, cell: Callable[[str], str], kinds: Sequence[str] = KINDS) -> list[str]:
        return [label, *(cell(kind) if kind in kinds else NOTHING for kind in KINDS)]

    def bits(kind: str, key: str) -> str:
        return f"{measured[kind][key] / math.log(2) / measured[kind]['bytes']:.4f}"

    def strong(kind: str, text: str) -> str:
        return text if kind == "vae" else f"**{text}**"

    def padding(kind: str) -> str:
        percent = 100 * runs[kind]["padding_share_of_attention_slots"]
        return f"{percent:.0f} %" if percent >= 1 else f"{percent:.1f} %"

    def trained(kind: str) -> str:
        return f"{runs[kind]['tokens']:,}" + (" (+ the VAE's)" if kind == "sllm" else "")

    return table(
        ("", "SentenceVAE", "SLLM", "token model"),
        [
            row("measures", lambda kind: measured[kind]["measures"]),
            row("parameters", parameters.__getitem__),
            row("tokens trained", trained),
            row(
                "wall time, start-up and evaluations included",
                lambda kind: duration(runs[kind]["wall_seconds"]),
            ),
            row("tokens/s (median step)", lambda kind: f"{runs[kind]['median_tokens_per_second']:,}"),
            row("**bits per byte**", lambda kind: strong(kind, f"{measured[kind]['bits_per_byte']:.3f}")),
            row("ppl (per plain token)", lambda k: f"{measured[k]['ppl']:{'.2f' if k == 'vae' else '.1f'}}"),
            row("sentence ends / document ends, bits per byte", lambda kind: bits(kind, "end_nll_nats")),
            row("stop decisions, bits per byte", lambda kind: bits(kind, "stop_nll_nats"), ("sllm",)),
            row(
                "bits per byte without sentence vectors",
                lambda kind: f"{measured[kind]['bits_per_byte_without_vectors']:.3f}",
                ("sllm",),
            ),
            row("**vector gain**, bits per byte", lambda k: f"{measured[k]['vector_gain']:.3f}", ("sllm",)),
            row("padded slots in attention (the only padding there is)", padding),
        ],
    )


def english_8k_exact(results: Results) -> list[str]:
    groups = ((1, 4), (5, 8), (9, 12), (13, 16), (17, 24), (25, 64), (1, 64))
    by_length = results.read("english-8k/evaluate-vae.json")["exact_match_by_length"]
    found = grouped_matches(by_length, groups)
    return table(
        ("tokens", *(f"{low}–{high}" for low, high in groups[:-1]), "all"),
        [
            ("clauses", *(f"{sentences:,}" for sentences, _ in found)),
            ("exact", *(NOTHING if value is None else share(value) for _, value in found)),
        ],
    )


def data_prep_speed(results: Results) -> list[str]:
    speed = results.read("data-prep/speed.json")["speed"]
    workers = results.read("data-prep/workers.json")["workers"]
    theirs = speed["datatrove"]

    def row(label: str, figures: dict[str, float], mark: str = "") -> tuple[str, str, str]:
        median = f"{mark}{figures['median']:.2f}{mark}"
        return label, median, f"{figures['least']:.2f}–{figures['most']:.2f}"

    return table(
        ("", "median of 5", "range"),
        [
            row(
                "`data-prep shard`, MB of text per CPU-second of the whole process tree (it also cuts "
                "sentences)",
                speed["shard"]["mb_per_cpu_second"],
                "**",
            ),
            row(
                f"datatrove {theirs['versions']['datatrove']}'s JsonlReader + DocumentTokenizer, the same "
                "tokenizer.json (tokens only)",
                theirs["mb_per_cpu_second"],
            ),
            ("ratio of medians", f"**{speed['times_datatrove']:.2f}**", ""),
            row("wall seconds with 1 worker", workers["wall_1"]),
            row("wall seconds with 2 workers", workers["wall_2"]),
            ("ratio of medians", f"**{workers['times_faster']:.2f}**", ""),
        ],
    )


def data_prep_other(results: Results) -> list[str]:
    found = results.read("data-prep/memory-ids-reading.json")
    memory, ids, reading = found["memory"], found["ids"], found["reading"]

    def processes(size: str) -> str:
        return f"{memory[size]['largest_worker_mb']:.1f} / {memory[size]['largest_process_mb']:.1f} MB"

    def microseconds(key: str) -> str:
        return f"{reading[key]['median']:.0f} / {reading[key]['p99']:.0f} µs"

    return table(
        ("", ""),
        [
            ("peak memory, 10 MB of input: largest worker / largest process", processes("small")),
            ("peak memory, 1 GB of input", processes("big")),
            (
                f"ids of {ids['engine']} against {ids['reference']}: documents, tokens, documents that "
                "differ",
                f"{ids['documents']:,}, {ids['tokens']:,}, **{ids['differences']:,}**",
            ),
            (
                "reading all tokens and sentence lengths in order",
                f"{reading['mtokens_per_cpu_second']['median']:.0f} M tokens per CPU-second",
            ),
            ("any document by number, warm cache: median / 99th percentile", microseconds("by_number_us")),
            ("any document by id", microseconds("by_key_us")),
        ],
    )


def generation_speed(results: Results) -> list[str]:
    rows: list[list[str]] = []
    for file in ("contexts", "h2", "h4", "1.3b", "batch32"):
        found = results.read(f"generation/{file}.json")
        alone = []  # points that the other model has no positions for share a line
        first = len(rows)
        for point in found["points"]:
            ours, other = point["model"], point["against"]
            if "refused" in other:
                alone.append((point["context"], ours["tokens_per_second"]["median"], other["refused"]))
                continue
            ratio = point["ratios"]["tokens_per_second"]
            rows.append(
                [
                    "",
                    f"{point['context']:,}",
                    f"{ours['tokens_per_second']['median']:.3g}",
                    f"{other['tokens_per_second']['median']:.3g}",
                    f"{ratio:{'.0f' if ratio >= 10 else '.1f'}} ×",
                    f"{100 * point['ratios']['cached_bytes_per_token']:.1f} %",
                ]
            )
        if alone:
            positions = int(alone[0][2].split()[-2])  # "4206 tokens, 2048 positions"
            contexts = " / ".join(f"{context:,}" for context, _, _ in alone)
            speeds = " / ".join(f"{speed:.1f}" for _, speed, _ in alone)
            rows.append(["", contexts, speeds, f"ends at {positions:,}", "", ""])
        rows[first][0] = f"{found['model']['name'].upper()}, batch {found['points'][0]['batch']}"
    header = ("", "context", "ours, new tokens/s", "OPT", "ratio", "cached bytes a token")
    return table(header, rows)


def published_speed(results: Results) -> list[str]:
    """Ratios only: another machine, another dtype, another text."""
    rows = []
    for one in results.read("published.json")["sllm"]:
        (other, ours), (theirs_held, held) = one["speed"], one["memory"]
        ratio, share_held = NOTHING, NOTHING
        if "result" in one:
            ratios = results.read(one["result"])["points"][0]["ratios"]
            ratio = f"{ratios['tokens_per_second']:.2f} ×"
            share_held = share(ratios["cached_bytes_per_token"])
        rows.append(
            [
                f"SLLM-{one['name']}",
                f"{other:.2f} / {ours:.2f}",
                f"{ours / other:.2f} ×",
                ratio,
                f"{theirs_held:.2f} / {held:.2f}",
                share(held / theirs_held),
                share_held,
            ]
        )
    header = (
        "",
        "published: tokens/s, OPT / SLLM",
        "ratio",
        "ours",
        "published: KB a token, OPT / SLLM",
        "share",
        "ours",
    )
    return table(header, rows)


def published_quality(results: Results) -> list[str]:
    rows = []
    for one in results.read("published.json")["sllm"]:
        other, ours = one["ppl"]
        rows.append(
            [f"SLLM-{one['name']}", f"{other:.2f}", f"{ours:.2f}", f"{100 * (ours / other - 1):+.1f} %"]
        )
    return table(("", "published: OPT", "published: SLLM", "change"), rows)


def published_vae(results: Results) -> list[str]:
    rows = [
        [one["name"], f"{one['loss']:.4f}", f"{math.exp(one['loss']):.3f}", f"{one['ppl']:.3f}"]
        for one in results.read("published.json")["vae"]
    ]
    return table(("", "published: loss", "exp(loss)", "published: ppl"), rows)


def training_speed(results: Results) -> list[str]:
    sllm, vae = (results.read(f"training/{name}.json") for name in ("sllm-125m-h1", "svae-768-h1"))

    def speed(found: dict[str, Any]) -> str:
        ours, other = (found[side]["tokens_per_second"]["median"] for side in ("model", "against"))
        ratios = found["ratios"]
        return (
            f"{ratios['tokens_per_second']:.2f} × ({ours:.1f} / {other:.1f}; turn by turn "
            f"{min(ratios['by_turn']):.2f} to {max(ratios['by_turn']):.2f}; by the arithmetic alone "
            f"{ratios['limit']:.2f})"
        )

    def memory(key: str) -> str:
        ours, other = (sllm[side]["memory_bytes"][key] for side in ("model", "against"))
        return f"{100 * ours / other:.0f} % ({ours / 1e9:.2f} / {other / 1e9:.2f} GB)"

    sllm_share, vae_share, beside_sllm, beside_vae = (
        f"{100 * one[side]['share_of_limit']:.0f} %" for side in ("model", "against") for one in (sllm, vae)
    )
    return table(
        ("measured", "bar", "result"),
        [
            ("SLLM-125M-H1 by OPT-125M, real tokens per second", "≥ 1.8 ×", speed(sllm)),
            ("SVAE-768-H1 by OPT-125M, real tokens per second", "≥ 2.2 ×", speed(vae)),
            (
                "share of the machine's best matrix product reached",
                "",
                f"SLLM {sllm_share}, SVAE {vae_share}; OPT {beside_sllm} and {beside_vae}",
            ),
            ("padding, share of operations", "≤ 3 %", f"{100 * sllm['model']['padding_share']:.2f} %"),
            (
                "peak memory of an SLLM-125M-H1 step by OPT-125M's, the whole process",
                "≤ 60 %",
                memory("peak"),
            ),
            ("the same, what the step adds to weights and libraries", "", memory("step")),
        ],
        left=(0, 1, 2),
    )


def loader_and_planning(results: Results) -> list[str]:
    planning = results.read("training/planning.json")
    loader = results.read("training/loader.json")["windows"]
    long, short = planning["windows"]["1024"], planning["windows"]["128"]
    moments = ("start", "late")

    def seconds(window: dict[str, Any]) -> list[str]:
        return [f"{window[moment]['first_batch_seconds']:.2f}" for moment in moments]

    def memory(window: dict[str, Any]) -> str:
        sizes = [f"{window[moment]['peak_memory_bytes'] / 1e9:.2f}" for moment in moments]
        return " and ".join(dict.fromkeys(sizes)) + " GB"

    def rates(window: dict[str, Any]) -> str:
        found = sorted(window[moment]["planned_tokens_per_cpu_second"] / 1e6 for moment in moments)
        return f"{found[0]:.0f} to {found[1]:.0f} M"

    def packed(window: str) -> tuple[str, str]:
        figures = loader[window]["tokens_per_second"]
        low, high = min(figures["values"]), max(figures["values"])
        return f"{figures['median'] / 1e6:.1f} M", f"{low / 1e6:.1f} to {high / 1e6:.1f}"

    (start, late), (packed_long, range_long), (packed_short, range_short) = (
        seconds(long),
        packed("1024"),
        packed("128"),
    )
    turns = len(loader["1024"]["tokens_per_second"]["values"])
    return table(
        ("part", "measured"),
        [
            (
                f"first batch of a rank, {planning['documents'] / 1e6:.0f} million documents in "
                f"{planning['shards']:,} shards, {planning['ranks']:,} ranks, windows of 1,024 tokens",
                f"{start} s at the start, {late} at nine tenths of the epoch; {memory(long)}, torch "
                f"included; {long['start']['indexes_read']} index files read",
            ),
            (
                "the same, windows of 128 tokens (SentenceVAE)",
                f"{' and '.join(seconds(short))} s; {memory(short)}",
            ),
            (
                "planning after that, all ranks' bins, which every rank plans for itself",
                f"{rates(long)} tokens a CPU-second; windows of 128: {rates(short)}",
            ),
            (
                "packed batches of one rank, planning, reading and checking included",
                f"{packed_long} tokens a second ({range_long} in {turns} turns); windows of 128: "
                f"{packed_short} ({range_short})",
            ),
        ],
        left=(0, 1),
    )


TABLES: dict[str, Callable[..., list[str]]] = {
    "english-8k-summary": english_8k_summary,
    "english-8k": english_8k,
    "english-8k-exact": english_8k_exact,
    "data-prep-speed": data_prep_speed,
    "data-prep-other": data_prep_other,
    "generation-speed": generation_speed,
    "published-quality": published_quality,
    "published-speed": published_speed,
    "published-vae": published_vae,
    "training-speed": training_speed,
    "loader-and-planning": loader_and_planning,
}
