"""A monitor of an adapter in training: the sizes of its gradients and updates, and warnings where they look wrong.

Everything about s·B A is computed from matrices of R x R: with G = Bᵀ B and H = A Aᵀ, ``‖B A‖² = tr(G H)``, and the
singular values of B A are those of ``G^½ H^½``. The product (out, in) itself is never formed (but for DoRA's length).

Works with any loop, and with any engine of a run, whose ranks may hold parts of each matrix:

    monitor = Monitor(model)
    ...
    loss.backward()
    monitor.before_update(step)
    optimizer.step()
    row = monitor.after_update(step, optimizer)  # None where no check was due
    for warning in row["warnings"] if row else ():
        print(warning)

Legend: R rank, K factors of a product (R, or 2R with what PiSSA subtracted from the weight).
"""

import contextlib
from math import isfinite
from statistics import median

import torch
from torch import Tensor, nn

from minillm.lora.core import adapted_layers
from minillm.lora.more.experts import ExpertLoRA
from minillm.lora.more.layers import DoRA, ResidualLoRA, base_weight

STEPS_WITHOUT_GRADIENT = 50  # of A or B, before it is reported
LARGE_UPDATE = 1e-2  # of the weight in one step, in three consecutive checks
LARGE_RATIO = 1000.0  # of B's gradient to A's, for as long as above
LARGE_DELTA = 0.5  # of the weight in total
SMALL_DELTA = 1e-4  # at the end
CONSECUTIVE_CHECKS = 3
N_DIGITS = 6  # of a figure


