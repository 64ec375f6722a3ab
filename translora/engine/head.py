"""The head of a causal LM: how its last hidden states become logits, in pieces that fit.

Shapes: L positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from translora.bundle.base import UnusableBaseError

LOGITS = re.compile(r"^(final_|output_)?logits?_(scal|mult|soft)|^(lm_head|output)_multiplier")
"""Names of config values that change the logits behind the head; each must be known by name."""
HEAD_TOLERANCE = 0.05
"""Relative to the logits' mean deviation; bfloat16 alone makes some thousandths."""
CHUNK_ELEMENTS = 1 << 26
"""Most logits at a time: 256 MiB in float32."""
SMALLEST_REST = 1e-6
"""What a student's probability of all other tokens counts as, at least: its logarithm and quotient stay finite."""


@dataclass(frozen=True)
class Head:
    """logits = cap(scale * (W h + b)), where cap(x) is c * tanh(x / c) or nothing."""

    weight: nn.Parameter
    """[V, D]; under ZeRO-3 it must be gathered by the caller."""
    bias: nn.Parameter | None
    scale: float
    softcap: float | None

    @staticmethod
    def of(model: Any) -> Head:
        """The output head of a transformers model, with what its config says of the logits.

        Raises:
            InputError: the config names a treatment of the logits that is not known here.
        """
        module, config = model.get_output_embeddings(), model.config.get_text_config()
        values = {
            key: value for key, value in config.to_dict().items() if LOGITS.search(key) and value not in (None, 1)
        }
        softcap = values.pop("final_logit_softcapping", None)  # Gemma 2, 3, 4
        scale = float(values.pop("logit_scale", 1.0))  # Cohere
        if config.model_type.startswith("granite"):
            scale /= float(values.pop("logits_scaling", 1.0))
        if values:
            found = ", ".join(f"{key} {value}" for key, value in values.items())
            raise UnusableBaseError(
                f"{config.model_type}: its logits are changed by {found}, which is not supported yet"
            )
        return Head(module.weight, getattr(module, "bias", None), scale, softcap)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What ZeRO-3 must gather."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def logits(self, hidden_LD: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [L, V] in float32, or of some tokens only, which are computed in float32 from the start."""
        weight: torch.Tensor = self.weight
        bias: torch.Tensor | None = self.bias
        if tokens is not None:
            weight, bias = weight[tokens].float(), None if bias is None else bias[tokens].float()
            hidden_LD = hidden_LD.float()
        # A base that is spread over GPUs may have its head on another one than its last layer.
        logits_LV = F.linear(hidden_LD.to(weight.device), weight, bias).float()
        if self.scale != 1.0:
            logits_LV = logits_LV * self.scale
        return logits_LV if self.softcap is None else self.softcap * torch.tanh(logits_LV / self.softcap)


@torch.inference_mode()
def check_head(model: Any) -> None:
    """Logits that are made of the trunk's last hidden states must be the model's own.

    Raises:
        UnusableBaseError: something stands between trunk and head (MiniCPM3, BERT).
    """
    ids_1T = torch.tensor([[3, 4, 5, 6, 7]], device=model.device)
    whole_TV = model(input_ids=ids_1T, use_cache=False).logits[0].float()
    made_TV = Head.of(model).logits(model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state[0])
    difference = (made_TV.to(whole_TV.device) - whole_TV).abs().mean() / (whole_TV - whole_TV.mean()).abs().mean()
    if not difference < HEAD_TOLERANCE:
        raise UnusableBaseError(
            f"{model.config.model_type}: its logits are not its head's of the last hidden states (they differ by "
            f"{float(difference):.0%}): something between the two is not supported yet"
        )


Loss = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
"""Losses [C] of some positions and their gradients [C, V] by the logits [C, V], whose memory it may use for them."""


