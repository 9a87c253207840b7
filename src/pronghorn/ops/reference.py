"""The truth: every fast op as the plain PyTorch expression it must equal. Slow, obvious, differentiable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pronghorn.ops.buffer import dense
from pronghorn.ops.shapes import Activation, ExpertPart, LogitStep, LoraPart, MlpLayout, NormForm


def activate(x: Tensor, kind: Activation) -> Tensor:
    """The activation of an MLP, elementwise."""
    if kind == "silu":
        return functional.silu(x)
    if kind == "relu":
        return functional.relu(x)
    if kind == "relu2":
        return functional.relu(x).square()
    return functional.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, form: NormForm) -> Tensor:
    """RMSNorm or LayerNorm over the last dimension of ``x``; ``weight`` broadcasts against ``x``."""
    wide = x.float()
    if form.centered:
        wide = wide - wide.mean(-1, keepdim=True)
    variance = wide.pow(2).mean(-1, keepdim=True) + form.eps
    unit = wide * (torch.rsqrt(variance) if form.root == "rsqrt" else torch.pow(variance, -0.5))
    if weight is None:
        return unit.to(x.dtype)
    if form.cast == "early":
        y = (weight + form.offset if form.offset else weight) * unit.to(x.dtype)
        return y if bias is None else y + bias
    y = unit * (weight.float() + form.offset)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def lora_linears(x: Tensor, parts: Sequence[LoraPart]) -> tuple[Tensor, ...]:
    """Several adapted linears of one input: ``x [..., in]`` to one ``[..., out_i]`` for each part."""
    return tuple(_lora_linear(x, part) for part in parts)


def _lora_linear(x: Tensor, part: LoraPart) -> Tensor:
    y = functional.linear(x, dense(part.weight, x.dtype), part.bias)
    if part.a is None or part.b is None:
        return y
    return y + functional.linear(functional.linear(x, part.a.to(x.dtype)), part.b.to(x.dtype)) * part.scale


def mlp(
    x: Tensor, first: Sequence[LoraPart], down: LoraPart, layout: MlpLayout, activation: Activation
) -> Tensor:
    """``down(act(gate(x)) * up(x))`` in the given layout; ``x [..., hidden]`` to ``[..., hidden]``."""
    gate, up = split(lora_linears(x, first), layout)
    inner = activate(gate, activation)
    return _lora_linear(inner if up is None else inner * up, down)


def split(outputs: Sequence[Tensor], layout: MlpLayout) -> tuple[Tensor, Tensor | None]:
    """(gate, up) views of the first linears' outputs; up is None in the plain layout."""
    if layout == "plain":
        return outputs[0], None
    if layout == "gated":
        return outputs[0], outputs[1]
    one, two = outputs[0].chunk(2, dim=-1)
    return (one, two) if layout == "gate_up" else (two, one)


def experts(
    x: Tensor,
    index: Tensor,
    routing: Tensor,
    first: ExpertPart,
    down: ExpertPart,
    layout: MlpLayout,
    activation: Activation,
) -> Tensor:
    """The chosen experts of each token, weighed and summed: ``x [T, hidden]``, ``index`` and ``routing [T,
    k]`` to ``[T, hidden]``.
    """
    out = torch.zeros_like(x)
    for expert in range(first.weight.shape[0]):
        token, choice = torch.where(index == expert)
        gate, up = split([_expert_linear(x[token], first, expert)], layout)
        inner = activate(gate, activation)
        y = _expert_linear(inner if up is None else inner * up, down, expert)
        out = out.index_add(0, token, (y * routing[token, choice, None]).to(x.dtype))
    return out


def _expert_linear(x: Tensor, part: ExpertPart, expert: int) -> Tensor:
    y = x @ part.weight[expert]
    if part.bias is not None:
        y = y + part.bias[expert]
    if part.a is None or part.b is None:
        return y
    return y + x @ part.a[expert].to(x.dtype).t() @ part.b[expert].to(x.dtype).t() * part.scale


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, chain: Sequence[LogitStep] = ()) -> Tensor:
    """The head's product followed by the model's own steps (scale, softcap, cast)."""
    z = functional.linear(hidden, weight, bias)
    for step in chain:
        z = apply_step(z, step)
    return z


def apply_step(z: Tensor, step: LogitStep) -> Tensor:
    """One step of a logits chain."""
    if step.kind == "tanh":
        return torch.tanh(z)
    if step.kind == "to":
        assert isinstance(step.value, torch.dtype)
        return z.to(step.value)
    assert isinstance(step.value, (int, float, Tensor))
    return z * step.value if step.kind == "mul" else z / step.value


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    chain: Sequence[LogitStep] = (),
    ignore_index: int = -100,
    mean: bool = True,
) -> Tensor:
    """Cross entropy of ``hidden [N, H]`` through a head, float32 scalar; 0 (not NaN) when every label is
    ignored.
    """
    total = functional.cross_entropy(
        logits(hidden, weight, bias, chain).float(), labels, ignore_index=ignore_index, reduction="sum"
    )
    return total / (labels != ignore_index).sum().clamp(min=1) if mean else total


def log_prob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, chain: Sequence[LogitStep] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each label, entropy (float32) and whether the label is the most likely token,
    ``[N]``.
    """
    logp = torch.log_softmax(logits(hidden, weight, bias, chain).float(), dim=-1)
    chosen = logp.gather(1, labels[:, None]).squeeze(1)
    return chosen, -(logp.exp() * logp).sum(-1), logp.argmax(-1) == labels


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half rotary embedding of ``x [..., T, D]``; the first ``cos.shape[-1]`` dimensions turn, the
    rest pass.
    """
    width = cos.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    low, high = turned.chunk(2, dim=-1)
    out = turned * cos + torch.cat((-high, low), dim=-1) * sin
    return torch.cat((out, kept), dim=-1) if kept.shape[-1] else out
