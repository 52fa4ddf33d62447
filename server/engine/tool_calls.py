"""Grammars of tool calls: no more than one character of white space where JSON allows any number of them."""

import json
from dataclasses import replace
from typing import TypeVar

from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams

Params = TypeVar("Params", SamplingParams, PoolingParams)
MOST = "max_whitespace_cnt"


def bounded(params: Params) -> Params:
    """A request's sampling parameters, with a bound on white space in its structural tag if it has one; a client's own bound stays.

    vLLM's `disable_any_whitespace` reaches JSON schemas, but not those inside of structural tags: a small model, greedy, then writes white
    space to the end. When vLLM passes its option on to `compile_structural_tag`, this can go.
    """
    outputs = getattr(params, "structured_outputs", None)
    if outputs is None or not isinstance(outputs.structural_tag, str):
        return params
    try:
        tag = json.loads(outputs.structural_tag)
    except ValueError:
        return params  # vLLM will refuse it with its own message
    params = params.clone()
    params.structured_outputs = replace(outputs, structural_tag=json.dumps(_bound(tag)))
    return params


def _bound(node: object) -> object:
    if isinstance(node, list):
        return [_bound(one) for one in node]
    if not isinstance(node, dict):
        return node
    if node.get("type") == "json_schema" and "json_schema" in node:  # within a schema nothing is changed
        return {**node, MOST: 1 if node.get(MOST) is None else node[MOST]}
    return {key: _bound(value) for key, value in node.items()}
