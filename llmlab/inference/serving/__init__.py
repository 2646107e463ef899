"""An engine behind HTTP, as OpenAI's clients expect it.

    openai_api   requests and answers as data; what is refused, and in which words
    text         the chat template; tokens to text, never half a character; stop strings
    worker       the process that owns the engine
    supervisor   starts the worker, watches it, starts it again
    answering    limits, the queue, and an answer piece by piece
    metrics      time to first token, between tokens, in the queue; blocks in use
    server       paths, headers, and the chat page (chat.html)

Start with `worker`.
"""

from llmlab.inference.serving.answering import ServingConfig
from llmlab.inference.serving.server import Server, is_loopback
from llmlab.inference.serving.worker import marked

__all__ = ["Server", "ServingConfig", "is_loopback", "marked"]
