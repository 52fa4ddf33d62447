"""Stage 8: write the decoder package: the decoder's files, `memory_decoder.json` and a model card."""

import json
import shutil
from pathlib import Path
from typing import Any

from memdec.decoders import parallel
from memdec.decoders.manifest import Manifest, stage
from memdec.decoders.reading.names import RECORD
from memdec.decoders.reading.record import FORMAT, SHARING, Record, checked
from memdec.decoders.reading.shared_tensors import WEIGHTS, find_shared, leave_out
from memdec.decoders.reading.tokenizer import load_tokenizer, token_map_hash

CARD = "README.md"
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors*",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "*.jinja",
)


def share(folder: Path) -> None:
    """Make a folder's files readable for every user: safetensors creates its files with mode 0600."""
    for file in folder.iterdir():
        file.chmod(0o644)


def write_package(
    out: Path, decoder: Path, domain: str, bases: dict[str, Any], training: dict[str, Any], base: Path, manifest: Manifest
) -> Path:
    """Copy a trained decoder into a package for `domain`, without the tensors that `base` has bit for bit.

    `bases`: figures by fingerprint of the base they were measured beside, lambda among them; the first base is the one it was built for.
    """
    with stage(out, manifest) as folder:
        if folder is None or parallel.rank() != 0:
            return out
        for pattern in MODEL_FILES:
            for file in decoder.glob(pattern):
                shutil.copy(file, folder / file.name)
        shared = find_shared(folder, base)
        if shared:
            leave_out(folder / WEIGHTS, shared)
        record = {
            "format": SHARING if shared else FORMAT,
            "domain": domain,
            "lambda": next(iter(bases.values()))["lambda"],
            "token_map": token_map_hash(load_tokenizer(decoder)),
            "bases": bases,
            "training": training,
        }
        if shared:
            record["shared"] = {name: tensor.model_dump() for name, tensor in shared.items()}
        checked(Record, record, out / RECORD)  # the server will check the same
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        (folder / CARD).write_text(model_card(record))
        share(folder)
    return out


def model_card(record: dict[str, Any]) -> str:
    """Text of a package's README.md: how to serve the decoder, its measured perplexities, its corpus and options."""
    domain, training = record["domain"], record["training"]
    corpus = training["corpus"]
    first = next(iter(record["bases"].values()))["name"]
    rows = [
        f"| {b['name']} | {b['lambda']} | {b['base']} | {b['memory']} | **{b['mixture']}** | {b['tokens']:,} |"
        for b in record["bases"].values()
    ]
    made = [f"| {name} | {value} |" for name, value in {**training["options"], **training.get("tuned", {})}.items()]
    return "\n".join(
        [
            "---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [memory-decoder]", "license: other", f"license_name: {json.dumps(corpus['licence'])}", "---", "",
            f"# {domain}: a memory decoder", "",
            "A small language model trained to imitate a kNN-LM retriever over one corpus ([arXiv 2508.09874](https://arxiv.org/abs/2508.09874)).",
            f"It is meant to run beside a base model with the same tokenizer (token map `{record['token_map']}`): p = λ·p_memory + (1 − λ)·p_base.", "",
            "```sh", f"memdec serve PATH/TO/{first} --decoder {domain}=.", "```", "",
            "## Measured", "",
            "Perplexity on the corpus's test split: windows of 512 tokens spread evenly, the second half of each scored; λ tuned on the validation split.", "",
            "| base | λ | base alone | memory alone | mixture | scored tokens |", "|---|---|---|---|---|---|", *rows, "",
            "## Made from", "",
            f"Corpus `{corpus['name']}` (fingerprint `{corpus['fingerprint']}`), licence of its text: {corpus['licence']}.", "",
            "| option | value |", "|---|---|", *made, "",
        ]
    )  # fmt: skip
