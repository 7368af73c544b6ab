"""Mutation testing of the core modules: do the tests notice when an operator or a number is another one?

    pip install cosmic-ray && python -m tools.mutation [MODULE …] [--minutes 60] [--seed 1] [--json FILE]

cosmic-ray makes the mutants; the copy of the tree and pytest are those of `tools.planted_bugs`, so a mutant
costs its tests and no imports. At most one mutant for each place of the code is drawn, and the modules take
turns until the time is over: CPU time, so that a busy machine does not make the sample smaller. Mutants of
annotations are left out.
"""

from __future__ import annotations

import ast
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from typing import Annotated

from cyclopts import Parameter

from data_prep.common.command_line import Many, Natural, Positive
from data_prep.common.environment import header, require_folder, write_result
from data_prep.common.errors import UserError, log, print_result
from data_prep.common.extras import import_extra
from tools.commands import console
from tools.planted_bugs.trees import REPOSITORY, changed, copied_tree, rates, run_tests

TESTS = {
    name: f"tests/pipeline/{name}" for name in ("checkpoints", "data", "evaluation", "generation", "models")
}
MODELS, CONTROLS = f"{TESTS['models']}/test_models.py::test", f"{TESTS['generation']}/test_api.py::test"
# The tests of each module that take seconds: of all tests there are, fewer mutants survive.
MODULES: dict[str, Sequence[str]] = {
    "pipeline/models/losses.py": [
        f"{MODELS}_loss_of_a_packed_batch_is_the_loss_of_its_documents",
        f"{MODELS}_every_parameter_gets_a_gradient_also_from_the_empty_batch",
        f"{TESTS['models']}/test_vae_options.py::test_the_variational_mode_is_the_textbooks",
        f"{TESTS['evaluation']}/test_scores.py",
    ],
    "pipeline/models/vocabulary_head.py": [f"{TESTS['models']}/test_vocabulary_head.py"],
    "pipeline/data/batch.py": [
        f"{TESTS['data']}/test_batch.py",
        f"{MODELS}_loss_of_a_packed_batch_is_the_loss_of_its_documents",
        f"{MODELS}_cached_steps_equal_the_uncached_forward",
    ],
    "pipeline/data/windows.py": [f"{TESTS['data']}/test_plan.py"],
    "pipeline/data/plan.py": [f"{TESTS['data']}/test_plan.py", f"{TESTS['data']}/test_loader.py"],
    "pipeline/data/loader.py": [f"{TESTS['data']}/test_loader.py"],
    "pipeline/data/segments.py": [f"{TESTS['models']}/test_attention.py"],
    "pipeline/models/attention.py": [
        f"{TESTS['models']}/test_attention.py",
        f"{TESTS['models']}/test_stack.py::test_a_band_in_blocks_is_the_whole_mask",
    ],
    "pipeline/models/kv_cache.py": [
        f"{TESTS['models']}/test_kv_cache.py",
        f"{TESTS['models']}/test_sentence_decoder.py",
    ],
    "pipeline/checkpoints/store.py": [TESTS["checkpoints"], "-m", "not launch and not long"],
    "pipeline/checkpoints/saving.py": [TESTS["checkpoints"], "-m", "not launch and not long"],
    "pipeline/evaluation/scores.py": [
        f"{TESTS['evaluation']}/test_scores.py",
        f"{TESTS['evaluation']}/test_digests.py",
        f"{TESTS['evaluation']}/test_controls.py",
        "-k",
        "not real_model and not block",
    ],
    "pipeline/generation/sampling.py": [
        f"{CONTROLS}_sampling_follows_temperature_top_k_top_p_and_min_p",
        f"{CONTROLS}_top_p_is_the_same_where_the_nucleus_is_larger_than_the_first_look",
        f"{CONTROLS}_the_repetition_penalty_lowers_what_was_seen",
        f"{CONTROLS}_senseless_settings_are_refused",
    ],
    "data_prep/text/sentences.py": ["tests/data_prep/text/test_sentences.py"],
}


@dataclass(frozen=True)
class Mutant:
    """outcome: killed, survived, or broken (nothing can be imported with it)."""

    module: str
    line: int
    operator: str
    before: str
    after: str
    outcome: str = ""
    by: str = ""


