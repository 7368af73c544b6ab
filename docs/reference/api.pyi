# The public Python API, written by `python -m tools.release.api`.
from typing import Any

# pipeline.models.factory.load_model
def load_model(folder: "str | Path") -> "nn.Module": ...

# pipeline.models.sllm.SLLM
class SLLM:
    def forward(
        self, batch: "Batch", want_correct: "bool" = ..., vectors_Sd: "Tensor | None" = ...
    ) -> "LossSums": ...

# pipeline.models.sentence_vae.SentenceVAE
class SentenceVAE:
    def forward(self, batch: "Batch", want_correct: "bool" = ...) -> "LossSums": ...

# pipeline.models.stack.StackLM
class StackLM:
    def forward(
        self, batch: "Batch", want_correct: "bool" = ..., vectors_Sd: "Tensor | None" = ...
    ) -> "LossSums": ...

# pipeline.generation.api.generate
def generate(
    model: "SentenceModel",
    tokenizer: "Tokenizer",
    prompt: "str" = ...,
    max_sentences: "int" = ...,
    temperature: "float" = ...,
    top_p: "float | None" = ...,
    top_k: "int | None" = ...,
    seed: "int | None" = ...,
    min_p: "float | None" = ...,
    repetition_penalty: "float" = ...,
    max_tokens: "int | None" = ...,
    stop: "Iterable[str]" = ...,
) -> "Generation": ...

# pipeline.generation.api.generate_many
def generate_many(
    model: "SentenceModel",
    tokenizer: "Tokenizer",
    prompts: "Iterable[str]",
    sampling: "Sampling | None" = ...,
    limits: "Limits | None" = ...,
    batch_size: "int" = ...,
    samples: "int" = ...,
    best_of: "bool" = ...,
    seed: "int" = ...,
) -> "Iterator[list[Continuation] | UserError]": ...

# data_prep.shards.reader.ShardSet
class ShardSet:
    def __init__(self, folder: "Path", manifest: "dict"): ...
    folder: "Any"
    manifest: "Any"
    settings: "Any"
    fingerprint: "str"
    dtype: "Any"
    compression: "str"
    def open(cls, folder: "str | Path") -> "ShardSet": ...
    def tokenizer(self) -> "Tokenizer": ...
    def files(self) -> "dict[str, str]": ...
    def __len__(self) -> "int": ...
    def shard(self, i: "int") -> "Shard": ...
    def documents(self) -> "Iterator[Document]": ...
    def document(self, number: "int") -> "Document": ...
    def find(self, key: "str") -> "Document": ...
    def find_all(self, key: "str") -> "Iterator[Document]": ...

# data_prep.shards.reader.Shard
class Shard:
    def __init__(
        self,
        tar_path: "Path",
        index_path: "Path",
        dtype: "np.dtype",
        compression: "str" = ...,
        index_sha256: "str | None" = ...,
    ): ...
    index: "Any"
    def __len__(self) -> "int": ...
    def tokens(self, n: "int") -> "np.ndarray": ...
    def sentence_lengths(self, n: "int") -> "np.ndarray": ...
    def sentence_lengths_of(self, documents: "np.ndarray") -> "np.ndarray": ...
    def document(self, n: "int") -> "Document": ...
    groups: "int"
    def group(self, g: "int") -> "Group": ...

# data_prep.text.tokenizer.load_tokenizer
def load_tokenizer(folder: "str | Path") -> "Tokenizer": ...

# data_prep.text.segmenter.Segmenter
class Segmenter:
    name: "str"
    language: "str"
    version: "int"
    judge_all: "bool"
    def __call__(self, text: "str") -> "list[str]": ...
    def cuts(self, text: "str") -> "list[int]": ...
    def is_complete(self, text: "str") -> "bool": ...
    def __init__(
        self, name: "str", language: "str", version: "int" = ..., judge_all: "bool" = ...
    ) -> "None": ...
