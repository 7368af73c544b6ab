"""Who runs the token-level model of `sllm benchmark generation`: `generate`, or another engine.

All of them write the same number of tokens greedily, from the same random weights, and record when the first
sentence's tokens and the last one are there.

hf           `generate` with its dynamic cache
hf-static    `generate` with a preallocated cache (on GPUs it is compiled)
ctranslate2  CTranslate2 (the extra `engines`), weights converted in memory; CPU
llama.cpp    by llama-cpp-python, which builds it (no extra: it needs a compiler); Llamas in fp32 or Q8_0; CPU
"""

from __future__ import annotations

import copy
import importlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from data_prep.common.errors import UserError, counted
from data_prep.common.extras import import_extra
from pipeline.config.library import find_recipe
from pipeline.costs.benchmark import OPT_SIZES, OPT_VOCABULARY, published_opt
from pipeline.costs.options import GenerationBenchmark
from pipeline.costs.sized_recipe import DTYPES, Vocabulary, sized_recipe
from pipeline.models.factory import new_model
from pipeline.models.folders import parameter_count
from pipeline.models.inference import lay_out
from pipeline.models.token_lm import TokenLM

SENTENCE_ROOM = 64  # longest sentence of the models measured


@dataclass(frozen=True)
class Case:
    """One point of the measurement: texts at once; context tokens and new sentences of each."""

    batch: int
    context: int
    sentences: int
    sentence_tokens: int

    @property
    def new_tokens(self) -> int:
        return self.sentences * self.sentence_tokens


@dataclass(frozen=True)
class Turn:
    """Figures of one run of one side."""

    first_sentence: float  # seconds
    tokens_per_second: float  # new tokens of all rows after their first sentence
    cache_bytes: int  # of the context and the new tokens, all rows
    cached_tokens: int  # tokens in those bytes
    step_bytes: int = 0  # of caches that do not depend on the context's length (a decoder's), all rows


class _Clock(StoppingCriteria):
    """Never stops; records the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class TokenSide:
    """A token-level model, by Hugging Face's `generate`."""

    engine = "hf"

    def __init__(self, options: GenerationBenchmark, device: torch.device):
        torch.manual_seed(0)
        model, self.name = _token_model(options.against, options.vocab_size)
        self.model = model.to(device, DTYPES[options.dtype]).eval()
        if options.columns:
            lay_out(self.model)
        self.parameters = parameter_count(self.model)
        self.model.generation_config.pad_token_id = 1
        self._weight_bytes: float = torch.finfo(DTYPES[options.dtype]).bits // 8

    def _require_cpu(self, options: GenerationBenchmark, device: torch.device) -> None:
        """Raises: UserError unless it is a CPU in fp32 or 8 bits."""
        if device.type != "cpu" or options.dtype != "fp32":
            raise UserError(
                f"--engine {self.engine} is for CPUs in fp32 or --int8, not {device.type} in {options.dtype}"
            )

    def limit(self, case: Case) -> str | None:
        room = self.model.config.max_position_embeddings
        needed = case.context + case.new_tokens
        return f"{counted(needed, 'token')}, {counted(room, 'position')}" if needed > room else None

    def bytes_per_token(self, case: Case) -> float:
        """What one token of one row reads by arithmetic: all weights but unread rows of tables, and the cache
        behind the context and half of the new tokens."""
        config, embedding = self.model.config, self.model.get_input_embeddings()
        tables = [m for m in self.model.modules() if isinstance(m, torch.nn.Embedding)]
        tied = self.model.get_output_embeddings().weight is embedding.weight
        rows = sum(m.weight.numel() for m in tables) - (embedding.weight.numel() if tied else 0)
        places = case.context + case.new_tokens / 2
        return (self.parameters - rows) * self._weight_bytes + places * _cached_bytes(
            config, self._cache_size
        )

    @property
    def _cache_size(self) -> int:
        return self.model.dtype.itemsize

    def turn(self, case: Case, prompts_BC: np.ndarray, at_end: Callable[[], None] = lambda: None) -> Turn:
        """One run; `at_end` is called while its caches still live."""
        clock = _Clock()
        ids = torch.from_numpy(prompts_BC).to(self.model.device)
        started = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                use_cache=True,
                min_new_tokens=case.new_tokens,
                max_new_tokens=case.new_tokens,
                return_dict_in_generate=True,
                stopping_criteria=StoppingCriteriaList([clock]),
                cache_implementation="static" if self.engine == "hf-static" else None,
            )
        if out.sequences.shape[1] != case.context + case.new_tokens:
            raise RuntimeError(f"{case}: tokens written: {out.sequences.shape[1] - case.context}")
        at_end()
        cache = out.past_key_values
        layers = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        held = sum(x.untyped_storage().nbytes() for x in layers)
        return _turn(case, started, clock.times, held, int(cache.get_seq_length()) * case.batch)


class StaticSide(TokenSide):
    """`generate` with a preallocated cache."""

    engine = "hf-static"