def mutants(module: str, rng: random.Random) -> Iterator[tuple[Mutant, str]]:
    """Mutants of a module with their source, one for each place of it, in random order."""
    nodes_of = import_extra("cosmic_ray.ast", "mutation")
    plugins, mutating = (import_extra(f"cosmic_ray.{name}", "mutation") for name in ("plugins", "mutating"))
    source = (REPOSITORY / module).read_text(encoding="utf-8")
    # Shifts and bits of what are no bits end in a TypeError, whatever is tested.
    bits = ("LShift", "RShift", "BitOr", "BitAnd", "BitXor")
    plain, nodes = _without_annotations(source), list(nodes_of.ast_nodes(nodes_of.get_ast(source)))
    found = []
    for name in sorted(plugins.operator_names()):
        if plugins.get_operator(name).arguments() or name.endswith(bits):
            continue
        operator = plugins.get_operator(name)()
        places = [place for node in nodes for place, _ in operator.mutation_positions(node)]
        found += [(place, name, occurrence) for occurrence, place in enumerate(places)]
    rng.shuffle(found)
    seen = set()
    for place, name, occurrence in found:
        if place in seen:
            continue
        text = mutating.mutate_code(source, plugins.get_operator(name)(), occurrence)
        if text is None or _without_annotations(text) in (plain, None):
            continue
        seen.add(place)
        lines = zip_longest(source.split("\n"), text.split("\n"), fillvalue="")
        number, before, after = next((n, a, b) for n, (a, b) in enumerate(lines, 1) if a != b)
        yield Mutant(module, number, name.removeprefix("core/"), before.strip(), after.strip()), text


def _without_annotations(source: str) -> str | None:
    """A program's tree; None for what is none, such as the mutant `{//values}` of `{**values}`."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def run(
    modules: Many = (),
    /,
    *,
    minutes: Annotated[Positive, Parameter(help="of CPU, after which no further mutant is tried")] = 60,
    seed: Natural = 1,
    timeout: Annotated[Positive, Parameter(help="seconds of CPU for one mutant's tests")] = 60,
    json_file: Annotated[str | None, Parameter(name="--json", help="also write the mutants there")] = None,
) -> None:
    """Try mutants of the core modules until the time is over, and say which ones no test notices.

    Args:
        modules: those to change, by a part of their path; without any, all
        seed: of the sample
    """
    require_folder(json_file)
    chosen = [name for name in MODULES if not modules or any(part in name for part in modules)]
    if not chosen:
        raise UserError(f"no module fits {', '.join(modules)}; there are {', '.join(MODULES)}")
    tried: list[Mutant] = []
    made = {**header(("cosmic-ray", "torch", "pytest")), "seed": seed, "minutes": minutes}
    turns = zip_longest(*(mutants(name, random.Random(f"{seed} {name}")) for name in chosen))
    with copied_tree() as tree:
        started = _cpu_seconds()
        for mutant, text in filter(None, chain.from_iterable(turns)):
            if _cpu_seconds() - started > 60 * minutes:
                break
            with changed(tree / mutant.module, text):
                status, failed = run_tests(tree, ["-x", *MODULES[mutant.module]], timeout)
            outcome = {0: "survived", 1: "killed", None: "killed"}.get(status, "broken")
            by = "" if status == 0 else (failed or ["out of time"])[0]
            tried.append(Mutant(**asdict(mutant) | {"outcome": outcome, "by": by}))
            log(f"{outcome:8} {mutant.module}:{mutant.line}: {mutant.before}  ->  {mutant.after}  {by}")
            # A run that is stopped leaves what it has measured.
            if json_file:
                write_result({**made, "mutants": [asdict(one) for one in tried]}, json_file)
    judged = [one for one in tried if one.outcome != "broken"]
    print_result(rates("mutants", "killed", ((one.module, one.outcome == "killed") for one in judged)))


def _cpu_seconds() -> float:
    """Of this process and of all tests that have ended."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    raise SystemExit(console("mutation", run, example="python -m tools.mutation losses batch --minutes 15"))
