"""datatrove's path from jsonl files to token files, for `tools.benchmarks.sharding` to measure.

Runs in an interpreter that has datatrove: `PYTHON datatrove_run.py LIST OUTPUT TOKENIZER_JSON`. LIST is a
file with one absolute path per line, without its first slash. The last line of stdout is JSON: versions,
documents and tokens. One task, one worker, no shuffling, no end symbol.
"""

import json
import sys
from importlib.metadata import version
from typing import Any


def main(paths_file: str, output: str, tokenizer_json: str) -> None:
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens.tokenizer import DocumentTokenizer

    executor = LocalPipelineExecutor(
        pipeline=[
            JsonlReader("/", paths_file=paths_file, text_key="content"),
            DocumentTokenizer(
                output_folder=f"{output}/tokens",
                local_working_dir=f"{output}/work",
                save_filename="all",
                tokenizer_name_or_path=tokenizer_json,
                eos_token=None,
                shuffle_documents=False,
            ),
        ],
        tasks=1,
        workers=1,
        logging_dir=f"{output}/log",
    )
    reader, tokenizer = (step.to_dict()["stats"] for step in executor.run().stats)
    counts = {"documents": _total(reader["documents"]), "tokens": _total(tokenizer["tokens"])}
    versions = {name: version(name) for name in ("datatrove", "tokenizers")}
    print(json.dumps(counts | {"versions": versions}))


def _total(stat: Any) -> int:
    return int(stat["total"] if isinstance(stat, dict) else stat)


if __name__ == "__main__":
    main(*sys.argv[1:])
