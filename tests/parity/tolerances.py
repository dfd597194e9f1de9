"""How far from the reference each quantity may be. The numbers are those of `golden/README.md`, section 2.

They come from a float64 computation: the time features alone move velocities by 1e-4 (one float32 ulp of the timestep),
what does not read the timestep is far closer, and a wrong formula is farther off than its tolerance.
"""

import re
from typing import Literal, NamedTuple

import numpy as np


class Tolerance(NamedTuple):
    """A row of the table that `make parity` prints."""

    quantity: str
    limit: float
    measured: Literal["absolute", "relative", "of the largest"]
    """Against each value itself, or against the array's largest."""
    names: str
    """Regular expression of the recorded names."""
    noise: float = 0.0
    """An error that is rounding, however small the value: some gradients are zero in exact arithmetic."""

    def error(self, found: np.ndarray, expected: np.ndarray) -> float:
        """The largest error; infinite where shapes differ or a value is not a number."""
        if found.shape != expected.shape:
            return float("inf")
        found, expected = found.astype(np.float64), expected.astype(np.float64)
        errors = np.abs(found - expected)
        if self.measured != "absolute":
            values = np.abs(expected) if self.measured == "relative" else np.abs(expected).max(initial=0.0)
            scale = np.maximum(values, self.noise / self.limit)
            errors = errors / np.where(scale == 0, 1, scale)
        largest = float(errors.max(initial=0.0))
        return largest if np.isfinite(largest) else float("inf")


_CASE = r"(?:masked_image/)?"

OUTPUTS = (
    Tolerance("image tokens", 2e-5, "absolute", r"siglip(_with_posemb|_encoded)?/.+"),
    Tolerance("prefix tokens", 2e-5, "absolute", "prefix_tokens|input_tokens"),
    Tolerance("masks", 0, "absolute", "(prefix|suffix|input)_mask|((prefix|suffix)_)?ar_mask|attn_mask"),
    Tolerance("positions", 0, "absolute", "positions|decode.*/positions|decode.*/prefill_len"),
    Tolerance("prefix output", 2e-5, "absolute", f"prefix_out|{_CASE}pre_logits"),
    Tolerance("keys and values", 2e-5, "absolute", "kv_cache/[kv]"),
    Tolerance("time features", 3e-4, "absolute", "time_posemb|adarms_cond"),
    Tolerance("noisy actions", 2e-5, "absolute", "x_t|u_t"),
    Tolerance("suffix", 3e-4, "absolute", "suffix_tokens|suffix_out"),
    Tolerance("velocity", 3e-4, "absolute", "v_t|extra_v_t"),
    Tolerance("velocity near time 0", 2e-5, "absolute", "extra_v_t near 0"),
    Tolerance("loss", 3e-4, "absolute", f"{_CASE}loss|mean_loss"),
    Tolerance("sampled actions", 3e-4, "absolute", r"actions_\d+"),
    Tolerance("sampling path", 3e-4, "absolute", r"traj_\d+/[xv]"),
    Tolerance("sampling times", 1e-6, "absolute", r"traj_\d+/time"),
    Tolerance("logits", 1e-4, "absolute", f"{_CASE}logits|{_CASE}target_logp|(decode|eos).*/(logits|top2_margin)"),
    Tolerance("greedy tokens", 0, "absolute", "(decode|eos).*/tokens"),
    Tolerance("gradient norm", 1e-3, "relative", "grad_global_norm(_trainable)?"),
    Tolerance("gradient norm of each parameter", 1e-3, "relative", "grad_norm/.+", noise=1e-6),
    Tolerance("gradients", 1e-3, "of the largest", "grad/.+", noise=1e-6),
)

TRACE = (
    Tolerance("trace: loss", 2e-4, "relative", "loss"),
    Tolerance("trace: gradient norm", 5e-4, "relative", "grad_norm"),
    Tolerance("trace: learning rate", 1e-6, "relative", "lr"),
    Tolerance("trace: update norm", 1e-5, "relative", "update_norm"),
    Tolerance("trace: parameter and EMA norms", 1e-5, "relative", "(ema_)?param_norm_(all|kernels)"),
    Tolerance("trace: final parameters and EMA", 3e-4, "absolute", "final_(param|ema)/.+"),
)

BFLOAT16 = 1.5
"""Our distance from the float32 reference in units of that of the reference's own bfloat16."""


def tolerance_of(name: str, table: tuple[Tolerance, ...]) -> Tolerance:
    """The row that a recorded name belongs to. Fails for a name that no row knows: nothing recorded is skipped."""
    rows = [row for row in table if re.fullmatch(row.names, name)]
    assert rows, f"unread golden keys: {name} has no tolerance"
    assert len(rows) == 1, f"{name} has several tolerances: {', '.join(row.quantity for row in rows)}"
    return rows[0]
