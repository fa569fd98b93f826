"""Measures a running engine: rates, totals and step times, from the times its caller gives. Sees no clock."""

from __future__ import annotations

import statistics
from collections import deque

# Share that the past keeps at each new measurement: after about 20 the batch of a minute ago no longer counts.
RATE_DECAY = 0.95
# Steps whose median tells how long a step takes; odd, and few enough to follow a batch that grows.
MEDIAN_STEPS = 63
# tokens_per_s is over this time, counted in whole seconds.
WINDOW_S = 10
# Requests whose estimate is compared with what came.
ESTIMATES = 255
# Share of the newest measurement in the time of a decode step of one batch size.
STEP_SHARE = 0.1
# Tokens of an answer until one has been seen, and the share of the newest in their mean. The first ones count alike, so
# that a node which has just started does not tell refused clients of answers that nobody asks for.
ANSWER_TOKENS_DEFAULT = 256.0
ANSWER_SHARE = 1 / 16


class Rate:
    """Tokens per second over the time spent on them alone, the newest measurements weighing most."""

    __slots__ = ("_seconds", "_tokens")

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self._tokens = self._tokens * RATE_DECAY + tokens
        self._seconds = self._seconds * RATE_DECAY + seconds

    @property
    def per_s(self) -> float:
        """0.0 while unmeasured."""
        return self._tokens / self._seconds if self._seconds > 0.0 else 0.0


class Meter:
    """Everything counted of one engine since it started."""

    def __init__(self) -> None:
        self.prefill = Rate()
        self.decode = Rate()
        self.steps = 0
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.step_seconds = 0.0
        self.session_seconds = 0.0
        self.answer_tokens = ANSWER_TOKENS_DEFAULT  # running mean
        self._answers = 0
        self._recent_steps: deque[float] = deque(maxlen=MEDIAN_STEPS)
        self._decode_step_s: dict[int, float] = {}  # by rows: at most as many as there are slots
        self._estimate_errors: deque[float] = deque(maxlen=ESTIMATES)
        self._seconds: deque[tuple[int, int]] = deque(maxlen=WINDOW_S + 1)  # (whole second, tokens in it), oldest first

    def prefilled(self, tokens: int, seconds: float) -> None:
        self.prefill.add(tokens, seconds)
        self.prompt_tokens += tokens
        self.session_seconds += seconds

    def decoded(self, rows: int, seconds: float) -> None:
        self.decode.add(rows, seconds)
        self.session_seconds += seconds
        known = self._decode_step_s.get(rows, seconds)
        self._decode_step_s[rows] = known + (seconds - known) * STEP_SHARE

    def first_token(self, estimated_s: float, actual_s: float) -> None:
        """A request's first token came."""
        self._estimate_errors.append(abs(estimated_s - actual_s) / max(actual_s, 1e-9))

    def answered(self, tokens: int) -> None:
        """An answer has ended."""
        self._answers += 1
        self.answer_tokens += (tokens - self.answer_tokens) * max(ANSWER_SHARE, 1 / self._answers)

    def decode_step_s(self, rows: int) -> float:
        """Seconds of a decode step of so many rows, or of the nearest number that was measured; 0.0 before any."""
        known = self._decode_step_s
        return known[min(known, key=lambda measured: abs(measured - rows))] if known else 0.0

    def estimate_error(self) -> float:
        """Median of |estimated - actual| / actual over the last requests' times to first token; 0.0 before any."""
        return statistics.median(self._estimate_errors) if self._estimate_errors else 0.0

    def stepped(self, generated: int, seconds: float, now: float) -> None:
        """A whole tick: tokens that reached their sequences, its length, and when it ended."""
        self.steps += 1
        self.step_seconds += seconds
        self._recent_steps.append(seconds)
        self.generated_tokens += generated
        second = int(now)
        if self._seconds and self._seconds[-1][0] == second:
            generated += self._seconds.pop()[1]
        self._seconds.append((second, generated))

    def tokens_per_s(self, now: float) -> float:
        """Generated over the last WINDOW_S whole seconds and the begun one; 0.0 when idle for that long."""
        oldest = int(now) - WINDOW_S
        tokens = sum(tokens for second, tokens in self._seconds if second > oldest)
        return tokens / (now - oldest - 1) if tokens else 0.0

    def median_step_s(self) -> float:
        """0.0 before the first step."""
        return statistics.median(self._recent_steps) if self._recent_steps else 0.0
