"""The text of a step, from what vLLM's two runners keep of their requests' tokens."""

from collections.abc import Callable, Sequence
from functools import cache

from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from memdec.server.model.routing import Beside
from memdec.server.model.text import StepText
from memdec.server.worker.forward_contexts import Numbers


def text_of_v1(runner: GPUModelRunner, ends: Sequence[int], besides: Sequence[Beside | None]) -> StepText:
    """The step's text from the V1 runner's table on the host; `ends`: place in the step of each request's first token, then the number of tokens."""
    batch = runner.input_batch
    positions = batch.num_computed_tokens_cpu[: len(ends) - 1].tolist()
    complete = _completed(runner, ends, positions) if runner.use_async_scheduling else None

    def read(request: int, first: int, end: int) -> list[int]:
        if complete is not None:
            complete(request)
        tokens: list[int] = batch.token_ids_cpu[request, first:end].tolist()
        return tokens

    return StepText(ends[:-1], positions, read, besides, early=complete is None)


def _completed(runner: GPUModelRunner, ends: Sequence[int], positions: Sequence[int]) -> Callable[[int], None]:
    """Return a function that writes a request's tokens of this step into the host's table; steps that are scheduled ahead leave -1 there.

    The device has the tokens: reading them waits for all its work, this step's forward pass included. vLLM reads nothing from these places.
    If the runner kept its table complete, this could be dropped.
    """

    @cache
    def ids() -> Numbers:
        tokens: Numbers = runner.input_ids.gpu[: ends[-1]].cpu().numpy()
        return tokens

    def complete(request: int) -> None:
        begin, end = ends[request], ends[request + 1]
        place = positions[request]
        runner.input_batch.token_ids_cpu[request, place : place + end - begin] = ids()[begin:end]

    return complete


def text_of_v2(input_batch: InputBatch, req_states: RequestState, besides: Sequence[Beside | None]) -> StepText:
    """The step's text from the V2 runner's table, which kernels write: each read of a row waits for the device."""
    table = req_states.all_token_ids.gpu
    indices = input_batch.idx_mapping_np.tolist()
    starts = input_batch.query_start_loc_np[: input_batch.num_reqs].tolist()
    positions = input_batch.num_computed_tokens_np[: input_batch.num_reqs].tolist()

    def read(request: int, first: int, end: int) -> list[int]:
        tokens: list[int] = table[indices[request], first:end].tolist()
        return tokens

    return StepText(starts, positions, read, besides, early=table.device.type == "cpu")
