"""What the engine raises, by whose fault it is. A message gives the value and the limit, never the text of a prompt."""

from __future__ import annotations


class EngineError(Exception):
    """Root of what nodes/engine raises on purpose."""


class PromptTooLong(EngineError):
    """The client's fault: the prompt leaves no room for one token of an answer. Nothing was queued."""

    def __init__(self, tokens: int, limit: int, *, is_exact: bool = True) -> None:
        """tokens: at least that many where it is not exact. limit: of a prompt; an answer takes one more at least."""
        count = f"{tokens} tokens" if is_exact else f"more than {tokens} tokens"
        # Begins with OpenAI's own words: LiteLLM and others know this error by them, whatever its code is.
        super().__init__(
            f"This model's maximum context length is {limit + 1} tokens, answer included. The prompt has {count}."
        )
        self.tokens = tokens
        self.limit = limit


class InputTooLong(EngineError):
    """The client's fault: an embedding model does not take that many tokens. Nothing was queued."""

    def __init__(self, tokens: int, limit: int, *, is_exact: bool = True) -> None:
        """tokens: at least that many where it is not exact."""
        count = f"{tokens} tokens" if is_exact else f"more than {tokens} tokens"
        super().__init__(f"it has {count}, and this model takes {limit}")
        self.tokens = tokens
        self.limit = limit


class TokenUnknown(EngineError):
    """An id that the model does not have. Nothing was queued."""

    def __init__(self, token_id: int, vocabulary_size: int) -> None:
        super().__init__(f"token {token_id} is not among the {vocabulary_size} of this model")


class QueueFull(EngineError):
    """As many sequences wait for a slot as may. retry_after_s: about when one more can wait.

    From submit(): nothing was queued. From a stream: the sequence waited, and gave its place to an asker with fewer."""

    def __init__(self, queued: int, limit: int, retry_after_s: float = 1.0) -> None:
        super().__init__(f"{queued} requests wait for a slot, and {limit} may")
        self.queued = queued
        self.limit = limit
        self.retry_after_s = retry_after_s


class DeadlinePassed(EngineError):
    """The sequence's deadline passed, in the queue or in its slot, which is free again."""


class EngineOverflow(EngineError):
    """The reader took nothing for so long that its buffer filled; the sequence was ended and its slot freed."""


class EngineFault(EngineError):
    """Our fault: a step broke, or the model gave numbers that are none. What was read before it stands."""


class EngineStopped(EngineError):
    """The engine is not running: it stops, has stopped or has not started."""
