"""DeepSpeed configs: every mistake is reported in one line before DeepSpeed sees it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.paths import STRATEGIES

from data_prep.common.errors import UserError
from pipeline.config.deepspeed_config import KEYS_FILE, read_strategy
from pipeline.parallel.deepspeed_compat import require_valid
from tools.docs.deepspeed_keys import deepspeed_keys


def refusal(folder: Path, *texts: str) -> str:
    paths = [folder / f"{number}.json" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_strategy(*paths)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"zero_optimisation": {"stage": 2}}', "'zero_optimisation': did you mean 'zero_optimization'?"),
        ('{"bf_16": {"enabled": true}}', "'bf_16': did you mean 'bf16'?"),
        ('{"gradient_cliping": 1}', "did you mean 'gradient_clipping'?"),
        ('{"zero_optimization": {"overlap_com": true}}', "did you mean 'overlap_comm'?"),
        (
            '{"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}',
            "'zero_optimization.offload_optimizer.devise': did you mean 'device'?",
        ),
        ('{"overlap_comm": true}', "did you mean 'zero_optimization.overlap_comm'?"),
        ('{"flops_profiler": {"profile_stp": 2}}', "did you mean 'profile_step'?"),
        ('{"activation_checkpointing": {"partition_activation": true}}', "'partition_activations'?"),
        ('{"tensorboard": {"enabled": true, "job_nam": "x"}}', "did you mean 'job_name'?"),
        ('{"aio": {"queue_deph": 8}}', "did you mean 'queue_depth'?"),
        ('{"data_types": {"grad_acum_dtype": "fp32"}}', "did you mean 'grad_accum_dtype'?"),
        ('{"timers": {"throughput": {"enable": true}}}', "did you mean 'enabled'?"),
        ('{"zero_optimization": {"cpu_offload": true}}', "is an old name: use offload_optimizer"),
        ('{"elasticity": {}}', "elasticity is not for this trainer: remove it"),
        ('{"bf16": {"enabled": true}, "bf16": {"enabled": false}}', "bf16 is given twice"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "stage is given twice"),
        ('{"zero_optimization": true}', "zero_optimization must be a mapping, not true"),
        ('{"zero_optimization": {"stage": true}}', "stage must be one of 0, 1, 2, 3, not true"),
        ('{"zero_optimization": {"stage": 1.5}}', "stage must be one of 0, 1, 2, 3, not 1.5"),
        ('{"zero_optimization": {"stage": 4}}', "stage must be one of 0, 1, 2, 3, not 4"),
        ('{"zero_optimization": {"reduce_bucket_size": 0}}', "must be a whole number above 0, not 0"),
        ('{"bf16": {"enabled": "true"}}', 'bf16.enabled must be true or false, not "true"'),
        ('{"fp16": {"loss_scale": NaN}}', "fp16.loss_scale must be a number, not NaN"),
        ('{"flops_profiler": {"profile_step": "3"}}', 'must be a whole number, not "3"'),
        ('{"data_types": {"grad_accum_dtype": "f32"}}', "must be one of bf16, fp16, fp32"),
        ('{"steps_per_print": -1}', "must be a whole number of at least 1, not -1"),
        ('{"bf16": {"enabled": "auto"}}', "bf16.enabled is auto: give true or false, or remove it"),
        ('{"zero_optimization": "auto"}', "zero_optimization is auto"),
        ('{"zero_optimization": {"reduce_bucket_size": "auto"}}', "is auto: give a whole number above 0"),
        ('{"zero_optimization": {"leaf_module": {"names": ["auto"]}}}', "names has auto in it"),
        ('{"gradient_clipping": 1.0}', "the recipe's optimizer.clip decides"),
        ('{"optimizer": {"type": "Adam", "params": {"lr": "auto"}}}', "the recipe's optimizer.* decides"),
        ('{"optimizer": {"type": "AdamW", "params": {"lr": 1}}}', "the recipe's optimizer.* decides"),
        ('{"scheduler": {"type": "WarmupLR"}}', "the recipe's schedule.* decides"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, says: str) -> None:
    assert says in refusal(tmp_path, text)


def test_all_mistakes_of_all_files_are_in_one_line(tmp_path: Path) -> None:
    message = refusal(
        tmp_path, '{"bf_16": {}, "zero_optimization": {"stage": "auto", "stag": 1}}', '{"fp16": 1, "fp16": 2}'
    )
    assert all(f"DeepSpeed config {tmp_path / name}" in message for name in ("0.json", "1.json"))
    for part in (
        "'bf_16'",
        "stage is auto",
        "'zero_optimization.stag'",
        "fp16 is given twice",
        "fp16 must be",
    ):
        assert part in message


def test_auto_is_left_to_the_recipe_where_the_recipe_has_the_value(tmp_path: Path) -> None:
    path = tmp_path / "auto.json"
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    adam = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
    values = dict.fromkeys((*sizes, "gradient_clipping", "scheduler"), "auto") | {"optimizer": adam}
    path.write_text(json.dumps(values | {"zero_optimization": {"stage": 1}}))
    assert read_strategy(path) == {"zero_optimization": {"stage": 1}}


def test_numbers_as_deepspeed_s_documentation_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    path.write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8, "offload_param": null}}')
    assert read_strategy(path)["zero_optimization"]["reduce_bucket_size"] == 5e8


def test_the_configs_of_the_package_are_right() -> None:
    paths = sorted(STRATEGIES.glob("*.json"))
    assert paths
    for path in paths:
        read_strategy(path)


def test_the_keys_are_those_of_the_installed_deepspeed() -> None:
    written = json.loads(KEYS_FILE.read_text())
    assert written == json.loads(json.dumps(deepspeed_keys())), "run `python -m tools.docs.deepspeed_keys`"


def test_what_deepspeed_itself_refuses_is_one_line() -> None:
    sizes = {"train_batch_size": 1}
    require_valid(sizes)
    for wrong in (
        {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
        {"fp16": {"enabled": True, "loss_scale": -1}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
    ):
        with pytest.raises(UserError, match="^DeepSpeed refuses its config: .") as error:
            require_valid(sizes | wrong)
        assert "\n" not in str(error.value) and "pydantic" not in str(error.value)
