"""A GPT's shape → its parameters, FLOPs and bytes, and so a Cost.

The layer is that of Korthikanti et al. 2022, arXiv:2205.05198, section 4: layer
norm, attention with dropout on its matrix, projection, dropout, and the same
with a feed-forward network with GeLU. Letters as there: a heads, b micro-batch,
h hidden, L layers, s sequence, t tensor-parallel size, v vocabulary; f is the
width of the feed-forward network, 4h there.

Every number is that of one device: one of the t ranks that share a stage. With
16-bit numbers and f = 4h, one micro-batch keeps in each layer, in bytes::

    outside = sbh · 10    inputs of 2 layer norms, of QKV and of the first linear
                          layer (2 each), 2 dropout masks (1 each)
    inside  = sbh · 24    Q, K, V, input of the projection (2 each), inputs of the
                          GeLU and of the second linear layer (8 each)
    core    = 5as²b       softmax (2), its dropout's mask (1) and output (2)

t ranks share `inside` and `core`; `outside` only with sequence parallelism. So:

    recompute    each layer keeps                            2205.05198
    none         outside + inside/t + core/t                 eq. 1, 2, 4
    selective    outside + inside/t                          eq. 6, table 2
    full         its input, 2sbh                             table 2

and outside/t in place of `outside`, and 2sbh/t of 2sbh, with sequence
parallelism: a layer's input is then cut along the sequence anyway. Beside the
layers (section 4.3), the embedding keeps a dropout mask, sbh bytes in the first
stage; the last stage keeps the inputs of the final layer norm and of the output
layer, 2sbh each, and the logits in 32 bits, 4sbv/t.

FLOPs are those of matrix products (appendix A): forward 24sbh² + 4s²bh a layer
and 2sbhv for the logits. Of the backward, the input gradient takes as many, with
the attention's products, which have no weights, counted twice, and the weight
gradient as many without them (Qi et al. 2023, arXiv:2401.10241, table 1).
Selective recomputation repeats the attention's two products, 4s²bh. That is the
appendix's text; its equation 8 has 12s²bh instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from os import PathLike
from typing import TYPE_CHECKING, Literal, NamedTuple

from pipeproof.sched.errors import ParameterError, ParseError, at_least_one
from pipeproof.sched.exact import Number, plain
from pipeproof.sched.ir import Schedule
from pipeproof.sim.toml import read

if TYPE_CHECKING:
    from pipeproof.sim.cost import Cost

Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


class Precision(NamedTuple):
    """Bytes of a number: in weights and activations, gradients, optimizer state."""

    weight: int
    gradient: int
    optimizer: int


PRECISIONS: Mapping[str, Precision] = {
    # Megatron-LM sums gradients of 16-bit weights in 32 bits. Adam keeps a
    # 32-bit copy of the weights and two moments.
    "bf16": Precision(2, 4, 12),
    # Rajbhandari et al. 2019 (ZeRO), arXiv:1910.02054, section 3.1.
    "fp16": Precision(2, 2, 12),
    "fp32": Precision(4, 4, 8),
}
MASK = 1
LOGIT = 4
"""Bytes of a dropout mask's element, and of a logit for the cross entropy."""


