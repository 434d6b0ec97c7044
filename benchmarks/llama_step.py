"""A step of preference training of a Llama under FSDP2 × CP × TP: what a GPU holds, receives, does.

A model, not a measurement. What the head holds is recorded from real code (`scaling.py`); the rest
is counted here, and compared in tests with transformers' layer and FSDP2's own code on a CPU. A
rank holds one pair at a time: two sequences, cut over the context parallel ranks. The most that is
alive is at the head, when every layer's input is kept, or in the backward of the last layer, with
the same inputs; the embedding, at the backward's end, takes less than the head.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.device import LIBRARY, WIDE, Machine

# Bytes of bf16: gathered weights, activations, gradients that are not sharded yet, and what FSDP2
# reduces (accelerate's mixed precision reduces in the dtype that it computes in).
NARROW = 2
# Share of a GPU's memory that the model leaves alone: CUDA's context, NCCL's and cuBLAS's buffers,
# fragmentation.
RESERVE = 0.10
SEQUENCES = 2

# What transformers' LlamaDecoderLayer keeps of each token when its backward begins its MLP, and
# what that then adds, in bytes of an entry. Of the hidden size: both norms' fp32 copies and the
# residual between; the norms' bf16 results before their weights, which the gradients of these take.
# Their outputs are the inputs of the products.
_NORMS, _SCALED, _INPUTS = 2 * 4 + 2, 2 * 2, 2 * 2
# Of the intermediate size: gate, silu, up, product; gradients of the product and of one factor.
_MLP = 4 * 2 + 2 * 2
# Of the queries' size: queries and output of flash attention; of the keys': keys and values.
_QUERIES, _KEYS = 2 * 2, 2 * 2
# Of each head: the fp32 logsumexp of flash attention.
_LOGSUMEXP = 4
# Of the hidden size, at the head: the last norm's fp32 copy, and its bf16 result before the weight.
_LAST_NORM, _LAST_SCALED = 4, 2


@dataclass(frozen=True)
class Llama:
    """Sizes of a model, as its published configuration has them.

    Attributes:
        name: for people.
        layers: number of decoder layers.
        hidden_size: D.
        intermediate_size: of the MLP.
        heads, kv_heads: of attention, and those of keys and values.
        head_size: entries of one.
        vocab: V.
    """

    name: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int = 8
    head_size: int = 128
    vocab: int = 128_256

    @property
    def queries(self) -> int:
        """Entries of a token's queries."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Entries of a token's keys, and as many values."""
        return self.kv_heads * self.head_size

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of a layer's seven linear maps."""
        size, inner = self.hidden_size, self.intermediate_size
        attention = (size, self.queries), (size, self.keys), (size, self.keys), (self.queries, size)
        return (*attention, (size, inner), (size, inner), (inner, size))

    @property
    def layer(self) -> int:
        """Parameters of a decoder layer: its linear maps and two norms."""
        return sum(rows * columns for rows, columns in self.products) + 2 * self.hidden_size

    @property
    def head(self) -> int:
        """Parameters of the head; the embedding has as many of its own."""
        return self.vocab * self.hidden_size

    @property
    def parameters(self) -> int:
        """All of them, the last norm included."""
        return self.layers * self.layer + 2 * self.head + self.hidden_size

    def adapter(self, rank: int) -> int:
        """Parameters of LoRA on every linear map of every layer."""
        return self.layers * rank * sum(rows + columns for rows, columns in self.products)


# huggingface.co/meta-llama/Llama-3.1-*/blob/main/config.json.
LLAMAS = (
    Llama("Llama-3.1-8B", 32, 4096, 14_336, 32),
    Llama("Llama-3.1-70B", 80, 8192, 28_672, 64),
    Llama("Llama-3.1-405B", 126, 16_384, 53_248, 128),
)


@dataclass(frozen=True)
class Layout:
    """GPUs as a mesh.

    Attributes:
        dp: data parallel ranks, each with pairs of its own.
        cp: context parallel ranks, which share a pair's tokens.
        tp: tensor parallel ranks, with sequence parallelism: what is not inside a product is
            sharded over its tokens.
    """

    dp: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def gpus(self) -> int:
        """All ranks."""
        return self.dp * self.cp * self.tp

    @property
    def shards(self) -> int:
        """Ranks that FSDP shards a tensor parallel rank's weights over, as accelerate does."""
        return self.dp * self.cp

    def __str__(self) -> str:
        return f"{self.dp} × {self.cp} × {self.tp}"


