"""Changes to vLLM's own objects, each of which fails loudly where an upgrade has moved what it changes (see memdec.server.seams)."""


def become(instance: object, ours: type) -> None:
    """Turn an object of vLLM's into one of our subclass of its class. Raises TypeError if it is of another class."""
    if type(instance) not in ours.__mro__[1:-1]:
        raise TypeError(f"vLLM made a {type(instance).__name__}, which can't become a {ours.__name__}: see server/seams")
    instance.__class__ = ours


def overwrite(owner: object, name: str, value: object) -> None:
    """Give an attribute of vLLM's another value. Raises AttributeError if it has none of that name: nothing would read the new value."""
    require(owner, name)
    setattr(owner, name, value)


def require(owner: object, *names: str) -> None:
    """Raise AttributeError for an attribute that something of vLLM's doesn't have, where code of ours has to do without it in other cases."""
    for name in names:
        if not hasattr(owner, name):
            raise AttributeError(f"{getattr(owner, '__name__', type(owner).__name__)} of vLLM has no {name} any more: see server/seams")
