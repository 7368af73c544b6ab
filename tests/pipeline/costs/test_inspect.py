"""Counts of `sllm inspect` against real modules, real passes and real memory; the command line around it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import ranks
from helpers.paths import REPOSITORY
from helpers.recipes import BACKBONE, write_recipe
from torch.utils.flop_counter import FlopCounterMode
from transformers import OPTConfig
from transformers.models.opt.modeling_opt import OPTDecoder

from data_prep.common.errors import UserError, run_main
from pipeline.cli import main as cli
from pipeline.config.schema import load_recipe
from pipeline.costs import inspect as inspection
from pipeline.costs.inspect import inspect, made_up_batch, new_model
from pipeline.costs.sized_recipe import Vocabulary, sized_recipe
from pipeline.costs.zero import Strategy, Weights, states_memory
from pipeline.data.segments import SegmentLayout
from pipeline.models import attention
from pipeline.models.flops import batch_cores, count_operations, counted_rows
from pipeline.models.folders import parameter_count

pytestmark = pytest.mark.launch

VARIANTS = {
    "plain": {},
    "paper": {"vae": {"layout": "paper"}},
    "attention": {"vae": {"fusion": "attention"}},
    "variational": {"vae": {"variational": True}},
    "tied": {"vae": {"tie_word_embeddings": True}},
    "rotary": {"vae": {"positions": "rotary"}},
    "adapters": {"vae": {"embedding_size": 48}, "backbone": {"word_embed_proj_dim": 32}},
}


def real_model(recipe: Path, vocab_size: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return new_model(sized_recipe(recipe), Vocabulary(vocab_size), {})


@pytest.mark.parametrize(
    ("objective", "variant"), [("sllm", v) for v in VARIANTS] + [("vae", "plain"), ("lm", "plain")]
)
def test_the_dry_step_counts_what_a_real_one_does(objective, variant, tmp_path):
    recipe = write_recipe(tmp_path, objective, **VARIANTS[variant])
    found = inspect(recipe, vocab_size=500, dtype="fp32")
    model = real_model(recipe, 500).train()
    assert (
        found["parameters"]["total"] == parameter_count(model) == sum(found["parameters"]["by_part"].values())
    )

    batch = made_up_batch(256, 1024, 10.9, 64)
    assert found["bin"] == {"tokens": 1024, "sentences": batch.sentences, "windows": 4}
    # PyTorch's counter overlooks this one (the head's weight gradient).
    in_place = {torch.ops.aten.addmm_: lambda c, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with (
        counted_rows(model) as rows,
        FlopCounterMode(display=False, custom_mapping=in_place) as flops,
    ):
        model(batch).objective.backward()
    operations = count_operations(model, rows, batch_cores(model, batch))
    assert {k: v * 1024 for k, v in found["multiply_adds_per_token"]["by_part"].items()} == pytest.approx(
        operations.by_part()
    )
    # PyTorch's own counter, over forward and backward. Matrix products alone: it does not know the CPU's
    # attention kernel.
    products = sum(n for name, n in flops.get_flop_counts()["Global"].items() if "mm" in str(name))
    linear = sum(operations.linear.values())
    assert products == pytest.approx(2 * 3 * linear, rel=0.01)
    assert 3 * operations.needed / 1024 == pytest.approx(found["multiply_adds_per_token"]["training"])


def test_attention_pairs_are_counted_by_hand(tmp_path):
    model = real_model(write_recipe(tmp_path), 500)
    batch = made_up_batch(40, 80, 10.0, 64)  # two windows of four sentences of ten tokens
    operations = count_operations(model, {}, batch_cores(model, batch))
    each = 2 * 64 * 2  # q·k and weights·v, width 64, two layers
    assert operations.attention == {
        "encoder": each * 8 * 10 * 10,
        "decoder": each * 8 * (11 * 12 // 2),
        "backbone": each * 2 * (5 * 6 // 2),
    }
    assert operations.masked == each * (8 * (11 * 10 // 2) + 2 * (5 * 4 // 2))
    assert operations.padding == 0 == operations.padding_share


def test_attention_windows_are_counted_by_what_each_row_sees(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "max_position_embeddings": 300, "vocab_size": 500}
    recipe = {"objective": "lm", "output_dir": "x", "data": {"shards": ["a"], "window_tokens": 200}}
    recipe |= {"training": {"max_steps": 1}}
    cores = {}
    for name, keys in (
        ("llama", {}),
        ("mistral", {"sliding_window": 32}),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 2}),
    ):
        recipe["model"] = {"backbone": {"model_type": name, **sizes, **keys}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        found = inspect(tmp_path / f"{name}.yaml", tokens=400, dtype="fp32")["multiply_adds_per_token"]
        cores[name] = found["attention_cores"] * 400
    full, seen = 201 * 202 // 2, 32 * 33 // 2 + (201 - 32) * 32
    each = 2 * 64 * 2  # q·k and weights·v, width 64, two windows of 200 tokens and BOS
    assert cores["llama"] == pytest.approx(3 * each * full)
    assert cores["mistral"] == pytest.approx(3 * each * seen)
    assert cores["qwen2"] == pytest.approx(each * (2 * full + seen))


def test_padding_is_weighed_by_operations(tmp_path):
    from pipeline.data.batch import build_batch
    from pipeline.data.windows import Span

    model = real_model(write_recipe(tmp_path, "vae"), 500)
    lengths = torch.tensor([40, 41]).numpy()  # long ones share a block of 41 columns
    batch = build_batch([Span(torch.zeros(81, dtype=torch.long).numpy(), lengths, True)])
    operations = count_operations(model, {}, batch_cores(model, batch))
    each = 2 * 64 * 2
    assert operations.padding == each * ((2 * 41**2 - 40**2 - 41**2) + (2 * 42**2 - 41**2 - 42**2))
    computed = sum(operations.attention.values()) + operations.masked + operations.padding
    assert operations.padding_share == operations.padding / computed


# Memory -------------------------------------------------------------------------------------------------

MEASURE = """
import json, re, sys, torch
from pathlib import Path
from pipeline.costs.inspect import Vocabulary, made_up_batch, new_model, sized_recipe
def resident():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024
torch.set_num_threads(1)
model = new_model(sized_recipe(sys.argv[1]), Vocabulary(8000), {})
model(made_up_batch(16, 16, 10.9, 64)).objective.backward()  # libraries allocate what they keep
model.zero_grad()
batch = made_up_batch(256, 4096, 10.9, 64)
Path("/proc/self/clear_refs").write_text("5")
before = resident()
model(batch).objective.backward()
print(json.dumps(resident() - before))
"""


def test_a_real_step_needs_the_predicted_memory(tmp_path):
    sizes = {
        "vae": {"hidden_size": 384, "layers": 4},
        "backbone": {"hidden_size": 384, "word_embed_proj_dim": 384},
    }
    recipe = write_recipe(tmp_path, data={"bin_tokens": 4096}, **sizes)
    found = inspect(recipe, vocab_size=8000, dtype="fp32", worlds=[1])
    weights = 4 * found["parameters"]["total"]
    predicted = found["step_memory"]["peak_one_process"] - weights
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(recipe)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed leaves the process at once
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert predicted > 150e6  # far above what an allocator rounds
    assert measured == pytest.approx(predicted, rel=0.03)


def test_weights_gradients_and_optimizer_are_exact(tmp_path):
    recipe = write_recipe(tmp_path)
    model = real_model(recipe, 500)
    optimizer = torch.optim.AdamW(model.parameters())
    model(made_up_batch(256, 1024, 10.9, 64)).objective.backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    (row,) = (
        r
        for r in inspect(recipe, vocab_size=500, dtype="fp32", worlds=[1])["memory_per_gpu"]
        if r["stage"] == "0"
    )
    assert row["weights"] == sum(p.nbytes for p in model.parameters())
    assert row["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    assert row["optimizer"] == sum(t.nbytes for t in states)


HELD = """
import gc, json, os, sys
from pathlib import Path
import deepspeed, torch
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
def held():
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
def run(stage, dtype):
    deepspeed.init_distributed("gloo")
    config = json.loads(Path(sys.argv[1], f"zero{stage}.json").read_text())
    if dtype == "fp32":
        del config["bf16"]
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
    config |= {"zero_allow_untested_optimizer": True}
    config["zero_optimization"] |= {"reduce_bucket_size": 1}  # its buffers would drown the rest
    before = held()
    model = torch.nn.Sequential(*(torch.nn.Linear(200, 200, bias=False) for _ in range(32)))
    optimizer = torch.optim.AdamW(model.parameters())
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    x = torch.randn(2, 200, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    for micro_batch in range(4):
        engine.backward(engine(x).float().square().mean())
        if micro_batch == 3:
            break
        engine.step()
    print("held", stage, dtype, (held() - before) / (32 * 200 * 200), flush=True)
for stage in "0123":
    for dtype in ("fp32", "bf16"):
        if os.fork() == 0:  # a process each, without the others' remains
            run(stage, dtype)
            os._exit(0)
        assert os.wait()[1] == 0
"""


def test_deepspeed_holds_what_is_predicted():
    """Before the update of the second step: weights, gradients and optimizer of each stage, one rank."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = os.environ | alone | {"MASTER_PORT": str(ranks.free_port()), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", HELD, str(REPOSITORY / "ds_configs")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("held ")]
    for stage, dtype, measured in found:
        states = states_memory(Weights(10**6, 10**6), Strategy.read(f"zero{stage}"), 1, dtype)
        predicted = sum(states[name] for name in ("weights", "gradients", "optimizer")) / 10**6
        assert float(measured) == pytest.approx(predicted, abs=0.2), (stage, dtype)
    assert len(found) == 8


