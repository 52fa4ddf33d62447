"""`memdec verify`: the checks that a server makes before it serves a decoder, and a summary for people."""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from memdec.decoders.models import load_model
from memdec.decoders.reading.errors import PackageError
from memdec.decoders.reading.files import shown
from memdec.decoders.reading.names import DOMAIN, DOMAIN_RULE, RECORD
from memdec.decoders.reading.package import Package, read_record
from memdec.decoders.reading.shared_tensors import completed
from memdec.decoders.reading.tokenizer import load_tokenizer, require_same_token_map, token_map_hash
from memdec.decoders.reading.weights import check_weights


def verify(path: Path, base: Path | None = None) -> Iterator[tuple[str, str]]:
    """Check a decoder folder, beside a base if one is given; yields (check, result) and raises PackageError at the first fault."""
    if not path.is_dir():
        raise PackageError(f"{path}: no such folder")
    if base is not None and not base.is_dir():
        raise PackageError(f"--base {base}: no such folder")
    package = Package.open(path, base)
    yield "kind", "memdec package" if read_record(path) else f"plain checkpoint (no {RECORD})"
    shared = package.record.shared
    if shared and base is None:
        raise PackageError(f"{path}: leaves out {shown(next(iter(shared)))}, which its base has; say which base it is with --base")
    yield "architecture", f"{package.config['architectures'][0]}, {package.size / 1e6:,.1f} MB"
    if package.domain is not None and not DOMAIN.fullmatch(package.domain):
        raise PackageError(f"{path / RECORD}: domain is {package.domain!r}, wanted {DOMAIN_RULE}")
    yield "domain", package.domain or "not named: the server's --decoder NAME= says it"

    tokenizer = load_tokenizer(path)
    map_hash = token_map_hash(tokenizer)
    if package.tokenizer not in (None, map_hash):
        raise PackageError(f"{path}: its tokenizer's token map is {map_hash}, {RECORD} says {package.tokenizer}; copy the right one")
    yield "token map", f"{map_hash}, {len(tokenizer):,} ids"

    with tempfile.TemporaryDirectory(prefix="memdec-") as cache:
        model = load_model(completed(package, base, Path(cache)).path if base is not None else path)
    broken = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if broken:
        raise PackageError(f"{path}: {broken[0]} holds values that are not finite; {len(broken)} tensors do")
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise PackageError(f"{path}: {rows:,} rows in its vocabulary, its tokenizer has {len(tokenizer):,} ids")
    with torch.inference_mode():
        logits = model(torch.tensor([[tokenizer.eos_token_id or 0]], device=model.device)).logits.float()
    if not torch.isfinite(logits).all():
        raise PackageError(f"{path}: its first logits are not finite")
    yield "weights", f"{sum(p.numel() for p in model.parameters()):,} parameters, all finite; revision {package.revision}"

    tuned = "tuned beside this base" if package.tuned else "not tuned beside this base" if base else "default"
    yield "lambda", f"{package.lam} ({tuned})"
    if base is not None:
        check_weights(base)
        require_same_token_map(load_tokenizer(base), tokenizer, str(path))
        yield "base", f"{base}: the same token map"
        figures = package.perplexity
        if {"base", "mixture"} <= figures.keys():
            gain = math.log(figures["base"] / figures["mixture"])
            yield "measured", f"test perplexity {figures['base']} -> {figures['mixture']} with the memory ({gain:.2f} nats a token)"
