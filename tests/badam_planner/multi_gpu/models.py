"""A model of two layers, and what one GPU's step over it allocates, small enough to be added up by hand."""

from __future__ import annotations

from badam.blocks.names import ParameterInfo
from badam.vocabulary import Category, Dtype, Phase
from badam_planner.multi_gpu.fsdp2 import Sharding, units_of
from badam_planner.recording.recording import GIVEN, Recording, TensorRole
from tests.badam_planner.recording.recordings import Script

LAYERS = ("model.layers.0", "model.layers.1")
WIDTH, WORDS = 4, 10
MATRIX = WIDTH * WIDTH
PARAMETERS = (
    ParameterInfo("model.embed.weight", (WORDS, WIDTH)),
    *(
        ParameterInfo(f"{layer}.{name}", shape)
        for layer in LAYERS
        for name, shape in (("norm.weight", (WIDTH,)), ("up.weight", (WIDTH, WIDTH)))
    ),
    ParameterInfo("head.weight", (WORDS, WIDTH)),
)
ACTIVE = f"{LAYERS[0]}.up.weight"
ACTIVATION_BYTES = 1000


def sharding(shards: int, *, replicas: int = 1, dtype: Dtype = "bfloat16", over_gloo: bool = False) -> Sharding:
    """The model cut over ``shards`` GPUs, with the lower layer's matrix active."""
    return Sharding(
        units_of(PARAMETERS, layers=LAYERS, head_module="head"),
        shards,
        dtype,
        frozenset([ACTIVE]),
        head_module="head",
        replicas=replicas,
        over_gloo=over_gloo,
    )


def one_gpu_step(*, micro_batches: int = 1) -> Recording:
    """A step with bf16 parameters: forward through both layers and the head, backward to the lower one, the update."""
    script = Script()
    for info in PARAMETERS:
        named = {"role": TensorRole.PARAMETER, "parameter": info.name, "category": Category.PARAMETER}
        script.birth(2 * info.numel, operation=GIVEN, shape=info.shape, dtype="bfloat16", **named)
    for state, category in (("", Category.MASTER), ("exp_avg", Category.OPTIMIZER_STATE)):
        role = TensorRole.STATE if state else TensorRole.MASTER
        named = {"role": role, "state": state, "parameter": ACTIVE, "category": category}
        script.birth(4 * MATRIX, shape=(WIDTH, WIDTH), dtype="float32", **named)
    gradient = -1
    for number in range(micro_batches):
        script.phase(Phase.FORWARD)
        saved = [script.birth(80, "model.embed", dtype="bfloat16")]
        for layer in LAYERS:
            script.mark("forward", layer)
            saved.append(script.birth(ACTIVATION_BYTES, f"{layer}.up", dtype="bfloat16"))
        saved.append(script.birth(200, "head", dtype="bfloat16"))
        script.phase(Phase.BACKWARD)
        for layer in reversed(LAYERS):
            script.mark("backward", layer)
            passing = script.birth(30, f"{layer}.up", dtype="bfloat16")
            if layer == LAYERS[0]:
                half = script.birth(2 * MATRIX, f"{layer}.up", shape=(WIDTH, WIDTH), dtype="bfloat16")
                if number == 0:
                    named = {"role": TensorRole.GRADIENT, "parameter": ACTIVE, "category": Category.GRADIENT}
                    gradient = script.birth(4 * MATRIX, shape=(WIDTH, WIDTH), dtype="float32", **named)
                script.death(half)
            script.death(passing)
        script.death(*saved)
    script.phase(Phase.STEP)
    update = script.birth(4 * MATRIX, shape=(WIDTH, WIDTH), dtype="float32")
    script.death(update)
    script.death(gradient)
    return script.recording
