"""`sllm import` of a pretrained language model: a Hugging Face folder or a GGUF file → a model folder.

The weights become fp32 safetensors of the plain Hugging Face class, however they were stored. The folder is a
token-level model of ours, can be `model.backbone.path`, and starts layouts `stack` and `anchors`. Its
tokenizer is exact or refused. Nothing is loaded from the network, and nothing but tensors is unpickled.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from data_prep.common.errors import UserError, counted, first_line, log
from data_prep.common.extras import import_extra
from data_prep.text.tokenizer import COMPANION_FILES, Tokenizer, _byte_alphabet, load_tokenizer
from data_prep.text.tokenizer_files import CONFIG_FILE, END_SYMBOLS, convert_slow_files, read_config
from pipeline.export.model_folder import require_replaceable, write_folder
from pipeline.models.attention import HF_ATTENTION
from pipeline.models.backbone import FAMILIES, load_packable, require_family, require_supported
from pipeline.models.factory import set_text_keys
from pipeline.models.folders import DEFAULT_SENTENCES, load_pretrained
from pipeline.models.token_lm import TokenLM

EXTRA = "import"
WINDOW_TOKENS = 1024  # of evaluation, unless the model has fewer positions
MAGIC = b"GGUF"

_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# `tokenizer.ggml.pre` of a GGUF file → how its tokenizer cuts a text into words: GPT-2's way, GPT-2's after
# single digits, or a pattern.
_WORDS = {
    **dict.fromkeys(("gpt-2", "olmo", "phi-2", "mpt"), None),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), "digits"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _GPT4 % ""),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe"), _GPT4 % "{1,3}"),
    "tekken": _TEKKEN,
}
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")  # a word of the vocabulary is one token
_CONTROL, _ADDED = 3, 4  # kinds of `tokenizer.ggml.token_type`
# They mark turns of a chat, not documents.
_CHAT = ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>")
_NO_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))  # bytes that no text has


def is_pretrained(source: str | Path) -> bool:
    """Whether `source` is a folder or a GGUF file, not a checkpoint of the paper's own code."""
    source = Path(source)
    if not source.is_file():
        return source.is_dir() or source.suffix == ".gguf"
    with open(source, "rb") as file:
        return source.suffix == ".gguf" or file.read(len(MAGIC)) == MAGIC


def import_pretrained(source: str | Path, output: str | Path) -> TokenLM:
    """Write a pretrained model as a model folder.

    Raises: UserError for a source that is no supported model, or whose tokenizer is missing or loses text.
    """
    source, output = Path(source), Path(output)
    require_replaceable(output)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        # The tokenizer first: it is refused within a second, and weights may take minutes.
        if source.is_dir():
            tokenizer, added = _folder_tokenizer(source, folder)
            model = load_packable(AutoModelForCausalLM, source, use_safetensors=_safetensors(source))
        else:
            reader = _open_gguf(source)
            tokenizer, added = _gguf_tokenizer(reader, source, folder)
            model = _gguf_model(source)
        if model.config.vocab_size < tokenizer.vocab_size - len(added):
            raise UserError(
                f"{source}: a vocabulary of {model.config.vocab_size:,}, but its tokenizer has "
                f"{counted(tokenizer.vocab_size - len(added), 'entry', 'entries')}"
            )
        if added:
            _add_rows(model, added, tokenizer.vocab_size)
        window = min(WINDOW_TOKENS, getattr(model.config, "max_position_embeddings", 1 << 30) - 1)
        set_text_keys(model, tokenizer, DEFAULT_SENTENCES, window)
        # `generate` of Hugging Face would sample by the source's settings, and refuse some when saved.
        model.generation_config = type(model.generation_config).from_model_config(model.config)
        token_model = TokenLM(model).eval()
        origin = {"run_dir": None, "checkpoint": str(source), "recipe": None, "imported_with": None}
        write_folder(token_model, tokenizer, output, origin)
    return token_model


def _safetensors(folder: Path) -> bool:
    """Whether a folder has safetensors; the published OPT has only files of torch, which are read as tensors
    alone."""
    return any(folder.glob("*.safetensors")) or not any(folder.glob("pytorch_model*.bin"))