def test_the_stages_divide_what_they_say():
    n = 1_000_000

    def states(stage: str, world: int, dtype: str = "bf16") -> dict[str, int]:
        return states_memory(Weights(n, n, live=n), Strategy.read(f"zero{stage}"), world, dtype)

    assert states("0", 8) == states("0", 1)
    assert states("0", 8)["optimizer"] == 12 * n and states("0", 8, "fp32")["optimizer"] == 8 * n
    assert states("1", 8)["optimizer"] == 12 * n // 8 and states("1", 8)["weights"] == 2 * n
    assert states("2", 8)["gradients"] == 4 * n // 8 and states("2", 8)["weights"] == 2 * n
    assert states("3", 8)["weights"] == 2 * n // 8 and states("3", 8)["gathered"] == 2 * n
    assert states("0", 8)["gradients"] == 2 * n and states("1", 8)["gradients"] == 6 * n
    offload = states("3-offload", 8)
    assert offload["weights"] == offload["gradients"] == offload["optimizer"] == 0
    assert offload["host"] == 18 * n // 8


def test_the_total_takes_the_larger_of_activations_and_update(tmp_path):
    """The update needs its memory when the activations are gone; gradients come while activations go."""
    for tokens in (32, 8192):
        rows = inspect(write_recipe(tmp_path), vocab_size=2000, tokens=tokens, worlds=[1])["memory_per_gpu"]
        for row in rows[:-1]:
            held = sum(row[part] for part in ("weights", "gathered", "optimizer", "buckets"))
            updating, most = row["gradients"] + row["update"], row["gradients"] + row["activations"]
            assert row["update"] > 0 and held + updating <= row["total"] <= held + max(updating, most)
            assert row["total"] >= held + row["activations"]
            assert (row["total"] == held + updating) == (tokens == 32), row


