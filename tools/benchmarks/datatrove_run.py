"""datatrove's own way from jsonl files to token files, for `data-prep benchmark` to measure beside ours.

Run as a script by an interpreter that has datatrove (ours need not): `PYTHON datatrove_run.py LIST OUTPUT
TOKENIZER_JSON`. LIST: a file with one absolute path per line, less its first slash. The last line of stdout
is JSON: versions, documents and tokens written. One task, one worker, nothing shuffled, no end symbol.
"""

import json
import sys
from importlib.metadata import version


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


def _total(stat: object) -> int:
    return int(stat["total"] if isinstance(stat, dict) else stat)


if __name__ == "__main__":
    main(*sys.argv[1:])
