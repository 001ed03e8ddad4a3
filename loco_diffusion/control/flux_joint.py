"""FLUX.1 with condition tokens that see the picture: OminiControl's default way (arXiv 2411.15098, section 3).

The tokens of a condition run beside those of the text and the picture through every block, at time 0, with the
adapter on for them alone, and are computed anew in each step. They see the text, the picture and themselves;
text and picture see everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from loco_diffusion.control import layers
from loco_diffusion.control.flux_positions import image_ids
from loco_diffusion.control.joint import JointCondition
from loco_diffusion.control.rows import Rows
from loco_diffusion.errors import UserError

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Part:
    """Tokens with one time and one adapter: those of the text, of the picture, or of a condition."""

    hidden: Tensor
    time: Tensor
    rotary: Rotary
    adapter: str | None = None
    text: bool = False

    def turned(self, block: nn.Module) -> AbstractContextManager[None]:
        return nullcontext() if self.adapter is None else layers.activated(block, {self.adapter: 1.0})


class JointFlux:
    """A forward in place of a FluxTransformer2DModel's own.

    Args:
        denoiser: the model.
        conditions: at least one.
        rows: of its batch.
    """

    def __init__(self, denoiser: Any, conditions: Sequence[JointCondition], rows: Rows) -> None:
        self.denoiser = denoiser
        self.conditions = conditions
        self.rows = rows

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """As the model's.

        Raises:
            UserError: residuals of a ControlNet or an IP-Adapter are given, or the memory does not suffice.
        """
        if (
            any(value is not None and value is not False for value in others.values())
            or joint_attention_kwargs
        ):
            raise UserError(
                "Joint conditions go with neither ControlNet nor IP-Adapter; use the encoder route, or "
                "TokensConfig(joint=False)."
            )
        model = self.denoiser
        hidden = model.x_embedder(hidden_states)
        time = self._time(hidden, timestep, guidance, pooled_projections)
        parts = [
            _Part(model.context_embedder(encoder_hidden_states), time, model.pos_embed(txt_ids), text=True),
            _Part(hidden, time, model.pos_embed(img_ids)),
            *(self._part(c, hidden, timestep, guidance, pooled_projections) for c in self.conditions),
        ]
        try:
            output = model.proj_out(model.norm_out(self._through_blocks(parts), time))
        except torch.OutOfMemoryError as error:
            raise _out_of_memory([part.hidden.shape[1] for part in parts]) from error
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _through_blocks(self, parts: list[_Part]) -> Tensor:
        """What the blocks make of the picture's tokens."""
        mask = self._mask(parts)
        for block in self.denoiser.transformer_blocks:
            parts = self._run(_double, block, parts, mask)
        text, picture, *conditions = parts
        length = text.hidden.shape[1]
        cosines, sines = (torch.cat(pair) for pair in zip(text.rotary, picture.rotary, strict=True))
        together = torch.cat([text.hidden, picture.hidden], dim=1)
        parts = [replace(picture, hidden=together, rotary=(cosines, sines)), *conditions]
        for block in self.denoiser.single_transformer_blocks:
            parts = self._run(_single, block, parts, mask)
        return parts[0].hidden[:, length:]

    def _run(
        self, step: Callable[..., list[Tensor]], block: nn.Module, parts: list[_Part], mask: Tensor | None
    ) -> list[_Part]:
        def run(*hidden: Tensor) -> tuple[Tensor, ...]:
            given = [replace(part, hidden=h) for part, h in zip(parts, hidden, strict=True)]
            return tuple(step(block, given, mask))

        if torch.is_grad_enabled() and self.denoiser.gradient_checkpointing:
            run = partial(self.denoiser._gradient_checkpointing_func, run)  # type: ignore[assignment]
        return [
            replace(part, hidden=h)
            for part, h in zip(parts, run(*(part.hidden for part in parts)), strict=True)
        ]

    def _time(self, hidden: Tensor, time: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
        scales = [time] if guidance is None else [time, guidance]
        embedding: Tensor = self.denoiser.time_text_embed(
            *(s.to(hidden.dtype) * 1000 for s in scales), pooled
        )
        return embedding

    def _part(
        self,
        condition: JointCondition,
        hidden: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        pooled: Tensor,
    ) -> _Part:
        model = self.denoiser
        tokens = self.rows.spread(condition.tokens.to(hidden), len(hidden)).expand(len(hidden), -1, -1)
        with layers.activated(model, {condition.adapter: 1.0}):
            embedded = model.x_embedder(tokens)
        plain = None if guidance is None else torch.ones_like(guidance)
        time = self._time(hidden, torch.zeros_like(timestep), plain, pooled)
        ids = image_ids(*condition.grid, tokens, condition.stride)
        return _Part(embedded, time, model.pos_embed(ids), condition.adapter)

    def _mask(self, parts: list[_Part]) -> Tensor | None:
        """What is added to the logits, (rows or 1, 1, queries, keys); None where all see all."""
        if len(self.conditions) == 1 and self.conditions[0].bias is None:
            return None
        hidden, lengths = parts[0].hidden, [part.hidden.shape[1] for part in parts]
        rows = max(1 if c.bias is None else len(hidden) for c in self.conditions)
        mask = hidden.new_zeros(rows, 1, sum(lengths), sum(lengths))
        first = lengths[0] + lengths[1]
        for number, condition in enumerate(self.conditions):
            own = slice(first, first := first + lengths[2 + number])
            if condition.bias is not None:
                bias = self.rows.spread_or_drop(condition.bias.to(hidden), len(hidden), -torch.inf).view(
                    -1, 1, 1, 1
                )
                mask[:, :, : lengths[0] + lengths[1], own] = bias
            others = torch.ones(sum(lengths), dtype=torch.bool, device=hidden.device)
            others[: lengths[0] + lengths[1]] = False
            others[own] = False
            mask[:, :, own, others] = -torch.inf
        return mask


def _out_of_memory(lengths: list[int]) -> UserError:
    """The error of parts with so many tokens, those of the text and the picture first."""
    return UserError(
        f"The memory does not suffice for {sum(lengths)} tokens in each step, of which {sum(lengths[2:])} are of joint "
        "conditions: give smaller maps, or use adapters trained with a greater TokensConfig(stride=...) or with "
        "TokensConfig(joint=False)."
    )


def _double(block: Any, parts: list[_Part], mask: Tensor | None) -> list[Tensor]:
    """A double block: the text has weights of its own."""
    modulations, projected = [], []
    for part in parts:
        norm = block.norm1_context if part.text else block.norm1
        with part.turned(block):
            normed, *modulation = norm(part.hidden, emb=part.time)
            modulations.append([m[:, None] for m in modulation])
            projected.append(_project(block.attn, normed, part))
    attended = _attend(projected, mask)
    results = []
    for part, (gate, shift, scale, gate_ff), heads in zip(parts, modulations, attended, strict=True):
        out, norm, ff = block.attn.to_out[0], block.norm2, block.ff
        if part.text:
            out, norm, ff = block.attn.to_add_out, block.norm2_context, block.ff_context
        with part.turned(block):
            hidden = part.hidden + gate * out(heads)
            hidden = hidden + gate_ff * ff(norm(hidden) * (1 + scale) + shift)
        results.append(_within_half_precision(hidden))
    return results


def _single(block: Any, parts: list[_Part], mask: Tensor | None) -> list[Tensor]:
    """A single block: text and picture are one part."""
    gates, forwarded, projected = [], [], []
    for part in parts:
        with part.turned(block):
            normed, gate = block.norm(part.hidden, emb=part.time)
            gates.append(gate[:, None])
            forwarded.append(block.act_mlp(block.proj_mlp(normed)))
            projected.append(_project(block.attn, normed, part))
    results = []
    for part, gate, ff, heads in zip(parts, gates, forwarded, _attend(projected, mask), strict=True):
        with part.turned(block):
            hidden = part.hidden + gate * block.proj_out(torch.cat([heads, ff], dim=2))
        results.append(_within_half_precision(hidden))
    return results


def _project(attention: Any, normed: Tensor, part: _Part) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (B, heads, tokens, head size)."""
    names = ("add_q_proj", "add_k_proj", "add_v_proj") if part.text else ("to_q", "to_k", "to_v")
    norms = (
        (attention.norm_added_q, attention.norm_added_k)
        if part.text
        else (attention.norm_q, attention.norm_k)
    )
    query, key, value = (
        getattr(attention, name)(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for name in names
    )
    query, key = (apply_rotary_emb(norm(t), part.rotary) for norm, t in zip(norms, (query, key), strict=True))
    return query, key, value


def _attend(projected: list[tuple[Tensor, Tensor, Tensor]], mask: Tensor | None) -> Sequence[Tensor]:
    """Attention of all parts to all, (B, tokens, heads * head size) for each."""
    lengths = [query.shape[2] for query, _, _ in projected]
    query, key, value = (torch.cat(tensors, dim=2) for tensors in zip(*projected, strict=True))
    out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.transpose(1, 2).flatten(2).split(lengths, dim=1)


def _within_half_precision(hidden: Tensor) -> Tensor:
    return hidden.clip(-65504, 65504) if hidden.dtype == torch.float16 else hidden
