"""python -m llmlab.inference.model_server REPOSITORY [--port 8000]."""

from __future__ import annotations

import argparse
import sys
import threading

from llmlab.inference.model_server.server import ModelServer, ServerConfig


def main(arguments: list[str] | None = None) -> int:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m llmlab.inference.model_server")
    parser.add_argument("repository")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1")
    given = parser.parse_args(arguments)
    try:
        config = ServerConfig(host=given.host, port=given.port)
        server = ModelServer(given.repository, config).start()
    except (ValueError, OSError) as error:
        sys.stderr.write(f"cannot serve: {error}\n")
        return 1
    sys.stdout.write(f"serving {', '.join(server.models)} on http://{server.url}/v2\n")
    sys.stdout.flush()
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