class CTranslate2Side(TokenSide):
    """A token-level model in CTranslate2, with the same weights."""

    engine = "ctranslate2"

    def __init__(self, options: GenerationBenchmark, device: torch.device):
        self._require_cpu(options, device)
        super().__init__(options, device)
        engine = import_extra("ctranslate2", "engines")
        kind = "int8" if options.int8 else "float32"
        self._weight_bytes = 1 if options.int8 else 4
        with tempfile.TemporaryDirectory() as folder:
            _converter(self.model)(folder).convert(f"{folder}/converted", quantization=kind)
            self._generator = engine.Generator(
                f"{folder}/converted", "cpu", compute_type=kind, intra_threads=torch.get_num_threads()
            )

    def turn(self, case: Case, prompts_BC: np.ndarray, at_end: Callable[[], None] = lambda: None) -> Turn:
        times, written = [0.0] * case.new_tokens, np.zeros(case.batch, dtype=np.int64)

        def record(step: Any) -> bool:
            times[step.step] = time.perf_counter()
            written[step.batch_id] += 1
            return False

        started = time.perf_counter()
        self._generator.generate_batch(
            [[str(token) for token in row] for row in prompts_BC.tolist()],
            max_length=case.new_tokens,
            min_length=case.new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=record,
        )
        at_end()
        if written.tolist() != [case.new_tokens] * case.batch:
            raise RuntimeError(f"{case}: tokens written: {written.tolist()}")
        places = (case.context + case.new_tokens - 1) * case.batch
        return _turn(case, started, times, places * _cached_bytes(self.model.config, 4), places)