# Tokenizers.


# The ids of entries that were added for missing bytes, each with the id of the entry that it starts as.
Added = dict[int, int]


def _folder_tokenizer(source: Path, made: Path) -> tuple[Tokenizer, Added]:
    """The tokenizer of a Hugging Face folder, written to `made`."""
    inner = source / "tokenizer"
    source = inner if inner.is_dir() else source
    if (source / "tokenizer.json").is_file():
        definition = (source / "tokenizer.json").read_bytes()
    elif (source / "vocab.json").is_file() and (source / "merges.txt").is_file():
        definition = convert_slow_files(source)
    else:  # a SentencePiece model, or nothing
        return load_tokenizer(source), {}
    for name in (CONFIG_FILE, *COMPANION_FILES):
        if (source / name).is_file():
            (made / name).write_bytes((source / name).read_bytes())
    return _exact_tokenizer(definition, source, made)


def _exact_tokenizer(definition: bytes, source: Path, made: Path) -> tuple[Tokenizer, Added]:
    """The tokenizer of a tokenizer.json, which is written to `made`, without what needlessly loses text.

    A normal form of Unicode (NFC) is left out: text that is in it keeps its ids, and other text is kept too.
    Bytes that a byte-level vocabulary lacks get entries. Raises: UserError when text is lost all the same.
    """
    try:
        spec = json.loads(definition)
        vocabulary, symbols = spec["model"]["vocab"], spec.get("added_tokens") or []
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{source}/tokenizer.json is not a tokenizer definition: {error!r}") from None
    normalizer = spec.get("normalizer") or {}
    if normalizer and all(step.get("type") == "NFC" for step in normalizer.get("normalizers", [normalizer])):
        log(f"{source}: imported without its NFC normalisation, which changes text: NFC text keeps its ids")
        spec["normalizer"] = None
    added: Added = {}
    # New ids follow the vocabulary, so no added token may have its id there.
    inside = isinstance(vocabulary, dict) and all(token["content"] in vocabulary for token in symbols)
    if inside and (spec.get("decoder") or {}).get("type") == "ByteLevel" and spec["model"]["type"] == "BPE":
        entries = sorted(_byte_alphabet().items(), key=lambda entry: entry[1])
        like = next((vocabulary[symbol] for symbol, _ in entries if symbol in vocabulary), None)
        missing = [(c, byte) for c, byte in entries if c not in vocabulary and byte not in _NO_UTF8]
        if missing and like is not None:
            for index, (symbol, _) in enumerate(missing, max(vocabulary.values()) + 1):
                added[index], vocabulary[symbol] = like, index
            names = " ".join(f"{byte:02X}" for _, byte in missing)
            log(f"{source}: its vocabulary lacks the bytes {names}: added, so that no text is lost")
    _end_documents(made, {token["content"] for token in symbols if token.get("special")}, source)
    (made / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    try:
        return load_tokenizer(made), added
    except UserError as error:
        raise UserError(str(error).replace(str(made), str(source))) from None


def _end_documents(made: Path, special: set[str], source: Path) -> None:
    """Name the symbol between documents of the pretraining where the tokenizer names those of a chat."""
    config = read_config(made)
    symbol = next((symbol for symbol in END_SYMBOLS if symbol in special), None)
    named = {key: config.get(key) for key in ("bos_token", "eos_token")}
    names = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    chat = {key: name for key, name in names.items() if name in _CHAT}
    if symbol is None or not chat:
        return
    marks = " and ".join(sorted(set(chat.values())))
    log(f"{source}: {symbol} is between documents; {marks}, which it names, marks turns of a chat")
    (made / CONFIG_FILE).write_text(json.dumps(config | dict.fromkeys(chat, symbol)), encoding="utf-8")


@torch.no_grad()
def _add_rows(model: PreTrainedModel, added: Added, vocab_size: int) -> None:
    """Rows of embedding and head for added entries: copies, so their probabilities are those of an entry
    that text hardly has."""
    if vocab_size > model.config.vocab_size:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    new, like = list(added), list(added.values())
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    for tensor in (embedding.weight, head.weight, head.bias):
        if tensor is not None:
            tensor[new] = tensor[like]


def _gguf_tokenizer(reader: Any, source: Path, made: Path) -> tuple[Tokenizer, Added]:
    """The tokenizer in a GGUF file. Its words are cut as `tokenizer.ggml.pre` says, which transformers does
    not read."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as RustTokenizer

    def value(key: str) -> Any:
        field = reader.fields.get(f"tokenizer.ggml.{key}")
        return None if field is None else field.contents()

    kind, words, tokens = value("model"), value("pre"), value("tokens")
    if not tokens:
        raise UserError(f"{source}: holds no tokenizer: give a GGUF file with one, or a Hugging Face folder")
    if kind != "gpt2":
        raise UserError(
            f"{source}: its tokenizer is of kind {kind}, which does not work on bytes and loses text: only "
            "byte-level ones (kind gpt2) are supported"
        )
    if words not in _WORDS:
        raise UserError(
            f"{source}: tokenizer.ggml.pre {words!r} is not known, so words cannot be cut as in training; "
            f"known are {', '.join(_WORDS)}"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in value("merges") or []]
    model = models.BPE(
        {token: index for index, token in enumerate(tokens)}, merges, ignore_merges=words in _WHOLE_WORDS
    )
    rust = RustTokenizer(model)
    how = _WORDS[words]
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=how in (None, "digits"))]
    if how == "digits":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif how is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(how), "isolated"))
    rust.pre_tokenizer = pre_tokenizers.Sequence(steps) if how else steps[0]
    rust.decoder = decoders.ByteLevel()
    kinds = value("token_type") or [1] * len(tokens)
    for special, wanted in ((True, _CONTROL), (False, _ADDED)):
        named = [token for token, kind in zip(tokens, kinds, strict=True) if kind == wanted]
        added = [AddedToken(token, normalized=False, special=special) for token in named]
        (rust.add_special_tokens if special else rust.add_tokens)(added)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        index = value(f"{theirs}_token_id")
        if index is not None and index < len(tokens):
            config[f"{ours}_token"] = tokens[index]
    (made / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    return _exact_tokenizer(rust.to_str().encode(), source, made)


# Weights of a GGUF file.


def _open_gguf(path: Path) -> Any:
    """The reader of a GGUF file of a supported architecture.

    Raises: UserError for a missing or damaged file, and for settings that transformers does not read.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    gguf = import_extra("gguf", EXTRA)
    import_extra("accelerate", EXTRA)
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # of numpy, struct and the reader itself
        raise UserError(f"{path}: is damaged or no GGUF file ({first_line(error)})") from None
    found = reader.fields.get("general.architecture")
    architecture = None if found is None else found.contents()
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    readable = [name for name in FAMILIES if name in GGUF_SUPPORTED_ARCHITECTURES]
    if architecture not in readable:
        raise UserError(
            f"{path}: architecture {architecture!r} of GGUF is not supported, only {', '.join(readable)}: "
            "give a Hugging Face folder"
        )
    scaling = reader.fields.get(f"{architecture}.rope.scaling.type")
    scaled = scaling is not None and scaling.contents() != "none"
    if scaled or any(tensor.name.startswith("rope_freqs") for tensor in reader.tensors):
        raise UserError(
            f"{path}: has scaled rotary positions, which are not read from GGUF: give the Hugging Face folder"
        )
    return reader


def _gguf_model(path: Path) -> PreTrainedModel:
    """The model of a GGUF file as a plain one: the loaded object cannot be saved."""
    loaded = load_pretrained(
        AutoModelForCausalLM, path.parent, gguf_file=path.name, use_safetensors=None, where=str(path)
    )
    require_family(loaded.config.model_type, str(path))
    require_supported(loaded.config, str(path))
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(loaded.config)(**settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=HF_ATTENTION)
    model.load_state_dict(loaded.state_dict())
    return model.eval()
