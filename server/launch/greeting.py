"""The lines a person sees when the server is ready."""

from argparse import Namespace

from memdec.server.logs import MEMDEC
from memdec.server.routing.domains import BOTH, Domain, Domains


def ready(args: Namespace, domains: Domains, context: int, seconds: float) -> str:
    """Where the server listens, what it serves, and a curl to paste."""
    url, option = address(args)
    names = ", ".join(f"{d.name} ({of_default(d)}{also(d)})" for d in domains) or "none"
    header = f" -H 'X-Domain: {domains.names[0]}'" if domains.names else ""
    return (
        f"\nmemdec is ready on {url} after {seconds:.0f} s\n"
        f"  base:    {domains.base}\n"
        f"  domains: {names}\n"
        f"  context: {context} tokens\n"
        f"  try:     curl {option}{url}/v1/completions -H 'Content-Type: application/json'{header} "
        f"""-d '{{"model": "{domains.base}", "prompt": "The results show that", "max_tokens": 40, "temperature": 0}}'\n"""
    )


def of_default(domain: Domain) -> str:
    """Lambda of a domain's default mode."""
    mode = domain.modes[0]
    return (
        f"{mode + ', ' if mode == BOTH else ''}lambda {domain.lambda_of(mode):g}{'' if domain.is_tuned else ', not tuned beside this base'}"
    )


def also(domain: Domain) -> str:
    """The modes that a domain has besides its default and none; of an n-gram memory alone, that it is one."""
    more = ", ".join(domain.modes[1:-1])
    return (f"; {more}" if more else "") if domain.decoder else "; ngram alone"


def address(args: Namespace) -> tuple[str, str]:
    """The URL that reaches the server from this machine, and the option that curl needs for it."""
    scheme = "https" if args.ssl_certfile else "http"
    if args.uds:
        return f"{scheme}://localhost", f"--unix-socket {args.uds} "
    everywhere = (None, "", "0.0.0.0", "::")  # noqa: S104
    host = args.host if args.host not in everywhere else "127.0.0.1"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{args.port}", ""


def say(text: str, log_json: bool) -> None:
    """Print the greeting, or write it into the JSON log."""
    if log_json:
        MEMDEC.info(text.strip())
    else:
        print(text, flush=True)
