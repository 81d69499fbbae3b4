"""Parameter names and shapes in, blocks out. Imports no torch.

Layers are found from structure, not from a word: a *layer stack* is a module with numbered children that are modules
themselves (``model.layers.0``, ``transformer.h.0``, ``encoder.block.0``), and the outermost number decides, so the
experts inside a layer stay inside it. What precedes the last stack and has a matrix is embedding, what follows it and
has a matrix is head; shapes tell norms from matrices. Tied weights appear once because the caller's list has them once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import get_args

from badam.blocks.names import Block, ParameterInfo, belongs, rows_of
from badam.errors import InputError
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


__all__ = [
    "STRATEGIES",
    "Block",
    "ParameterInfo",
    "belongs",
    "layer_paths",
    "layer_stacks",
    "partition_parameters",
    "rows_of",
    "split_by_rows",
]

STRATEGIES: tuple[BlockStrategy, ...] = get_args(BlockStrategy)

_POSITIONS = re.compile(r"pos|wpe", re.IGNORECASE)
_LONE_LAYER_TENSORS = 4  # a numbered module without siblings counts as a layer from this many tensors on


def layer_stacks(names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """The stacks of layers among parameter ``names``: for each stack the module paths of its layers, in model order.

    Empty if nothing in the model repeats. A model that is one plain chain of numbered leaves (``0.weight``,
    ``2.weight``) counts as one stack of these leaves.
    """
    stacks: dict[str, dict[str, list[str]]] = {}
    for name in names:
        parts = name.split(".")
        for position, part in enumerate(parts[:-1]):
            if part.isdigit():
                stack, layer = ".".join(parts[:position]), ".".join(parts[: position + 1])
                stacks.setdefault(stack, {}).setdefault(layer, []).append(".".join(parts[position + 1 :]))
                break
    layered = [layers for layers in stacks.values() if _holds_modules(layers)]
    chosen = [layers for layers in layered if len(layers) > 1 or _largest(layers) >= _LONE_LAYER_TENSORS]
    chosen = chosen or layered or [layers for layers in stacks.values() if len(layers) > 1]
    return tuple(tuple(layers) for layers in chosen)


def layer_paths(names: Iterable[str]) -> tuple[str, ...]:
    """The module paths of all layers of all stacks, in model order."""
    return tuple(path for stack in layer_stacks(names) for path in stack)


def partition_parameters(
    parameters: Sequence[ParameterInfo],
    strategy: BlockStrategy,
    *,
    include_embedding: bool = False,
    include_lm_head: bool = False,
) -> tuple[Block, ...]:
    """Cut a model into blocks, in model order: embedding (if asked for), layers, head (if asked for).

    Args:
        parameters: the distinct parameters in model order, as ``named_parameters()`` gives them; tied ones once.
        strategy: ``layer`` makes each layer a block; ``attn-mlp`` cuts each layer into its token mixing and its
            feed-forward part, each with the norms that feed it; ``matrix`` makes each weight matrix a block, together
            with its bias and with the layer's small tensors near it.
        include_embedding: also make a block of the embedding matrices.
        include_lm_head: also make a block of the output projection. With tied weights that is the token embedding:
            the first block, whichever of the two options asks for it.

    Raises:
        InputError: if no layers are found, or an included part does not exist.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"Unknown partition {strategy!r}.", advice=f"Choose one of {', '.join(STRATEGIES)}.")
    paths = layer_paths(parameter.name for parameter in parameters)
    if not paths:
        raise InputError(
            f"No repeated layers among {len(parameters)} parameters, so there is nothing to cut into blocks.",
            advice="Pass the blocks yourself as block_prefix_list.",
        )
    blocks = []
    for path in paths:
        inside = [parameter for parameter in parameters if belongs(parameter.name, (path,))]
        blocks.extend(layer_blocks(path, inside, strategy))
    embedding, head = _outside(parameters, paths)
    if include_embedding and not embedding:
        raise InputError("No embedding matrix precedes the layers.", advice="Leave include_embedding off.")
    if include_lm_head and not (head or embedding):
        raise InputError("No output matrix follows the layers.", advice="Leave include_lm_head off.")
    if include_lm_head and not head and not include_embedding:
        embedding = [_token_embedding(embedding)]
        include_embedding = True
    if include_embedding:
        blocks.insert(0, _outside_block("embedding", embedding, parameters))
    if include_lm_head and head:
        blocks.append(_outside_block("lm_head", head, parameters))
    return tuple(blocks)


