"""What lies inside one layer: its attention and feed-forward parts, its matrices. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from badam.blocks.names import Block, ParameterInfo
from badam.vocabulary import BlockStrategy

_TOKEN_MIXING = re.compile(r"attn|attention|mamba|mixer|ssm|conv|recurrent|temporal|time_mix", re.IGNORECASE)
# Only where the projections hang on the layer itself: inside T5's feed-forward, "wo" is no attention output.
_BARE_PROJECTION = re.compile(r"(qkv|[qkvo]|w[qkvo]|query|key|value)(_proj|_lin)?", re.IGNORECASE)
_FEED_FORWARD_NORM = re.compile(r"mlp|feed|ffn|ff_", re.IGNORECASE)
_ATTENTION_NORM = re.compile(r"attn|^sa_", re.IGNORECASE)  # not "attention": post_attention_layernorm feeds the MLP


def layer_blocks(path: str, inside: Sequence[ParameterInfo], strategy: BlockStrategy) -> list[Block]:
    """The blocks of the layer at module ``path``, whose parameters are ``inside``, in model order."""
    if strategy == "layer":
        return [Block(path, (path,), _numel(inside))]
    attention, feed_forward = split_layer(path, inside)
    if strategy == "matrix":
        return [*_matrix_blocks(attention), *_matrix_blocks(feed_forward)] or [Block(path, (path,), _numel(inside))]
    if not attention or not feed_forward:
        return [Block(path, (path,), _numel(inside))]
    return [
        Block(f"{path}.{word}", tuple(dict.fromkeys(_child(path, p.name) for p in part)), _numel(part))
        for word, part in (("attention", attention), ("mlp", feed_forward))
    ]


def split_layer(path: str, inside: Sequence[ParameterInfo]) -> tuple[list[ParameterInfo], list[ParameterInfo]]:
    """Cut a layer into token mixing and feed-forward, each parameter in exactly one.

    The layer's children are told apart by name (anything that mixes tokens is attention, the rest feed-forward);
    children without a matrix are norms and go with the part that they feed, see :func:`_norms_of_attention`.
    """
    children: dict[str, list[ParameterInfo]] = {}
    for parameter in inside:
        children.setdefault(_child(path, parameter.name), []).append(parameter)
    norms = [child for child, members in children.items() if not any(member.is_matrix for member in members)]
    mixing = {
        child
        for child, members in children.items()
        if child not in norms and any(_mixes_tokens(path, member.name) for member in members)
    }
    if mixing and len(mixing) + len(norms) < len(children):
        mixing |= _norms_of_attention(norms)
    elif mixing:
        mixing |= set(norms)
    attention = [p for p in inside if _child(path, p.name) in mixing]
    return attention, [p for p in inside if _child(path, p.name) not in mixing]


def _norms_of_attention(norms: Sequence[str]) -> set[str]:
    """Which of a layer's norms go with attention: half of them (the middle one too), those that say so first.

    The rest is filled in registration order, which follows the computation even where all norms are registered after
    all matrices. So Llama's ``post_attention_layernorm`` goes with the MLP that it feeds, and Gemma 2's, which is
    one of four and precedes ``pre_feedforward_layernorm``, with attention.
    """
    names = {norm: norm.rpartition(".")[2] for norm in norms}
    named = {norm for norm, name in names.items() if _ATTENTION_NORM.search(name)}
    undecided = [norm for norm in norms if norm not in named and not _FEED_FORWARD_NORM.search(names[norm])]
    missing = max(0, (len(norms) + 1) // 2 - len(named))
    return named | set(undecided[:missing])


def _matrix_blocks(part: Sequence[ParameterInfo]) -> list[Block]:
    """One block per matrix of a part of a layer; biases and norms join the matrix that is nearest by name."""
    matrices = [parameter for parameter in part if parameter.is_matrix and not parameter.name.endswith("bias")]
    members = {matrix.name: [matrix] for matrix in matrices}
    for parameter in part:
        if parameter.name not in members and matrices:
            nearest = max(matrices, key=lambda matrix: _shared_components(matrix.name, parameter.name))
            members[nearest.name].append(parameter)
    blocks = []
    for name, group in members.items():
        module = name.rpartition(".")[0]
        # The module names its block where it has one matrix; fused experts and bare parameters keep their own name.
        alone = sum(matrix.name.rpartition(".")[0] == module for matrix in matrices) == 1
        blocks.append(Block(module if alone else name, tuple(p.name for p in group), _numel(group)))
    return blocks


def _shared_components(first: str, second: str) -> tuple[int, int]:
    """How near two names are: shared leading components, then shared leading characters of the next one."""
    ours, theirs = first.split("."), second.split(".")
    shared = 0
    while shared < min(len(ours), len(theirs)) and ours[shared] == theirs[shared]:
        shared += 1
    stem = 0
    if shared == len(ours) - 1 == len(theirs) - 1:  # siblings: gate_up_proj and gate_up_proj_bias
        stem = len(ours[-1]) if theirs[-1].startswith(ours[-1]) else 0
    return shared, stem


def _child(path: str, name: str) -> str:
    """The layer's child that holds a parameter; a numbered child of a list (T5's ``layer.1``) counts as a child."""
    inner = name[len(path) + 1 :].split(".")
    depth = 2 if len(inner) > 2 and inner[1].isdigit() else 1
    return ".".join([path, *inner[:depth]])


def _mixes_tokens(path: str, name: str) -> bool:
    inner = name[len(path) + 1 :]
    return bool(_TOKEN_MIXING.search(inner) or _BARE_PROJECTION.fullmatch(inner.partition(".")[0]))


def _numel(parameters: Sequence[ParameterInfo]) -> int:
    return sum(parameter.numel for parameter in parameters)
