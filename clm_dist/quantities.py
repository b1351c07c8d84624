"""Sizes and lengths of time as people say them."""

from collections.abc import Callable


def show_bytes(value: float) -> str:
    """A size: `58 MiB`, `1.95 GiB`, `80 GiB`."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= unit:
            return f"{value / unit:,.3g} {name}" if value < 999.5 * unit else f"{value / unit:,.0f} {name}"
    return f"{value:.0f} B"


def show_time(seconds: float) -> str:
    """A length of time: `45 s`, `2 min 5 s`, `12 min`, `2 h 10 min`, `3 d 4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def show_number(value: float) -> str:
    """A number in four digits: `542`, `12.34 k`, `1.25 G`."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):,.4g} {unit}"
    return f"{value:,.0f}"


def show_amount(value: float) -> str:
    """A number of hours or of money: `0.028`, `1.50`, `1,234.00`."""
    return f"{value:,.2f}" if value >= 1 else f"{value:.2g}"


def show_range(low: float, high: float, show: Callable[[float], str]) -> str:
    """Two ends of an interval, the unit once: `2 to 3 min`."""
    first, last = show(low), show(high)
    if first == last:
        return last
    number, _, unit = first.partition(" ")
    return f"{number if last.endswith(f' {unit}') and last.count(' ') == 1 else first} to {last}"