class LlamaCppSide(TokenSide):
    """A Llama in llama.cpp, with the same weights; with `--int8` in Q8_0 (8 bits, and 16 for the scale of 32
    weights) and a cache of 16 bits."""

    engine = "llama.cpp"

    def __init__(self, options: GenerationBenchmark, device: torch.device):
        self._require_cpu(options, device)
        super().__init__(options, device)
        if self.model.config.model_type != "llama":
            raise UserError(
                f"--engine llama.cpp: {self.name} is of the family {self.model.config.model_type}; give a "
                "recipe with a Llama"
            )
        config = self.model.config
        sizes = {
            "attention_bias": (config.attention_bias, False),
            "mlp_bias": (config.mlp_bias, False),
            "head_dim": (config.head_dim, config.hidden_size // config.num_attention_heads),
            "hidden_act": (config.hidden_act, "silu"),
            "rope_type": (config.rope_parameters["rope_type"], "default"),
        }
        if other := [f"{key} {has!r}, not {runs!r}" for key, (has, runs) in sizes.items() if has != runs]:
            raise UserError(f"--engine llama.cpp: {self.name} has {', '.join(other)}; give a plain Llama")
        try:
            llama_cpp: Any = importlib.import_module("llama_cpp")
        except ModuleNotFoundError:
            raise UserError(
                "--engine llama.cpp needs llama-cpp-python: pip install llama-cpp-python (builds llama.cpp "
                "with a C++ compiler)"
            ) from None
        self._llama = llama_cpp
        self._int8, self._weight_bytes = options.int8, 34 / 32 if options.int8 else 4
        self._made: tuple[Case, Any] | None = None
        settings = llama_cpp.llama_model_default_params()
        settings.use_mmap = False
        with tempfile.TemporaryDirectory() as folder:
            write_gguf(self.model, f"{folder}/model.gguf", options.int8)
            path = f"{folder}/model.gguf".encode()
            self._loaded = llama_cpp.llama_model_load_from_file(path, settings)
        if not self._loaded:
            raise RuntimeError("llama.cpp does not read the model")

    @property
    def _cache_size(self) -> int:
        return 2 if self._int8 else 4

    def _context(self, case: Case) -> Any:
        """Made once for a case, as an engine that serves requests does."""
        if self._made is None or self._made[0] != case:
            self._free()
            cpp, places = self._llama, case.context + case.new_tokens
            settings = cpp.llama_context_default_params()
            settings.n_seq_max, settings.n_ctx = case.batch, case.batch * (-(-places // 256) * 256)
            settings.n_batch = max(512, case.context, case.batch)
            settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
            if not self._int8:
                settings.type_k = settings.type_v = cpp.GGML_TYPE_F32
            context = cpp.llama_init_from_model(self._loaded, settings)
            if not context:
                raise UserError(f"--engine llama.cpp: no memory for {counted(settings.n_ctx, 'place')}")
            self._made = case, context
        return self._made[1]

    def _free(self) -> None:
        if self._made:
            self._llama.llama_free(self._made[1])
            self._made = None

    def __del__(self) -> None:
        if hasattr(self, "_made"):
            self._free()
        if getattr(self, "_loaded", None):
            self._llama.llama_model_free(self._loaded)

    def write(
        self, case: Case, prompts_BC: np.ndarray, record: Callable[[], None] = lambda: None
    ) -> np.ndarray:
        """The new tokens [B, new]; `record` is called after each of them."""
        cpp, context, size = self._llama, self._context(case), self.model.config.vocab_size
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        batch = cpp.llama_batch_init(max(case.context, case.batch), 0, 1)

        def feed(tokens: list[int], places: list[int], rows: list[int], last: int) -> None:
            """The last `last` tokens get logits."""
            batch.n_tokens = len(tokens)
            for n, (token, place, row) in enumerate(zip(tokens, places, rows, strict=True)):
                batch.token[n], batch.pos[n] = token, place
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, row
                batch.logits[n] = n >= len(tokens) - last
            if code := cpp.llama_decode(context, batch):
                raise RuntimeError(f"llama.cpp: llama_decode ended with {code}")

        def chosen(n: int) -> int:
            logits_V = np.ctypeslib.as_array(cpp.llama_get_logits_ith(context, n), (size,))
            logits_V[self._end] = -np.inf  # ends are not among the tokens written
            return int(logits_V.argmax())

        new_BN = np.zeros((case.batch, case.new_tokens), dtype=np.int64)
        for row, prompt in enumerate(prompts_BC.tolist()):
            feed(prompt, list(range(case.context)), [row] * case.context, 1)
            new_BN[row, 0] = chosen(case.context - 1)
        record()
        rows = list(range(case.batch))
        for at in range(1, case.new_tokens):
            feed(new_BN[:, at - 1].tolist(), [case.context + at - 1] * case.batch, rows, case.batch)
            new_BN[:, at] = [chosen(row) for row in rows]
            record()
        cpp.llama_batch_free(batch)
        return new_BN

    @property
    def _end(self) -> int:
        return self.model.generation_config.eos_token_id

    def turn(self, case: Case, prompts_BC: np.ndarray, at_end: Callable[[], None] = lambda: None) -> Turn:
        times: list[float] = []
        self._context(case)
        started = time.perf_counter()
        self.write(case, prompts_BC, lambda: times.append(time.perf_counter()))
        at_end()
        places = (case.context + case.new_tokens - 1) * case.batch
        held = places * _cached_bytes(self.model.config, self._cache_size)
        return _turn(case, started, times, held, places)


def add_sizes(writer: Any, config: Any) -> None:
    """Give a writer of GGUF files the sizes of a Llama or Qwen2."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def write_gguf(model: Any, path: str, int8: bool) -> None:
    """A Llama of Hugging Face as a GGUF file without a tokenizer, matrices in float32 or Q8_0."""
    gguf = import_extra("gguf", "import")
    config, kinds = model.config, gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, "llama")
    add_sizes(writer, config)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.float().contiguous().numpy()
        if (part := name.split(".")[-2]) in ("q_proj", "k_proj"):  # llama.cpp rotates neighbours
            heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
            halves = array.reshape(heads, 2, -1, array.shape[1])
            array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        kind = kinds.Q8_0 if int8 and array.ndim == 2 else kinds.F32
        stored = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(stored, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _converter(model: Any) -> Any:
    """A converter class of CTranslate2 for a model in memory, whose tokens are named by their numbers."""
    from ctranslate2.converters import TransformersConverter

    class Numbers:
        bos_token, eos_token, unk_token, pad_token = "2", "2", "3", "1"

        def get_vocab(self) -> dict[str, int]:
            return {str(n): n for n in range(model.get_input_embeddings().weight.shape[0])}

    class InMemory(TransformersConverter):
        def __init__(self, folder: str):
            model.config.save_pretrained(folder)
            super().__init__(folder)

        def load_model(self, *_: Any, **__: Any) -> Any:
            return copy.deepcopy(model)  # converters take layers out of a model

        def load_tokenizer(self, *_: Any, **__: Any) -> Any:
            return Numbers()

    return InMemory


def _turn(case: Case, started: float, times: list[float], cache_bytes: float, places: int) -> Turn:
    first, last = times[case.sentence_tokens - 1], times[-1]
    speed = case.batch * (case.new_tokens - case.sentence_tokens) / (last - first)
    return Turn(first - started, speed, int(cache_bytes), places)


def _cached_bytes(config: Any, size: int) -> float:
    """Bytes of keys and values of one token in all layers."""
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * config.hidden_size * shared / heads * size


ENGINES: dict[str, type[TokenSide]] = {
    side.engine: side for side in (TokenSide, StaticSide, CTranslate2Side, LlamaCppSide)
}


def _token_model(against: str, vocab_size: int | None) -> tuple[Any, str]:
    """A token-level model with random weights, and its name. Raises: UserError for anything else."""
    if against in OPT_SIZES:
        return published_opt(against, vocab_size or OPT_VOCABULARY), against
    if not find_recipe(against).is_file():
        raise UserError(f"--against {against}: neither {', '.join(OPT_SIZES)} nor a recipe")
    recipe = sized_recipe(against)
    if recipe.objective != "lm" or recipe.model.layout == "anchors":
        what = "layout is anchors" if recipe.objective == "lm" else f"objective is {recipe.objective}"
        raise UserError(f"--against {against}: its {what}; give a token-level model")
    vocabulary = Vocabulary(vocab_size or recipe.model.backbone.get("vocab_size", OPT_VOCABULARY))
    model = new_model(recipe, vocabulary, {"max_tokens": SENTENCE_ROOM})
    assert isinstance(model, TokenLM)
    return model.model, find_recipe(against).stem