def test_bf16_halves_the_activations_and_larger_bins_cost_more(tmp_path):
    recipe = write_recipe(tmp_path)
    full, half = (inspect(recipe, vocab_size=500, dtype=d)["step_memory"] for d in ("fp32", "bf16"))
    # Without logits: a GPU computes them in larger chunks.
    body = [step["activations"] - step["of_which_logits"] for step in (half, full)]
    assert 0.45 < body[0] / body[1] < 0.8, body
    more = inspect(recipe, vocab_size=500, dtype="fp32", tokens=2048)["step_memory"]
    assert 1.8 < more["activations"] / full["activations"] < 2.1
    assert 0 < full["of_which_logits"] < full["activations"] < full["peak_one_process"]


# The command --------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys):
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        status = run_main("sllm", lambda: cli.main([str(argument) for argument in arguments]))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_the_published_sizes(run):
    status, out, _ = run("inspect", "--all", "--json")
    sizes = {row["recipe"]: row for row in json.loads(out)["sizes"]}
    assert status == 0 and len(sizes) == 18
    assert set(inspection.PUBLISHED) == {name for name, row in sizes.items() if row["paper_millions"]}
    for row in sizes.values():
        if row["paper_millions"]:
            assert row["parameters"]["paper"] / 1e6 == pytest.approx(row["paper_millions"], rel=0.005)
    assert "sllm-1.3b-h1" in inspection.format_all(json.loads(out))