def positions_at_once(vocabulary: int) -> int:
    """How many positions have no more than CHUNK_ELEMENTS logits."""
    return max(1, CHUNK_ELEMENTS // vocabulary)


def softmax_(logits_CV: torch.Tensor, tokens_CK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [C, K] of some tokens, and the probabilities [C, V] of all in the place of the logits.

    One exponential of all logits and no other tensor of their size: torch's logsumexp makes one inside.
    """
    logits_CV.sub_(logits_CV.amax(-1, keepdim=True))
    own_CK = logits_CV.gather(1, tokens_CK)
    sums_C1 = logits_CV.exp_().sum(-1, keepdim=True)
    return own_CK - sums_C1.log(), logits_CV.div_(sums_C1)


class _ChunkedLoss(torch.autograd.Function):
    """The head is frozen, so the gradient of the hidden states is made chunk by chunk along with the loss."""

    @staticmethod
    def forward(ctx: Any, hidden_LD: torch.Tensor, head: Head, loss: Loss, weights_L: torch.Tensor) -> torch.Tensor:
        chunk = positions_at_once(head.weight.shape[0])
        losses_L, grad_LD = torch.empty_like(weights_L), torch.empty_like(hidden_LD)
        for start in range(0, len(weights_L), chunk):
            part = slice(start, start + chunk)
            logits_CV = head.logits(hidden_LD[part])
            slope = head.scale if head.softcap is None else head.scale * (1 - (logits_CV / head.softcap) ** 2)
            losses_C, grad_CV = loss(logits_CV, part)
            losses_L[part] = losses_C * weights_L[part]
            grad_CV.mul_(weights_L[part, None])
            if head.softcap is not None or head.scale != 1.0:
                grad_CV.mul_(slope)
            grad_LD[part] = grad_CV.to(hidden_LD.dtype) @ head.weight
            del logits_CV, grad_CV, slope  # before the next chunk is made, not after
        ctx.save_for_backward(grad_LD)
        return losses_L

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_L,) = grads
        (grad_LD,) = ctx.saved_tensors
        return grad_LD * grad_L[:, None].to(grad_LD.dtype), None, None, None


def cross_entropy(hidden_LD: torch.Tensor, head: Head, labels_L: torch.Tensor, weights_L: torch.Tensor) -> torch.Tensor:
    """weights * -log p(label) for each position, without ever holding the logits of all of them.

    torch's own `linear_cross_entropy` (2.13) has no weights by row, and on the CPU it copies the head to float32 at
    every call. Here at most CHUNK_ELEMENTS logits exist at once, and the head is needed in the forward pass only.

    Args:
        hidden_LD: last hidden states at the positions that predict a label.
        head: frozen.
        labels_L: token ids.
        weights_L: float32; a position of weight 0 has no gradient.

    Returns:
        [L] float32.
    """

    def loss(logits_CV: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        labels_C1 = labels_L[part, None]
        log_p_C1, grad_CV = softmax_(logits_CV, labels_C1)
        losses_C = -log_p_C1[:, 0]
        grad_CV.scatter_add_(1, labels_C1, torch.full_like(labels_C1, -1, dtype=grad_CV.dtype))
        return losses_C, grad_CV

    losses_L: torch.Tensor = _ChunkedLoss.apply(hidden_LD, head, loss, weights_L)
    return losses_L


def divergence(
    hidden_LD: torch.Tensor, head: Head, tokens_LK: torch.Tensor, log_p_LK: torch.Tensor, weights_L: torch.Tensor
) -> torch.Tensor:
    """weights * KL(p || q) for each position: q is the head's distribution, p a teacher's over K tokens and the rest.

    All tokens that p does not name are one event: sum_k p_k log(p_k / q_k) + p_rest log(p_rest / q_rest). Where p is
    certain of one token this is the cross-entropy.

    Args:
        hidden_LD, head, weights_L: as in `cross_entropy`.
        tokens_LK: K different token ids; any where the probability is 0.
        log_p_LK: float32 log-probabilities.

    Returns:
        [L] float32.
    """

    def loss(logits_CV: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        tokens_CK, log_p_CK = tokens_LK[part], log_p_LK[part]
        p_CK = log_p_CK.exp()
        log_q_CK, all_q_CV = softmax_(logits_CV, tokens_CK)
        q_CK = torch.where(p_CK > 0, log_q_CK.exp(), 0.0)
        rest_p_C1 = (1 - p_CK.sum(-1, keepdim=True)).clamp(min=0)
        ratio_C1 = rest_p_C1 / (1 - q_CK.sum(-1, keepdim=True)).clamp(min=SMALLEST_REST)
        told_C = torch.where(p_CK > 0, p_CK * (log_p_CK - log_q_CK), 0.0).sum(-1)
        losses_C = told_C + torch.special.xlogy(rest_p_C1, ratio_C1)[:, 0]
        # q - p for the K tokens, q (1 - rest_p / rest_q) for the others.
        grad_CV = all_q_CV.mul_(1 - ratio_C1)
        grad_CV.scatter_add_(1, tokens_CK, torch.where(p_CK > 0, q_CK * ratio_C1 - p_CK, 0.0))
        return losses_C, grad_CV

    losses_L: torch.Tensor = _ChunkedLoss.apply(hidden_LD, head, loss, weights_L)
    return losses_L


def top_log_probabilities(hidden_LD: torch.Tensor, head: Head, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The K most likely tokens of each position [L, K] and their log-probabilities [L, K], without gradients."""
    most = min(top_k, head.weight.shape[0])
    parts = hidden_LD.split(positions_at_once(head.weight.shape[0]))
    found = [head.logits(part).log_softmax(-1).topk(most, dim=-1) for part in parts]
    return torch.cat([indices for _, indices in found]), torch.cat([values for values, _ in found])


def log_probabilities(hidden_LD: torch.Tensor, head: Head, labels_L: torch.Tensor) -> torch.Tensor:
    """log p(label) at each position [L], float32, without gradients and without the logits of all positions."""
    chunk = positions_at_once(head.weight.shape[0])
    found = []
    for start in range(0, len(labels_L), chunk):
        logits_CV = head.logits(hidden_LD[start : start + chunk])
        label_C1 = labels_L[start : start + chunk, None].to(logits_CV.device)
        found.append(logits_CV.gather(1, label_C1)[:, 0] - logits_CV.logsumexp(-1))
    return torch.cat(found) if found else labels_L.new_empty(0, dtype=torch.float32)
