"""Numbers as people read them: as many digits as the interval supports, a real minus sign, intervals in brackets."""

from __future__ import annotations

import math
import re

from trimtab.eval.schema import Estimate

ARM_NAMES = {
    "base": "base",
    "base+cap": "base + cap",
    "tuned": "tuned",
    "tuned+cap": "tuned + cap",
    "control": "control",
}

# Verdicts and lights: the sign on a page, the sign in Markdown, which has no colours, and the light's word.
STATUS_SIGNS = {"good": "✓", "mixed": "◐", "bad": "✕", "unclear": "?", "incomplete": "…"}
STATUS_DOTS = {"good": "🟢", "mixed": "🟡", "bad": "🔴", "unclear": "⚪", "incomplete": "🔵"}
LIGHTS = {"green": ("✓", "yes"), "amber": ("◐", "partly"), "red": ("✕", "no"), "grey": ("?", "not shown")}


def number(value: float, decimals: int | None = None) -> str:
    """``value`` with ``decimals`` digits after the point, or with 3 significant digits."""
    if decimals is None:
        text = f"{value:.3g}" if value == 0 or 1e-4 <= abs(value) < 1000 else f"{value:,.0f}"
        text = f"{value:.1e}" if 0 < abs(value) < 1e-4 else text
    else:
        text = f"{value:,.{decimals}f}"
    if text.startswith("-") and not any(digit in text for digit in "123456789"):
        text = text[1:]  # no "-0.00"
    return text.replace("-", "\u2212")


def real_minus(text: str) -> str:
    """``text`` with a real minus sign before its numbers; hyphens within words and ranges stay."""
    return re.sub(r"(?<![\w.])-(?=\d)", "\u2212", text)


def prose(text: str) -> str:
    """A sentence as a page shows it: real minus signs, and no line break within ``93 %``."""
    return real_minus(text).replace(" %", "\u00a0%")


def decimals_for(estimate: Estimate) -> int | None:
    """Digits after the point that show two digits of the interval's width; None where the interval has no width."""
    width = estimate.high - estimate.low
    return min(4, max(0, 1 - math.floor(math.log10(width)))) if width > 0 else None


def value_text(estimate: Estimate) -> str:
    """The value alone, such as ``0.091``."""
    return number(estimate.value, decimals_for(estimate))


def interval_text(estimate: Estimate) -> str:
    """The interval alone, such as ``[0.080, 0.103]``."""
    decimals = decimals_for(estimate)
    return f"[{number(estimate.low, decimals)}, {number(estimate.high, decimals)}]"


def estimate_text(estimate: Estimate) -> str:
    """Value and interval, such as ``0.091 [0.080, 0.103]``."""
    return f"{value_text(estimate)} {interval_text(estimate)}"


def percent_text(estimate: Estimate) -> str:
    """A fraction in per cent with its interval, such as ``93 % [85, 101]``."""
    low, high = number(100 * estimate.low, 0), number(100 * estimate.high, 0)
    return f"{number(100 * estimate.value, 0)} % [{low}, {high}]"


def signed(text: str) -> str:
    """A number's text with its sign: ``0.12 [...]`` -> ``+0.12 [...]``."""
    return text if text.startswith("\u2212") else f"+{text}"


def signed_text(estimate: Estimate) -> str:
    """A difference with its interval, such as ``+0.012 [0.003, 0.021]``."""
    return signed(estimate_text(estimate))


def points_text(estimate: Estimate) -> str:
    """A difference of two shares, such as ``+12 points [-3, 27]``."""
    return signed(percent_text(estimate).replace(" %", " points"))


def p_text(p: float) -> str:
    """A p-value, such as ``p = 0.012``; what is below 0.001 is said to be so, since no digit of it is known."""
    return "p < 0.001" if p < 0.001 else f"p = {number(p)}"


def seed_text(value: float, as_share: bool) -> str:
    """One repetition's value: a share as ``0.93``, else three significant digits; a dash where it is undefined."""
    if math.isnan(value):
        return "\u2013"
    return number(value, 2) if as_share else number(value)


def inline_name(name: str) -> str:
    """A name for the middle of a sentence: ``Text-only behaviour`` -> ``text-only behaviour``; ``KL to base`` stays."""
    return name[0].lower() + name[1:] if len(name) > 1 and not name[1].isupper() else name
