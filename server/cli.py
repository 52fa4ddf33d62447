"""The `memdec` command."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from decoders.errors import DecoderError
from server.errors import MemdecError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; known errors become one line on stderr and exit code 1."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["serve"]:
            from server.engine.launch import run_until_done

            return run_until_done(words[1:])
        return _train(words)
    except (MemdecError, DecoderError) as error:
        print(f"memdec: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _train(words: list[str]) -> int:
    args = _parser().parse_args(words)
    if args.command == "serve":  # only reached with `memdec serve` after options
        return main(["serve"])
    from decoders.corpus import Corpus

    if args.command == "pretrain":
        from decoders.pretrain import BASE, pretrain
        from decoders.train import Schedule

        corpora = [Corpus.open(c) for c in args.tokenizer_corpus]
        pretrain(Corpus.open(args.corpus), corpora, args.work, args.out, BASE, Schedule(args.tokens), args.vocabulary)
        return 0
    from decoders.build import BuildOptions, build

    options = BuildOptions(**{f.name: getattr(args, f.name) for f in fields(BuildOptions)})
    work = args.work or args.out.with_name(f"{args.out.name}.work")
    package = build(args.name, Corpus.open(args.corpus), args.base, args.out, work, options)
    print(f"memdec serve {args.base} --decoder {args.name}={package.path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    from decoders.build import BuildOptions

    parser = argparse.ArgumentParser(prog="memdec", description="Domain memories for any LLM on vLLM.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("serve", help="serve a base model with memory decoders: memdec serve MODEL --decoder NAME=PATH", add_help=False)
    build = commands.add_parser("build", help="train a memory decoder on a corpus, beside a base model")
    build.add_argument("name", help="the domain's name")
    build.add_argument("--corpus", required=True, help="a folder of UTF-8 text, or 'stdlib'")
    build.add_argument("--base", required=True, type=Path, help="Hugging Face folder of the base model")
    build.add_argument("--out", required=True, type=Path, help="folder the package is written to")
    build.add_argument("--work", type=Path, help="folder of the stages' artifacts (default: OUT.work)")
    for f in fields(BuildOptions):
        build.add_argument(
            f"--{f.name.replace('_', '-')}", type=type(f.default), default=f.default, help=f"{f.metadata['help']} (default: {f.default})"
        )
    pretrain = commands.add_parser("pretrain", help="train a small base model and its tokenizer from text")
    pretrain.add_argument("--corpus", required=True, help="a folder of UTF-8 text, or 'stdlib'")
    pretrain.add_argument("--tokenizer-corpus", action="append", default=[], help="further text for the tokenizer; repeatable")
    pretrain.add_argument("--out", required=True, type=Path, help="folder the model is written to")
    pretrain.add_argument("--work", required=True, type=Path, help="folder of tokens and tokenizer")
    pretrain.add_argument("--tokens", type=int, default=5_600_000, help="training tokens (default: %(default)s)")
    pretrain.add_argument("--vocabulary", type=int, default=8192, help="token ids of the tokenizer (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