@dataclass(frozen=True)
class Recipe:
    """What trains, and what a trained weight takes.

    Attributes:
        name: for people.
        trained: bytes of a trained weight where it is sharded: fp32 master, gradient, two moments.
        frozen: bytes of a weight that does not train.
        rank: of LoRA, or None where every weight trains.
        reference: whether a second model stands beside in bf16; else its log-probs are known
            already, or it is the model without its adapter.
    """

    name: str
    trained: int = 16
    frozen: int = NARROW
    rank: int | None = None
    reference: bool = False


FULL = Recipe("full, reference cached")
BESIDE = Recipe("full, reference beside", reference=True)
LORA = Recipe("LoRA, rank 16", rank=16)
RECIPES = (FULL, BESIDE, LORA)


@dataclass(frozen=True)
class HeadBytes:
    """Of the head's forward and backward on a rank.

    Attributes:
        peak: most bytes alive beyond the weight and the hidden states, their gradients included.
        whole: whether a tensor parallel rank gathers the whole head, for its own share of the
            tokens, instead of holding its rows of it, for all tokens.
    """

    peak: int
    whole: bool = False


@dataclass(frozen=True)
class StepBytes:
    """Of a GPU in a step, by what they are.

    Attributes:
        states: weights, gradients and moments of the shard, the adapter's too.
        reference: a second model's shard, and its head, which FSDP2 leaves gathered.
        checkpoints: each layer's input.
        at_head: beside them at the head: its rows and what else is gathered, the last norm, `head`.
        head: hidden states and what the head makes of them; the whole head where tensor parallel
            ranks gather it.
        at_layer: beside them in the last layer's backward: what is gathered, reduced and kept.
    """

    states: int
    reference: int
    checkpoints: int
    at_head: int
    head: int
    at_layer: int

    @property
    def moments(self) -> dict[str, int]:
        """Bytes alive in each of the two moments."""
        fixed = self.states + self.reference + self.checkpoints
        return {"head": fixed + self.at_head, "layers": fixed + self.at_layer}

    @property
    def peak(self) -> int:
        """Most bytes alive."""
        return max(self.moments.values())

    @property
    def ended_by(self) -> str:
        """The moment of the peak."""
        moments = self.moments
        return max(moments, key=lambda name: moments[name])