def test_a_release_that_draws_layerdrop_at_0_is_inspected(tmp_path, monkeypatch):
    forward = OPTDecoder.forward

    def of_transformers_5_17(self, *args, **kwargs):
        if self.training and torch.rand([]) < self.layerdrop:
            raise AssertionError
        return forward(self, *args, **kwargs)

    recipe = write_recipe(tmp_path, "sllm", model={"backbone": BACKBONE})
    expected = inspect(str(recipe))
    monkeypatch.setattr(OPTDecoder, "forward", of_transformers_5_17)
    assert inspect(str(recipe)) == expected


def test_the_largest_size_is_inspected_without_memory():
    code = "import resource, sys\nfrom pipeline.cli import main as cli\n"
    code += "resource.setrlimit(resource.RLIMIT_DATA, (3_000_000_000,) * 2)\n"  # its weights alone are 6.4 GB
    code += "sys.exit(cli.main(['inspect', '--recipe', 'sllm-1.3b-h1', '--dtype', 'fp32', '--json']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 1.59e9 < found["parameters"]["total"] < 1.6e9
    # DESIGN.md §8 says about 280M; the head also predicts the end symbols
    assert 280e6 < found["multiply_adds_per_token"]["forward"] < 310e6


def test_the_text_holds_every_part_and_stage(tmp_path, run):
    status, out, err = run("inspect", "--recipe", write_recipe(tmp_path), "--world", 1, 16)
    assert status == 0 and err == ""
    for word in ("encoder", "decoder", "head", "backbone", "stop head", "3-offload", "activations"):
        assert word in out
    assert sum(line.split()[1:2] == ["16"] for line in out.splitlines()) == 5


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_adapters_are_counted_and_what_they_are_on_is_not_trained(tmp_path, dtype):
    recipe = write_recipe(tmp_path, "sllm")
    plain = inspect(str(recipe), dtype=dtype)["parameters"]
    OPTConfig(**{key: value for key, value in BACKBONE.items() if key != "model_type"}).save_pretrained(
        tmp_path / "opt"
    )
    written = yaml.safe_load(recipe.read_text())
    written["model"]["backbone"] = {"path": str(tmp_path / "opt")}
    written["model"]["lora"] = {"rank": 4, "targets": ["q_proj"]}
    recipe.write_text(yaml.safe_dump(written))
    result = inspect(str(recipe), dtype=dtype)
    found = result["parameters"]
    adapters = BACKBONE["num_hidden_layers"] * 2 * 4 * BACKBONE["hidden_size"]
    assert found["adapters"] == adapters and found["total"] == plain["total"] + adapters
    assert found["trained"] == plain["trained"] - plain["by_part"]["backbone"] + adapters
    assert f"{adapters:,} of them adapters" in inspection.format_inspection(result)