class OneProcess:
    """What ``Monitor`` reads where a process holds everything; engines whose ranks hold parts have the same methods."""

    gradient_scale = 1.0  # of the gradients that the update sees, to those that ``gradient`` returns

    def gathered(self, module: nn.Module):
        """Return a context in which the parameters of ``module`` are whole."""
        return contextlib.nullcontext()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return a parameter's gradient."""
        return parameter.grad

    def adam_state(self, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> dict:
        """Return the settings and the state that ``optimizer`` has for a parameter."""
        groups = (group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
        return {**next(groups, {}), **optimizer.state.get(parameter, {})}


class Monitor:
    """Watches the active adapter in ``model``.

    Args:
        interval: steps between checks; the first step is always checked.
        engine: of a run whose ranks hold parts of the gradients (``minillm.distributed.engine.Engine``); all ranks
            then make all calls together, before the engine clips, and get the same figures.

    Attributes:
        streaks: for each thing that may go wrong, for how many steps (or checks) it has lasted, by layer.
        given: the kinds of warnings already given; each comes once.
    """

    def __init__(self, model: nn.Module, *, interval: int = 5, engine=None):
        self.layers = adapted_layers(model)
        self.interval = interval
        self.engine = OneProcess() if engine is None else engine
        self.weight_norms, self.ranks = {}, {}
        for name, layer in self.layers.items():
            with self.engine.gathered(layer):
                self.weight_norms[name] = base_weight(layer).float().norm().item()
                self.ranks[name] = len(layer.lora.A.weight)
        self.streaks: dict[str, dict[str, int]] = {}
        self.given: list[str] = []
        self.last_check = 0
        self.last_row: dict | None = None
        self._seen_step = 0  # whose gradients these are
        self._gradients: dict[str, tuple[float, float]] = {}
        self._before: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def before_update(self, step: int) -> None:
        """Read the gradients of a step (counted from 1): after ``backward``, unscaling and clipping."""
        if step != 1 and step % self.interval:
            return
        loras = [layer.lora for layer in self.layers.values()]
        norms = torch.stack([self._grad_norm(matrix.weight) for lora in loras for matrix in (lora.A, lora.B)])
        self._gradients = dict(zip(self.layers, norms.view(-1, 2).tolist(), strict=True))
        self._seen_step = step
        for name, lora in zip(self.layers, loras, strict=True):
            with self.engine.gathered(lora):
                self._before[name] = lora.A.weight.detach().clone(), lora.B.weight.detach().clone()

    @torch.no_grad()
    def after_update(self, step: int, optimizer: torch.optim.Optimizer) -> dict | None:
        """Measure what the update did; return a row of figures, or None where no check was due.

        The row: ``step``; ``warnings``, new ones; and ``layers``, by name a dict of

        * grad_norm_A, grad_norm_B and grad_ratio = B : A (None where A has none);
        * delta_ratio: ‖ΔW‖/‖W‖, all that the adapter has changed of the layer's weight so far;
        * effective_rank of ΔW: exp of the entropy of its singular values (Roy & Vetterli, 2007), 1 to R;
        * update_ratio: what this step changed of s·B A, in units of ‖W‖; update_ratio_A and _B: of A and B, in units
          of their own norm before (None: it was zero);
        * adam_mean_A, adam_rms_A, adam_step_A, adam_eps_A and for B: root mean square of AdamW's exp_avg; root of the
          mean of exp_avg_sq; mean |step| in units of the learning rate (1: all gradients agree, near 0: they cancel);
          share of the numbers whose step is held back by eps. None for other optimizers.
        """
        if self._seen_step != step:  # not due; or the update of the step that was checked has been skipped
            return None
        rows, still_zero = {}, set()
        for name, layer in self.layers.items():
            lora = layer.lora
            states = [_adam(self.engine.adam_state(matrix.weight, optimizer)) for matrix in (lora.A, lora.B)]
            # What DoRA changes depends on the layer's own weight, too.
            with self.engine.gathered(layer if isinstance(lora, DoRA) else lora):
                rows[name] = self._row(name, self._products(name), states)
                if not lora.B.weight.any():
                    still_zero.add(name)
        self._before = {}  # a copy of the adapter, no longer needed
        row = {"step": step, "layers": rows, "warnings": self._warnings(step, rows, still_zero)}
        self.last_check, self.last_row = step, row
        return row

    def notes(self) -> list[str]:
        """Return what the last check says about rank and learning rate, for the end of a run."""
        if self.last_row is None:
            return []
        rows = self.last_row["layers"]
        if not all(v is None or isfinite(v) for row in rows.values() for v in row.values()):
            return ["the adapter is no longer finite: use a checkpoint from before"]
        ranks = [rows[name]["effective_rank"] / rank for name, rank in self.ranks.items()]
        deltas = [row["delta_ratio"] for row in rows.values() if row["delta_ratio"] is not None] or [0.0]
        width, share = median(self.ranks.values()), median(ranks)
        notes = [f"median over layers: |dW|/|W| {median(deltas):.2g}, effective rank {share * width:.1f} of {width:g}"]
        if max(deltas) < SMALL_DELTA:
            notes.append(
                f"the adapter has changed no layer by more than {max(deltas):.1g} of its weight: it has hardly learnt; "
                "raise the learning rate or train longer"
            )
        elif share < 0.25 and width > 2:
            notes.append(f"most layers use less than a quarter of rank {width:g}: a smaller one will probably do")
        elif share > 0.9 and width > 1:
            notes.append(f"most layers use all of rank {width:g}: a larger one may learn more")
        return notes

    def state(self) -> dict:
        """Return what a checkpoint must hold so that a resumed run gives the same warnings."""
        streaks = {kind: dict(by_layer) for kind, by_layer in self.streaks.items()}
        return {"streaks": streaks, "said": list(self.given), "last_look": self.last_check}

    def load_state(self, state: dict) -> None:
        """Continue from ``state``."""
        self.streaks, self.given, self.last_check = state["streaks"], state["said"], state["last_look"]

    def _grad_norm(self, parameter: nn.Parameter) -> Tensor:
        gradient = self.engine.gradient(parameter)
        return torch.zeros((), device=parameter.device) if gradient is None else gradient.norm()

    # ---- the figures ---------------------------------------------------------------------------------------------

    def _products(self, name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Return, for the change in total and in this step, the pair Bᵀ B and A Aᵀ (K, K), on the CPU."""
        lora = self.layers[name].lora
        (a, b), (old_a, old_b) = (lora.A.weight, lora.B.weight), self._before[name]
        if isinstance(lora, ExpertLoRA):
            (a, b), (old_a, old_b) = lora.by_expert(a, b), lora.by_expert(old_a, old_b)
        da, db = a - old_a, b - old_b  # (..., R, in), (..., out, R)
        a0, b0 = lora.initial if isinstance(lora, ResidualLoRA) else (a[..., :0, :], b[..., :0])
        # B' A' - B A = B' dA + dB (A' - dA): sums of small terms, where a difference of products would round.
        pairs = {
            "delta": (torch.cat([b, -b0], dim=-1), torch.cat([a, a0], dim=-2)),
            "update": (torch.cat([b, db], dim=-1), torch.cat([da, a - da], dim=-2)),
        }
        return {key: ((left.mT @ left).cpu(), (right @ right.mT).cpu()) for key, (left, right) in pairs.items()}

    def _row(self, name: str, products: dict, states: list) -> dict:
        layer = self.layers[name]
        lora, weight_norm = layer.lora, self.weight_norms[name]
        norm_a, norm_b = (norm * self.engine.gradient_scale for norm in self._gradients[name])
        rank = self.ranks[name]
        singular = singular_values(*products["delta"])
        delta = lora.delta(layer).norm().item() if isinstance(lora, DoRA) else lora.scaling.item() * _length(singular)
        update = lora.scaling.item() * _length(singular_values(*products["update"]))
        # The update is [B', dB] [dA; A' - dA]: the last rows of the right matrix are the old A, dB comes after B'.
        left, right = products["update"]
        diagonals = right.diagonal(dim1=-2, dim2=-1)[..., :rank], left.diagonal(dim1=-2, dim2=-1)[..., rank:]
        steps = {key: diagonal.sum().sqrt().item() for key, diagonal in zip("AB", diagonals, strict=True)}
        befores = {key: old.norm().item() for key, old in zip("AB", self._before[name], strict=True)}
        row = {
            "grad_norm_A": norm_a,
            "grad_norm_B": norm_b,
            "grad_ratio": norm_b / norm_a if norm_a else None,
            "delta_ratio": delta / weight_norm if weight_norm else None,
            "effective_rank": effective_rank(singular),
            "update_ratio": update / weight_norm if weight_norm else None,
        }
        row |= {f"update_ratio_{key}": steps[key] / befores[key] if befores[key] else None for key in "AB"}
        for key, state in zip("AB", states, strict=True):
            row |= {f"adam_{what}_{key}": value for what, value in state.items()}
        return {key: value if value is None else float(f"{value:.{N_DIGITS}g}") for key, value in row.items()}

    # ---- what is wrong -------------------------------------------------------------------------------------------

    def _warnings(self, step: int, rows: dict[str, dict], still_zero: set[str]) -> list[str]:
        passed = step - self.last_check
        fresh = self._new_warning
        warnings = [
            fresh("finite", {n: any(v is not None and not isfinite(v) for v in r.values()) for n, r in rows.items()},
                  CONSECUTIVE_CHECKS, "the adapter or its gradients hold numbers that are not finite in {}: lower the "
                  "learning rate, and resume from a checkpoint before this step"),
            fresh("A and B", {n: not r["grad_norm_A"] and not r["grad_norm_B"] for n, r in rows.items()}, passed,
                  f"A and B have received no gradient for {STEPS_WITHOUT_GRADIENT} steps in {{}}: the loss does not "
                  "depend on that layer"),
            fresh("A", {n: not r["grad_norm_A"] and n in still_zero and r["grad_norm_B"] > 0 for n, r in rows.items()},
                  passed, f"A has received no gradient for {STEPS_WITHOUT_GRADIENT} steps in {{}}: B is still zero; is "
                  "its learning rate zero?"),
            fresh("ratio", {n: (r["grad_ratio"] or 0) > LARGE_RATIO for n, r in rows.items()}, passed,
                  f"B's gradient has been more than {LARGE_RATIO:g} times A's for {STEPS_WITHOUT_GRADIENT} steps in "
                  "{}: A hardly learns while B is this small; raise the learning rate, or that of B (LoRA+)"),
            fresh("update", {n: (r["update_ratio"] or 0) > LARGE_UPDATE for n, r in rows.items()}, 1,
                  "update ratio {value:.1g} in {}: one step changes that much of the weight (usual: 1e-3 and less), "
                  "and what the model knew may be written over; mix in old data, or lower the learning rate",
                  values={n: r["update_ratio"] for n, r in rows.items()}),
            fresh("delta", {n: (r["delta_ratio"] or 0) > LARGE_DELTA for n, r in rows.items()}, CONSECUTIVE_CHECKS,
                  "the adapter weighs {value:.0%} of the weight in {}: what the model knew is being written over; "
                  "lower the learning rate or alpha, or mix in old data",
                  values={n: r["delta_ratio"] for n, r in rows.items()}),
            fresh("eps", {n: (r["adam_eps_B"] or 0) > 0.5 and r["grad_norm_B"] > 0 for n, r in rows.items()}, 1,
                  "AdamW's eps is larger than most gradients in {}: its steps there are far smaller than the learning "
                  "rate"),
        ]  # fmt: skip
        return [warning for warning in warnings if warning]

    def _new_warning(
        self, kind: str, wrong: dict[str, bool], passed: int, text: str, values: dict[str, float | None] | None = None
    ) -> str | None:
        """Count how long something is wrong; return the warning when it has lasted long enough, the first time only."""
        before = self.streaks.get(kind, {})
        streaks = {name: before.get(name, 0) + passed for name, is_wrong in wrong.items() if is_wrong}
        self.streaks[kind] = streaks
        limit = STEPS_WITHOUT_GRADIENT if kind in ("A", "A and B", "ratio") else CONSECUTIVE_CHECKS
        lasting = [name for name, length in streaks.items() if length >= limit]
        if not lasting or kind in self.given:
            return None
        self.given.append(kind)
        worst = max(lasting, key=lambda name: values[name]) if values else lasting[0]
        where = worst + (f" and {len(lasting) - 1} more layers" if len(lasting) > 1 else "")
        return text.format(where, value=values[worst] if values else None)


def singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Return those of B A (..., K), largest first, float64, from Bᵀ B and A Aᵀ (..., K, K)."""
    left, right = left.double(), right.double()
    if not (left.isfinite().all() and right.isfinite().all()):
        return torch.full(left.shape[:-1], torch.nan, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(right)
    # H = root rootᵀ, so root has what A has but its right rotation
    root = vectors * values.clamp_min(0).sqrt()[..., None, :]
    squares = torch.linalg.eigvalsh(root.mT @ left.double() @ root)
    return squares.clamp_min(0).sqrt().flip(-1)


def effective_rank(singular: Tensor) -> float:
    """Return exp(-Σ p ln p) of p = σ/Σσ (Roy & Vetterli, The effective rank, 2007); 0 for a product of zero.

    Values below 1e-6 of the largest are rounding, and left out. Of several products, as of experts: the mean.
    """
    if singular.ndim > 1:
        return sum(map(effective_rank, singular)) / len(singular)
    if not singular.max() > 0:
        return 0.0
    nonzero = singular[singular > 1e-6 * singular.max()]
    return torch.special.entr(nonzero / nonzero.sum()).sum().exp().item()


def _length(singular: Tensor) -> float:
    return singular.norm().item()


def _adam(state: dict) -> dict[str, float | None]:
    """Return the statistics of AdamW's state for a parameter."""
    if not {"exp_avg", "exp_avg_sq", "step"} <= state.keys():
        return dict.fromkeys(("mean", "rms", "step", "eps"))
    beta1, beta2 = state["betas"]
    n = float(state["step"])
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    root = (square / (1 - beta2**n)).sqrt()
    used = square > 0  # rows that an adapter of lower rank leaves unused have no gradient
    steps = (mean / (1 - beta1**n)).abs() / (root + state["eps"])
    n_used = used.sum().clamp_min(1)
    statistics = [
        mean.square().mean().sqrt(),
        square.mean().sqrt(),
        steps.sum() / n_used,
        (used & (root < state["eps"])).sum() / n_used,
    ]
    values = torch.stack([value.float() for value in statistics]).tolist()
    return dict(zip(("mean", "rms", "step", "eps"), values, strict=True))
