"""The ledger of seams: every place where we override, replace or reach into vLLM, in one table.

tests/server/test_hooks.py checks each row against the installed vLLM, and that no file of ours uses a seam which has no row. Nothing here imports vLLM.
"""

from memdec.server.seams import answers, drafting, front_end, model, worker
from memdec.server.seams.seam import Kind, Seam

SEAMS: tuple[Seam, ...] = (*front_end.SEAMS, *answers.SEAMS, *worker.SEAMS, *drafting.SEAMS, *model.SEAMS)

__all__ = ["SEAMS", "Kind", "Seam"]
