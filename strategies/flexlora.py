"""FlexLoRA: average the deltas, then give every client the best adapter of its own rank.

Bai et al., arXiv 2402.11505. `T = Σ w_k s_k B_k A_k = U·S·Vᵀ`; a client of rank r gets
`B = U_r S_r / s_r`, `A = V_rᵀ`. The published code forms T and its SVD densely; here both come
from the stacked factors, with the same product. `s_k` stands inside the sum: unequal ranks have
unequal scales.
"""

from collections.abc import Iterable, Sequence

import torch
from pydantic import Field
from torch import Tensor

from common.lowrank import (
    RunningSum,
    Term,
    adapted_modules,
    kept_share,
    named_factors,
    orthonormal_factors,
)
from common.rules import TURNING
from common.tensors import RunningMean, Tensors
from strategies.base import (
    Client,
    Merged,
    Options,
    Probe,
    Served,
    Setting,
    Strategy,
    Update,
    for_task,
    heads_of,
    model_of,
)


class FlexLoRAOptions(Options):
    """Options of FlexLoRA.

    Attributes:
        buffer_rank: directions of the running sum that are held while updates come in; 0 holds
            all, and the merge is exact before its last truncation. For thousands of clients.
    """

    buffer_rank: int = Field(0, ge=0)


def flexlora(options: FlexLoRAOptions, setting: Setting) -> Strategy:
    """Average `s·B·A` and truncate to the largest rank; ranks may differ."""
    server_scale = setting.scale(setting.rank)

    def send(state: Tensors, client: Client) -> Tensors:
        sent = dict(for_task(state, client.task))
        for module in adapted_modules(model_of(state)):
            term = Term.of(state, module)
            B = term.B[:, : client.rank] * (server_scale / client.scale)
            sent |= named_factors(module, Term(B, term.A[: client.rank]))
        return sent

    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        modules = adapted_modules(model_of(state))
        sums = {module: RunningSum(options.buffer_rank) for module in modules}
        held, examples = RunningMean(), 0
        for update in updates:
            examples += update.num_examples
            held.add(update.num_examples, heads_of(update.tensors))
            for module, running in sums.items():
                share = update.num_examples * update.client.scale
                running.add(share, Term.of(update.tensors, module))
            del update  # before the next one is asked for
        merged: dict[str, Tensor] = {**state, **held.mean()}
        spectra, lost = [], 0.0
        for module in modules:
            running = sums.pop(module)
            svd = running.svd(1 / examples)
            spectra.append(svd.S)
            lost += (running.dropped / examples) ** 2
            term = orthonormal_factors(svd.truncated(setting.rank), server_scale)
            merged |= named_factors(module, _filled(term, Term.of(state, module)))
        diagnostics = {"kept_energy": kept_share(spectra, setting.rank)}
        if options.buffer_rank:
            whole = float(torch.cat(spectra).norm())
            diagnostics["buffer_error_at_most"] = lost**0.5 / whole if whole > 0 else 0.0
        return Merged(merged, diagnostics)

    def serve(state: Tensors) -> Sequence[Served]:
        return [Served(model_of(state), setting.rank)]

    return Strategy(start=dict, send=send, merge=merge, serve=serve, rules=TURNING)


def _filled(term: Term, before: Term) -> Term:
    """Keep the last A (and B zero) for directions that a cohort of low rank cannot fill."""
    missing = before.rank - term.rank
    if not missing:
        return term
    B = torch.cat([term.B, torch.zeros(term.B.shape[0], missing, dtype=term.B.dtype)], dim=1)
    return Term(B, torch.cat([term.A, before.A[-missing:].to(term.A.dtype)]))