def tokens_of(layout: Layout, context: int) -> int:
    """Tokens of a rank: of both sequences of its pair, in its share of the context."""
    return SEQUENCES * -(-context // layout.cp)


def layer_bytes(model: Llama, tokens: int, tp: int, trains: bool = True) -> int:
    """What a checkpointed layer holds at the most in its backward, its input not included.

    Args:
        model: whose layer.
        tokens: of the rank's sequences.
        tp: tensor parallel ranks.
        trains: whether its own weights do, or an adapter beside them.
    """
    own = (_NORMS + _SCALED * trains) * model.hidden_size + _MLP * model.intermediate_size
    own += _QUERIES * model.queries + _KEYS * model.keys + _LOGSUMEXP * model.heads
    # Inputs of the column parallel products, and the gradient of the last product, are gathered.
    gathered = _INPUTS * model.hidden_size
    return tokens * own // tp + tokens * gathered


def states(model: Llama, recipe: Recipe, layout: Layout) -> int:
    """Of weights, gradients and moments on a rank."""
    ranks = layout.shards * layout.tp
    if recipe.rank is None:
        return recipe.trained * model.parameters // ranks
    adapter = recipe.trained * model.adapter(recipe.rank)
    return (recipe.frozen * model.parameters + adapter) // ranks


def step_bytes(
    model: Llama, recipe: Recipe, layout: Layout, context: int, head: HeadBytes
) -> StepBytes:
    """Bytes of a step.

    Args:
        model: that trains.
        recipe: how.
        layout: of the GPUs.
        context: tokens of each sequence of the pair.
        head: of the rank.
    """
    tp, size, tokens = layout.tp, model.hidden_size, tokens_of(layout, context)
    trains = recipe.rank is None
    layer, rows = NARROW * model.layer // tp, NARROW * model.head // tp
    normed = (_LAST_NORM + _LAST_SCALED * trains) * tokens * size // tp
    # FSDP2 casts the unit that runs even where there is nothing to gather; where there is, it still
    # has the buffer of the head in the forward, and already the layer that is next in the backward.
    gathers = layout.shards > 1
    at_head = rows + max(rows, layer) * gathers + normed
    own = head.peak + NARROW * tokens * size // (tp if head.whole else 1)
    if head.whole and tp > 1:
        own += NARROW * model.head
    kept, reduced = layer_bytes(model, tokens, tp, trains), 0
    if trains:
        # Where most is kept, the MLP's last weight has its gradient; at the end, all have.
        kept = max(kept + NARROW * size * model.intermediate_size // tp, layer)
        # The unit before is still being reduced.
        reduced = max(layer, rows)
    at_layer = NARROW * tokens * size + kept + layer * (1 + gathers) + reduced
    second = NARROW * model.parameters // (layout.shards * tp) + rows
    return StepBytes(
        states=states(model, recipe, layout),
        reference=second if recipe.reference else 0,
        checkpoints=model.layers * NARROW * tokens * size // tp,
        at_head=at_head + own,
        head=own,
        at_layer=at_layer,
    )


def usable(machine: Machine) -> int:
    """Bytes of a GPU that a step may take."""
    return int((1 - RESERVE) * machine.memory)


def backbone_seconds(
    model: Llama, recipe: Recipe, layout: Layout, context: int, machine: Machine
) -> float:
    """Arithmetic of all layers on a rank at the replay's rates, nothing else: a lower bound.

    Forward, the same again for the checkpoints, and a backward of twice as much (of once where the
    weights are frozen); causal attention takes 2.5 times its forward there. Nobody needs the last
    product of a checkpoint's second forward but an adapter, which comes behind it.
    """
    tokens = tokens_of(layout, context)
    *others, last = (rows * columns for rows, columns in model.products)
    products = 4 * sum(others) + 3 * last if recipe.rank is None else 3 * sum((*others, last))
    linear = 2 * tokens * model.layers * products / layout.tp
    pairs = SEQUENCES * context * context / 2 / layout.cp
    attention = 4.5 * 4 * pairs * model.layers * model.queries / layout.tp
    return (linear / LIBRARY + attention / machine.fused[WIDE]) / machine.peak


# Bytes of a row's maximum, sum and target's logit, in fp32; and of the one all-reduce that a group
# of sequences makes forward, and again backward, up to 255 sequences.
_ROW, _SUMS = 3 * 4, 4096


@dataclass(frozen=True)
class Moved:
    """Bytes that a GPU receives in a step, by who asks for them.

    Attributes:
        fsdp: weights gathered for the forward and the backward, gradients scattered.
        tp: activations gathered and scattered around the products of every layer.
        cp: keys and values of the other ranks, and the gradients of its own.
        vocabulary: of a head whose rows are sharded: statistics of rows, gradient of hidden.
        sequences: sums and lengths over the ranks that share sequences, and their gradients.
        statistics: of a loss that keeps some: a number for each pair of the other ranks.
        whole: what gathering the head over the tensor parallel ranks takes instead, and its
            gradient.
    """

    fsdp: int
    tp: int
    cp: int
    vocabulary: int
    sequences: int
    statistics: int
    whole: int


def moved(model: Llama, recipe: Recipe, layout: Layout, context: int) -> Moved:
    """Bytes that a GPU receives; of an all-reduce, as a ring moves them."""
    tokens, size = tokens_of(layout, context), model.hidden_size
    shards, tp, cp = layout.shards, layout.tp, layout.cp
    trains = recipe.rank is None
    # Layers and embedding twice; once the head with its norm, which FSDP2 keeps in between.
    weights = 2 * (model.layers * model.layer + model.head) + model.head + size
    reduced = model.parameters if trains else model.adapter(recipe.rank or 0)
    # Four in a layer's forward, four in its backward, and those of the forward again for the
    # checkpoint, the last of them only where an adapter comes behind it.
    activations = (4 + 4 + 4 - trains) * model.layers * NARROW * tokens * size
    # As torch's ring has it: keys and values come from every other rank in the forward, again for
    # the checkpoint, and in the backward, whose fp32 gradients go all the way around.
    entries = model.layers * tokens * 2 * model.keys // tp
    rounds = 3 * NARROW * (cp - 1) + (4 * cp if cp > 1 else 0)
    return Moved(
        fsdp=NARROW * (weights + reduced) // tp * (shards - 1) // shards,
        tp=activations * (tp - 1) // tp,
        cp=entries * rounds,
        vocabulary=_ROW * tokens * (tp - 1) + 2 * 4 * tokens * size * (tp - 1) // tp,
        sequences=2 * 2 * _SUMS * (cp - 1) // cp,
        statistics=4 * (layout.dp - 1),
        whole=NARROW * model.head * (1 + trains) * (tp - 1) // tp,
    )