def split_by_rows(block: Block, parameters: Sequence[ParameterInfo], limit: int) -> tuple[Block, ...]:
    """Cut a block of more than ``limit`` entries into blocks of equal ranges of rows of its matrices.

    Each piece holds the same share of the rows of every matrix; tensors with one row or one dimension go with the
    first piece. A block within ``limit`` is returned as it is.
    """
    inside = [parameter for parameter in parameters if belongs(parameter.name, block.prefixes)]
    rows = min((parameter.shape[0] for parameter in inside if parameter.is_matrix), default=1)
    pieces = min(math.ceil(block.parameters / limit), rows)
    if pieces <= 1 or any(rows_of(p.name, block.prefixes) for p in inside):
        return (block,)
    blocks = []
    for piece in range(pieces):
        prefixes, numel = [], 0
        for parameter in inside:
            if parameter.is_matrix:
                begin, end = (parameter.shape[0] * edge // pieces for edge in (piece, piece + 1))
                prefixes.append(f"{parameter.name}[{begin}:{end}]")
                numel += (end - begin) * math.prod(parameter.shape[1:])
            elif piece == 0:
                prefixes.append(parameter.name)
                numel += parameter.numel
        blocks.append(Block(f"{block.name}[{piece + 1}/{pieces}]", tuple(prefixes), numel))
    return tuple(blocks)


def _holds_modules(layers: dict[str, list[str]]) -> bool:
    return any("." in inner for inners in layers.values() for inner in inners)


def _largest(layers: dict[str, list[str]]) -> int:
    return max(len(inners) for inners in layers.values())


def _outside(
    parameters: Sequence[ParameterInfo], paths: Sequence[str]
) -> tuple[list[ParameterInfo], list[ParameterInfo]]:
    """Parameters of embedding and of head: in modules with a matrix, before and after the last layer."""
    layered = [belongs(parameter.name, paths) for parameter in parameters]
    last = max(index for index, inside in enumerate(layered) if inside)
    mixing = {_owner(parameter.name) for parameter in parameters if parameter.is_matrix}
    matrices = [
        (index, parameter)
        for index, parameter in enumerate(parameters)
        if not layered[index] and _owner(parameter.name) in mixing
    ]
    return [p for index, p in matrices if index < last], [p for index, p in matrices if index > last]


def _token_embedding(embedding: list[ParameterInfo]) -> ParameterInfo:
    """The matrix that a tied head shares: the largest one that holds no positions."""
    tokens = [parameter for parameter in embedding if not _POSITIONS.search(parameter.name)]
    return max(tokens or embedding, key=lambda parameter: parameter.numel)


def _outside_block(name: str, inside: list[ParameterInfo], parameters: Sequence[ParameterInfo]) -> Block:
    """A block of whole modules where nothing else lies under them, of single parameters elsewhere."""
    chosen = {parameter.name for parameter in inside}
    prefixes = []
    for parameter in inside:
        owner = _owner(parameter.name)
        alone = owner and all(other.name in chosen for other in parameters if belongs(other.name, (owner,)))
        prefixes.append(owner if alone else parameter.name)
    distinct = list(dict.fromkeys(prefixes))
    outermost = [path for path in distinct if not belongs(path, [other for other in distinct if other != path])]
    return Block(name, tuple(outermost), sum(parameter.numel for parameter in inside))


def _owner(name: str) -> str:
    """The module path of a parameter; empty for one that hangs on the root."""
    return name.rpartition(".")[0]