@dataclass(frozen=True, slots=True)
class Transformer:
    """A GPT and how its layers are computed.

    Attributes:
        layers, hidden, heads: of the transformer.
        sequence: tokens of a sample.
        vocabulary: rows of the embedding. Megatron-LM pads it to a multiple of
            128 times the tensor-parallel size.
        micro_batch: samples of a micro-batch.
        feed_forward: width of the feed-forward network; default 4 · hidden.
        precision: `bf16`: weights and activations in 16 bits, gradients in 32,
            12 bytes of Adam's state a parameter. `fp16`: gradients in 16. `fp32`:
            all in 32, 8 bytes of state.
        tensor_parallel: devices that share each stage.
        sequence_parallel: they also share what lies between the blocks.
        recompute: what the backward computes again: nothing; the attention's
            matrix (`selective`), inside B or I; whole layers (`full`), in ops R.
        recompute_layers: with `full`, layers that are rebuilt together, of which
            only the first one's input is kept.
        tied: the output layer shares the word embedding's weights. A last stage
            on another device holds a copy of them.

    Raises:
        ParameterError: a size below 1, or one that does not divide as it must.
    """

    layers: int
    hidden: int
    heads: int
    sequence: int = 2048
    vocabulary: int = 51200
    micro_batch: int = 1
    feed_forward: int | None = None
    precision: str = "bf16"
    tensor_parallel: int = 1
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    recompute_layers: int = 1
    tied: bool = True

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if spec.type == "bool":
                if not isinstance(value, bool):
                    raise ParameterError(
                        f"{spec.name} must be True or False, got {value!r}"
                    )
            elif spec.type == "int" or (
                spec.type == "int | None" and value is not None
            ):
                at_least_one(**{spec.name: value})
        for name, known in (("precision", PRECISIONS), ("recompute", RECOMPUTE)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise ParameterError(
                    f"{name} must be one of {', '.join(known)}, got {value!r}"
                )
        if self.recompute_layers > 1 and self.recompute != "full":
            raise ParameterError(
                f"recompute_layers={self.recompute_layers} says how many layers are "
                f"rebuilt together: it needs recompute='full', got {self.recompute!r}"
            )
        self._divides("heads", "hidden")
        for name in ("hidden", "heads", "vocabulary", "width"):
            self._divides("tensor_parallel", name)
        if self.sequence_parallel:
            self._divides("tensor_parallel", "sequence")

    def _divides(self, by: str, what: str) -> None:
        number, divisor = getattr(self, what), getattr(self, by)
        if number % divisor:
            name = "feed_forward" if what == "width" else what
            raise ParameterError(
                f"{by} must divide {name}, got {by}={divisor} and {name}={number}"
            )

    @property
    def width(self) -> int:
        """Of the feed-forward network."""
        return self.feed_forward or 4 * self.hidden

    # Parameters

    @property
    def parameters(self) -> int:
        """Of the whole model.

        With f = 4h: L(12h² + 13h) + (v + s)h + 2h; untied, vh more. Narayanan et
        al. 2021, arXiv:2104.04473, eq. 2, leaves out the final layer norm's 2h.
        """
        h, f = self.hidden, self.width
        layer = 4 * h * h + 2 * h * f + 9 * h + f
        words = self.vocabulary * h * (1 if self.tied else 2)
        return self.layers * layer + words + self.sequence * h + 2 * h

    @property
    def layer_parameters(self) -> Number:
        """Of a layer on one device.

        Layer norms, and biases of layers that are cut by rows, are whole.
        """
        h, f, t = self.hidden, self.width, self.tensor_parallel
        shared = 4 * h * h + 2 * h * f + 3 * h + f
        return plain(Fraction(shared, t) + 6 * h)

    # FLOPs

    @property
    def forward_flops(self) -> int:
        """Of a micro-batch through the whole model: L(24sbh² + 4s²bh) + 2sbhv."""
        return (
            self.layers * (self.linear_flops + self.attention_flops) + self.head_flops
        )

    @property
    def backward_flops(self) -> int:
        """Likewise; twice as many, and what `recompute` computes again."""
        again = {
            "none": 0,
            "selective": self.attention_flops,
            "full": self.linear_flops + self.attention_flops,
        }
        return 2 * self.forward_flops + self.layers * again[self.recompute]

    @property
    def _tokens(self) -> int:
        return self.sequence * self.micro_batch

    @property
    def linear_flops(self) -> int:
        """Of a layer's products with weights, forward."""
        h = self.hidden
        return 2 * self._tokens * (4 * h * h + 2 * h * self.width)

    @property
    def attention_flops(self) -> int:
        """Of a layer's products without weights, forward."""
        return 4 * self._tokens * self.sequence * self.hidden

    @property
    def head_flops(self) -> int:
        """Of the output layer, forward."""
        return 2 * self._tokens * self.hidden * self.vocabulary

    # Bytes of activations, of one micro-batch on one device

    @property
    def layer_bytes(self) -> Number:
        """What a layer keeps for its backward, as `recompute` has it."""
        if self.recompute == "full":
            return self._between(self._numbers(self.hidden))
        return self.whole_layer_bytes(core=self.recompute == "none")

    @property
    def embedding_bytes(self) -> Number:
        """What the first stage keeps beside its layers: the dropout's mask."""
        return self._between(MASK * self._tokens * self.hidden)

    @property
    def head_bytes(self) -> Number:
        """What the last stage keeps beside its layers, the logits included."""
        logits = Fraction(LOGIT * self._tokens * self.vocabulary, self.tensor_parallel)
        return plain(self._between(self._numbers(2 * self.hidden)) + logits)

    @property
    def boundary_bytes(self) -> Number:
        """What goes from one stage to the next."""
        return self._between(self._numbers(self.hidden))

    @property
    def core_bytes(self) -> Number:
        """The attention's matrix, after softmax and dropout, of one layer."""
        element = 2 * PRECISIONS[self.precision].weight + MASK
        whole = self.heads * self._tokens * self.sequence * element
        return plain(Fraction(whole, self.tensor_parallel))

    def _numbers(self, width: int) -> int:
        """A tensor of this width for each token."""
        return self._tokens * width * PRECISIONS[self.precision].weight

    def _between(self, size: int) -> Number:
        """What lies outside the blocks, where only sequence parallelism shares."""
        if not self.sequence_parallel:
            return size
        return plain(Fraction(size, self.tensor_parallel))

    def whole_layer_bytes(self, *, core: bool) -> Number:
        """What a layer keeps that nothing is recomputed of, but for its core."""
        h = self.hidden
        outside = self._between(self._numbers(4 * h) + 2 * MASK * self._tokens * h)
        inside = Fraction(self._numbers(4 * h + 2 * self.width), self.tensor_parallel)
        return plain(outside + inside + (self.core_bytes if core else 0))

    @property
    def weight_grad_bytes(self) -> Number:
        """What W needs of a layer: each linear layer's input and its output's gradient.

        32sbh in all (2401.10241, table 1), of which 8sbh lie outside the blocks.
        """
        h = self.hidden
        inside = Fraction(self._numbers(4 * h + 2 * self.width), self.tensor_parallel)
        return plain(self._between(self._numbers(4 * h)) + inside)

    # A schedule's stages

    def split(self, stages: int) -> list[int]:
        """Layers of each stage: as even as can be, the first ones taking one more.

        Raises:
            ParameterError: fewer layers than stages.
        """
        from pipeproof.sim.shares import even

        return even(self.layers, stages)

    def cost(
        self,
        schedule: Schedule,
        *,
        flops_per_s: Number | None = None,
        efficiency: Number = 1,
        split: Sequence[int] | None = None,
    ) -> Cost:
        """Time and bytes of each stage of a schedule.

        With `full`, the schedule has ops R, as `recompute(schedule, "always")`
        puts them there: F keeps the inputs of layers, R computes the stage's
        layers again, and from then until B the activations of
        `recompute_layers` layers are there. With `none` and `selective` it has no
        R: what `selective` computes again is part of B, or of I.

        Args:
            schedule: whose stages share the layers.
            flops_per_s: of one device at its best; None leaves times in FLOPs.
            efficiency: the part of it that is achieved.
            split: layers of each stage; default as `split` has it.

        Raises:
            ParameterError: a rate or split that cannot be, or a schedule whose R
                contradict `recompute`.
        """
        from pipeproof.sim.shares import cost_of

        return cost_of(self, schedule, flops_per_s, efficiency, split)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Transformer:
        """From a TOML file whose keys are the attributes.

        Raises:
            ParseError: naming the file, and what in it is no TOML, no key, or no
                value that the constructor takes.
            OSError: the file cannot be read.
        """
        given = read(path, "a model")
        names = [spec.name for spec in fields(cls)]
        for key in given:
            if key not in names:
                raise ParseError(
                    f"{path}: expected keys among {', '.join(names)}; found {key!r}"
                )
        for name in ("layers", "hidden", "heads"):
            if name not in given:
                raise ParseError(f"{path}: {name} is missing: add {name} = …")
        try:
            return cls(**given)
        except ParameterError as error:
            raise ParseError(f"{path}: {error}") from None


def _gpt(layers: int, hidden: int, heads: int, micro_batch: int = 1) -> Transformer:
    return Transformer(
        layers, hidden, heads, micro_batch=micro_batch, tensor_parallel=8
    )


MODELS: Mapping[str, Transformer] = {
    "gpt-22b": _gpt(48, 6144, 64, micro_batch=4),
    "gpt-175b": _gpt(96, 12288, 96),
    "gpt-530b": _gpt(105, 20480, 128),
    "gpt-1t": _gpt(128, 25600, 160),
}
"""The models of 2205.05198, table 3: s = 2048, v = 51200, t = 8, 16-bit numbers."""
