"""The core of the installation trains, evaluates and generates; what needs an extra names it in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers.paths import REPOSITORY
from helpers.runs import arguments, write_recipes

# Packages of the extras in setup.cfg. No module of theirs can be found in the process below.
EXTRAS = ("scipy", "matplotlib", "rapidfuzz", "gigatoken", "mpi4py", "wandb", "lm_eval", "sklearn", "peft")

SCRIPT = """
import json, sys
from importlib.machinery import PathFinder

extras, training, run, validation = json.loads(sys.argv[1])


class WithoutExtras(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in extras else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutExtras

import numpy
from data_prep.common.errors import UserError
from pipeline import SLLM
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.reconstruction import edit_distances
from pipeline.export.model_folder import export_run
from pipeline.interop import harness
from pipeline.research.scaling import fit_power
from pipeline.training.main import main

def refused(function, *given):
    try:
        function(*given)
    except UserError as error:
        return str(error)

status = main(training)
model = export_run(run, run + "/model", "last")
result = {
    "status": status,
    "perplexity": evaluate(model, data=validation)["ppl"],
    "text": SLLM.from_pretrained(model).generate("The list is", max_sentences=2),
    "edit distance": refused(edit_distances, [numpy.arange(2)], [numpy.arange(3)]),
    "offset": refused(fit_power, numpy.arange(1.0, 5.0), numpy.arange(4.0, 0.0, -1.0), True),
    "tasks": refused(harness.run, model, ["--tasks", "sllm_cloze"]),
    "loaded": sorted({name.partition(".")[0] for name in sys.modules} & set(extras)),
}
print(json.dumps(result))
"""


def test_train_evaluate_and_generate(tiny_shards: Path, tiny_valid_shards: Path, tmp_path: Path) -> None:
    write_recipes(tmp_path, tiny_shards, tiny_valid_shards)
    run = tmp_path / "run"
    training = arguments(tmp_path, "sllm", "zero0", run, "--training.max_steps", 2)
    given = json.dumps([EXTRAS, training, str(run), str(tiny_valid_shards)])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, given],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["status"] == 0 and 1 < result["perplexity"] < 1e6
    assert result["text"]
    assert result["edit distance"] == "this needs rapidfuzz: pip install 'sentence-llm[eval]'"
    assert result["offset"] == "this needs scipy: pip install 'sentence-llm[research]'"
    assert result["tasks"] == "this needs lm_eval: pip install 'sentence-llm[lm-eval]'"
    assert result["loaded"] == []
