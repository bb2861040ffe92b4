"""Progress and other words for the person who watches, all on stderr: stdout is for results."""

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

_LINE_EVERY = 5.0  # seconds between plain lines


class Meter:
    """Progress on stderr: a bar on a terminal, else a plain line every few seconds."""

    def __init__(self, name: str, total: int | None, unit: str, begin: float):
        self.name, self.total, self.unit, self.begin = name, total, unit, begin
        self.last = time.monotonic()
        self.done, self.amounts, self.note = 0, {}, ""
        self.bar = tqdm(total=total, desc=name, unit=unit, smoothing=0.1) if sys.stderr.isatty() else None

    def add(self, amounts: Mapping[str, int], already: int) -> None:
        self.done += amounts[self.unit] + already
        for unit, amount in amounts.items():
            self.amounts[unit] = self.amounts.get(unit, 0) + amount
        if self.bar is not None:
            self.bar.initial += already
            self.bar.update(amounts[self.unit] + already)
            self.bar.set_postfix_str(", ".join(filter(None, [*self._rates()[1:], self.note])), refresh=False)
        elif time.monotonic() - self.last > _LINE_EVERY:
            self._line()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        else:
            self._line()

    def _rates(self) -> list[str]:
        seconds = max(time.monotonic() - self.begin, 1e-9)
        return [f"{amount / seconds:,.0f} {unit}/s" for unit, amount in self.amounts.items()]

    def _line(self) -> None:
        self.last = time.monotonic()
        parts = [f"{self.name}: {self.done:,} {self.unit}"]
        if self.total:
            parts = [f"{self.name}: {self.done:,} of {self.total:,} {self.unit} ({self.done / self.total:.0%})"]
        parts += self._rates()
        fresh = self.amounts[self.unit]
        if self.total and fresh and self.done < self.total:
            parts.append(f"{duration((self.last - self.begin) / fresh * (self.total - self.done))} left")
        say(" | ".join(filter(None, [*parts, self.note])))


def say(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as `h:mm:ss` or `m:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