def test_a_vae_is_found_by_its_folder_its_name_or_a_flag(tmp_path):
    by_name = sized_recipe("sllm-350m-h2").model.vae
    assert by_name["layers"] == 2 and by_name["hidden_size"] == 1024 and "path" not in by_name
    sizes = write_recipe(tmp_path, "vae", name="other", vae={"hidden_size": 32})
    recipe = write_recipe(tmp_path)
    text = yaml.safe_load(recipe.read_text()) | {"model": {"vae": {"path": "gone/x"}, "backbone": BACKBONE}}
    recipe.write_text(yaml.safe_dump(text))
    with pytest.raises(UserError, match="--vae-recipe"):
        sized_recipe(recipe)
    assert sized_recipe(recipe, sizes).model.vae["hidden_size"] == 32
    real_model(sizes, 500).save_pretrained(tmp_path / "x")
    text["model"]["vae"]["path"] = str(tmp_path / "x")
    recipe.write_text(yaml.safe_dump(text))
    assert sized_recipe(recipe).model.vae["hidden_size"] == 32
    assert load_recipe(recipe).model.vae == {"path": str(tmp_path / "x")}


def test_bad_input_is_refused_in_one_line(tmp_path, run):
    lm = write_recipe(tmp_path, "lm", name="lm")
    window = write_recipe(tmp_path, name="window", data={"window_tokens": 700})
    for arguments, words in (
        (("--recipe", tmp_path / "gone.yaml"), "does not exist"),
        (("--recipe", "sllm-125m-h1", "--vae-recipe", lm), "not vae"),
        (("--recipe", window), "positions"),
    ):
        status, out, err = run("inspect", *arguments)
        assert status == 2 and out == "" and err.startswith("sllm: error: ") and words in err
        assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("words", [["inspect"], ["benchmark", "train"]])
def test_help_has_an_example(words, capsys):
    assert cli.main([*words, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"example:\n  sllm {' '.join(words)} " in out and "--json" in out


def test_layers_with_dropout_are_computed_again_as_on_a_gpu(tmp_path: Path) -> None:
    """In bf16, where the first pass takes a GPU's operators, the second must take the same ones."""
    recipe = load_recipe(write_recipe(tmp_path, backbone={"dropout": 0.1}))
    found = {}
    for checkpointing in (False, True):
        _, _, step = inspection.DryRun(recipe, 512, "bf16").step(1024, checkpointing)
        found[checkpointing] = step.activations
    assert 0 < found[True] < found[False]


@pytest.mark.skipif(not attention._varlen_attn(), reason="this torch has no varlen attention")
@pytest.mark.parametrize("lengths", [[16384], [512] * 32, [128] * 128])
def test_the_padding_inside_of_varlen_attention_counts(lengths: list[int]) -> None:
    """Of 128 rows for each segment, in fp32; packed tiles take none of it."""
    peaks = {}
    for path in ("varlen", "tiles") if max(lengths) <= 128 else ("varlen",):
        q = torch.empty(16384, 12, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
        layout = SegmentLayout(np.asarray(lengths), torch.device("meta"))
        with inspection.AsOnCuda(), inspection._Memory() as memory, attention.attention_path(path):
            attention.packed_attention(q, q, q, layout, causal=True).sum().backward()
        peaks[path] = memory.peak({}), memory.peak({-1: 0.0})
    with_padding, without = peaks["varlen"]
    assert with_padding - without == 4 * (16384 + 128 * len(lengths)) * 12 * 65
    if "tiles" in peaks:
        assert len(set(peaks["tiles"])) == 1
